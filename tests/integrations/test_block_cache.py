"""The cache that is written in place: as any other to a model, and what it refuses."""

import pytest
import torch
from transformers import DynamicCache

from tests.integrations.tiny_models import diffusion_gemma, padded_batch, tiny
from twotower_kernels.integrations.transformers import BlockCache, register

register()


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 8)


def test_it_is_a_dynamic_cache() -> None:
    """The same keys and values after every update, in the same memory; views, strided."""
    config = tiny("Llama").config
    cache, other = BlockCache(config, 2, 20), DynamicCache(config=config)
    place = cache.layers[1].storage.k.data_ptr()
    for tokens in (7, 1, 3, 9):
        k, v = states(tokens)
        for found, wanted in zip(cache.update(k, v, 1), other.update(k, v, 1), strict=True):
            assert torch.equal(found, wanted) and found.data_ptr() in (place, cache.layers[1].storage.v.data_ptr())
        assert cache.get_seq_length(1) == other.get_seq_length(1)
        assert cache.get_mask_sizes(4, 1) == other.get_mask_sizes(4, 1)
    assert cache.layers[1].storage.k.shape == (2, 20, 2, 8) and cache.layers[1].storage.k.data_ptr() == place
    assert cache.get_max_length() == 20 and not cache.is_compileable


def test_peek_crop_and_reset() -> None:
    cache = BlockCache(tiny("Llama").config, 2, 12)
    k, v = states(5)
    for layer in range(2):
        cache.update(k, v, layer)
    for _ in range(2):
        block_k, block_v = states(4)
        seen_k, seen_v = cache.peek(block_k, block_v, 0)
        assert torch.equal(seen_k, torch.cat([k, block_k], 2)) and torch.equal(seen_v, torch.cat([v, block_v], 2))
    assert cache.lengths.tolist() == [5, 5]
    with cache.peeking():
        assert cache.update(block_k, block_v, 1)[0].shape == (2, 2, 9, 8)
    assert cache.get_seq_length(1) == 5 and torch.equal(cache.layers[1].keys, k)
    cache.crop(-2)
    assert cache.lengths.tolist() == [3, 3] and torch.equal(cache.layers[0].values, v[:, :, :3])
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected minus the tokens to remove, -3 to 0, got -4"):
        cache.crop(-4)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected minus the tokens to remove, -3 to 0, got 1"):
        cache.crop(1)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys, k[[1, 1], :, :3])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("implementation", ["eager", "twotower"])
def test_a_peek_leaves_the_model_as_it_was(name: str, implementation: str) -> None:
    """A block seen twice and then committed gives the logits of the whole text, with any attention."""
    model, (ids, mask) = tiny(name), padded_batch()
    model.set_attn_implementation(implementation)
    cache = BlockCache(model.config, 3, 11)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 7:]
        model(input_ids=ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        call = {"attention_mask": mask, "past_key_values": cache}
        with cache.peeking():
            model(input_ids=ids[:, 7:].flip(1), **call)
            peeked = model(input_ids=ids[:, 7:], **call).logits
        assert cache.lengths.tolist() == [7, 7, 7]
        committed = model(input_ids=ids[:, 7:], **call).logits
    assert cache.lengths.tolist() == [11, 11, 11]
    real = mask[:, 7:].bool()
    torch.testing.assert_close(committed[real], wanted[real], rtol=1e-3, atol=1e-3)
    assert torch.equal(peeked, committed)


def test_layers_of_different_sizes() -> None:
    cache = BlockCache(diffusion_gemma().config, 1, 4, torch.bfloat16)
    assert [tuple(layer.storage.k.shape) for layer in cache.layers] == [(1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 1, 16)]
    assert all(x.dtype == torch.bfloat16 for layer in cache.layers for x in layer.storage.kv)


def test_what_it_refuses() -> None:
    config = tiny("Llama").config
    cache = BlockCache(config, 2, 4)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected 2 rows, got 3"):
        cache.update(*states(1, rows=3), 0)
    cache.update(*states(3), 0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected at most 4 tokens, got 3 tokens and 2 more"):
        cache.update(*states(2), 0)
    with pytest.raises(NotImplementedError, match=r"^twotower BlockCache: it has no gradient"):
        cache.update(states(1)[0].requires_grad_(), states(1)[1], 0)
    assert cache.get_seq_length(0) == 3
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected batch_size and room of at least 1"):
        BlockCache(config, 2, 0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected None or a page_size of at least 1, got 0"):
        BlockCache(config, 2, 4, page_size=0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected keys in torch.float32, got torch.float64"):
        cache.update(*(x.double() for x in states(1)), 0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected heads and widths of \(2, 8, 8\), got \(1, 8, 8\)"):
        cache.update(*(x[:, :1] for x in states(1)), 0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected to replace tokens that are in use"):
        cache.replace(*states(2), 0, 2)
    config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(NotImplementedError, match=r"^twotower BlockCache: layers of type indexed_attention are not served"):
        BlockCache(config, 2, 4)

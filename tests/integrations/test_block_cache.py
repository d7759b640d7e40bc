"""The cache that is written in place: as any other to a model, and what it refuses."""

from functools import cache as once

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import bidirectional_mask_function

from tests.integrations.tiny_models import diffusion_gemma, padded_batch, tiny
from twotower_kernels.integrations.transformers import BlockCache, register, replace, restore
from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.masks import mask

register()


@once
def tiny_llama() -> torch.nn.Module:
    return tiny("Llama")


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


STEP = st.one_of(
    st.tuples(st.sampled_from(["update", "peek"]), st.integers(1, 5)),
    st.tuples(st.sampled_from(["crop", "crop rows", "replace", "replace rows"]), st.integers(0, 7)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("reset"), st.none()),
)


@given(st.lists(STEP, max_size=9), st.sampled_from([None, 1, 3, 4]), st.booleans())
def test_any_sequence_of_calls(steps: list[tuple[str, object]], page_size: int | None, grow: bool) -> None:
    """Against lists of keys: what a step's queries see of rows of any lengths, in pages and in rows that grow."""
    cache = BlockCache(tiny_llama().config, 2, 3 if grow else 45, torch.float64, grow=grow, page_size=page_size)
    rows: list[list[Tensor]] = [[], []]  # of each, keys and values of its tokens, [2, Hkv, D]
    generator = torch.Generator().manual_seed(1)
    for name, number in steps:
        lengths = [len(row) for row in rows]
        if name in ("update", "peek", "replace", "replace rows"):
            tokens = number
            first: object = cache.get_query_offset()
            if name.startswith("replace"):
                tokens = min(3, *lengths)
                if not tokens:
                    continue
                starts = [min(number + row, length - tokens) for row, length in enumerate(lengths)]
                starts = starts if name.endswith("rows") else [min(starts)] * 2
                first = torch.tensor(starts)[:, None] if name.endswith("rows") else starts[0]
            q, *kv = torch.randn(3, 2, 4, tokens, 8, generator=generator, dtype=torch.float64)
            k, v = (x[:, :2] for x in kv)
            new = [[torch.stack([k[b, :, t], v[b, :, t]]) for t in range(tokens)] for b in range(2)]
            if name.startswith("replace"):
                place = torch.tensor(starts) if name.endswith("rows") else starts[0]
                seen, kinds = cache.replace(k, v, 0, place), (False, True)
                rows = [row[:at] + own + row[at + tokens :] for row, own, at in zip(rows, new, starts, strict=True)]
                found = rows
            else:
                starts, kinds = lengths, (True, False)
                seen = getattr(cache, name)(k, v, 0)
                found = [row + own for row, own in zip(rows, new, strict=True)]
                rows = found if name == "update" else rows
            for causal in kinds:
                pattern = {} if causal else {"mask_function": bidirectional_mask_function}
                made = mask(2, tokens, seen[0].shape[2], q_offset=first, **pattern)
                out, _ = attention(torch.nn.Module(), q, *seen, made)
                for b, row in enumerate(found):
                    for t in range(tokens):
                        keys, values = torch.stack(row[: starts[b] + t + 1] if causal else row).unbind(1)
                        logits = torch.einsum("hd,nhd->hn", q[b, :, t], keys.repeat_interleave(2, 1)) * 8**-0.5
                        wanted = torch.einsum("hn,nhd->hd", logits.softmax(1), values.repeat_interleave(2, 1))
                        torch.testing.assert_close(out[b, t], wanted)
        elif name == "crop":
            number = min(number, *lengths)
            cache.layers[0].crop(-number)
            rows = [row[: len(row) - number] for row in rows]
        elif name == "crop rows":
            numbers = [min(number, lengths[0]), min(number // 2, lengths[1])]
            cache.layers[0].crop(-torch.tensor(numbers))
            rows = [row[: len(row) - n] for row, n in zip(rows, numbers, strict=True)]
        elif name == "select":
            cache.layers[0].batch_select_indices(torch.tensor(number))
            rows = [list(rows[i]) for i in number]
        else:
            cache.reset()
            rows = [[], []]
        assert cache.lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("page_size", [None, 4])
def test_rows_of_different_lengths(name: str, page_size: int | None) -> None:
    """Prompts of 5, 9 and 2 tokens, each from its first place on, then two blocks: logits as of each row alone."""
    model = tiny(name)
    model.set_attn_implementation("twotower")
    lengths, tokens = torch.tensor([5, 9, 2]), torch.randint(2, 97, (3, 17), generator=torch.Generator().manual_seed(0))
    cache = BlockCache(model.config, 3, 12, page_size=page_size, grow=True)
    with torch.no_grad():
        model(tokens[:, :9], past_key_values=cache)  # what is beyond a row's length is written over
        cache.crop(lengths - 9)
        for begin in (0, 4):
            at = lengths[:, None] + begin + torch.arange(4)
            block = tokens.gather(1, at)
            with pytest.raises(NotImplementedError, match=r"^twotower BlockCache: rows of different lengths"):
                model(block, past_key_values=cache)
            found = model(block, position_ids=at, past_key_values=cache).logits
            for b, length in enumerate(lengths.tolist()):
                wanted = model(tokens[b : b + 1, : length + begin + 4], use_cache=False).logits[0, -4:]
                torch.testing.assert_close(found[b], wanted, rtol=1e-3, atol=1e-3)
        assert cache.lengths.tolist() == [13, 17, 10]
        model.set_attn_implementation("eager")
        with pytest.raises((NotImplementedError, RuntimeError)):
            model(block, position_ids=at, past_key_values=cache)


def test_a_dual_cache() -> None:
    """A model without a causal mask: a block's keys written over its own among those of the whole text."""
    model = tiny("Llama", is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("twotower")
    tokens, block = torch.randint(2, 97, (2, 12)), torch.randint(2, 97, (2, 4))
    cache = BlockCache(model.config, 2, 12)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        changed = torch.cat([tokens[:, :4], block, tokens[:, 8:]], 1)
        with cache.replacing(4):
            found = model(block, past_key_values=cache).logits
        assert cache.lengths.tolist() == [12, 12]
        first = model.model.layers[0]  # its keys depend on nothing but the tokens
        wanted = BlockCache(model.config, 2, 12)
        logits = model(changed, past_key_values=wanted).logits[:, 4:8]
        torch.testing.assert_close(cache.layers[0].keys, wanted.layers[0].keys)
        assert first.self_attn.layer_idx == 0 and not torch.allclose(cache.layers[1].keys, wanted.layers[1].keys)
        with cache.replacing(torch.tensor([4, 4])):  # by row
            again = model(block, position_ids=torch.arange(4, 8)[None], past_key_values=cache).logits
        torch.testing.assert_close(again, found)
        with cache.replacing(0):  # of the whole text
            torch.testing.assert_close(model(changed, past_key_values=cache).logits[:, 4:8], logits)


def test_beams_share_pages() -> None:
    """A beam search gives the tokens of a dynamic cache, and rows of one prompt hold its pages once."""
    model, (ids, padding) = tiny("Mistral"), padded_batch()
    model.set_attn_implementation("twotower")
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8, "attention_mask": padding}
    wanted = model.generate(ids, **options)
    for page_size in (None, 2):
        cache = BlockCache(model.config, 9, 19, page_size=page_size)
        assert torch.equal(model.generate(ids, **options, past_key_values=cache), wanted)
    cache = BlockCache(model.config, 3, 16, page_size=4)
    with torch.no_grad():
        model(ids, attention_mask=padding, past_key_values=cache)
    cache.batch_repeat_interleave(4)
    pages = cache.layers[0].storage
    assert len(pages.rows) == 12 and sum(users > 0 for users in pages.users) == 9
    cache.update(*states(1, rows=12), 0)  # the third page is half full
    assert sum(users > 0 for users in pages.users) == 18


def test_recurrent_layers() -> None:
    """Nemotron-H: a peek leaves its states as they were, for blocks of several tokens and of one."""
    model, (ids, padding) = tiny("NemotronH"), padded_batch()
    model.set_attn_implementation("twotower")
    cache, other = BlockCache(model.config, 3, 11), DynamicCache(config=model.config)
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 10), (10, 11)):
            call = {"input_ids": ids[:, begin:end], "attention_mask": padding[:, :end]}
            with cache.peeking():
                peeked = [model(**call, past_key_values=cache).logits for _ in range(2)]
            wanted = model(**call, past_key_values=other).logits
            for found in (*peeked, model(**call, past_key_values=cache).logits):
                real = padding[:, begin:end].bool()
                torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    for refused in (lambda: cache.crop(-1), lambda: cache.replacing(1).__enter__()):
        with pytest.raises(NotImplementedError, match=r"^twotower BlockCache: .* recurrent layer"):
            refused()


@pytest.mark.parametrize("padded", [False, True])
def test_diffusion_gemma(padded: bool) -> None:
    """By its own `generate`: the tokens of a dynamic cache, also where the decoder writes behind the context in place,
    and into pages, which nothing concatenates."""
    model, (ids, padding) = diffusion_gemma(), padded_batch()
    padding = padding if padded else torch.ones_like(padding)
    model.set_attn_implementation("twotower")

    def generated(**options: object) -> Tensor:
        torch.manual_seed(1)
        return model.generate(input_ids=ids, attention_mask=padding, max_new_tokens=16, **options).sequences

    wanted = generated()
    assert torch.equal(generated(past_key_values=BlockCache(model.config, 3, 40)), wanted)
    with pytest.raises(NotImplementedError, match=r"^twotower BlockCache: pages .* computes aten.cat"):
        generated(past_key_values=BlockCache(model.config, 3, 40, page_size=4))
    swaps = replace(model, norms=False, routers=False, sampler=False)
    names = [swap.name for swap in swaps if swap.swapped]
    assert names == [f"model.decoder.layers.{n}.self_attn.append_to_cache" for n in range(3)]
    for page_size in (None, 4):
        cache = BlockCache(model.config, 3, 4, grow=True, page_size=page_size)
        assert torch.equal(generated(past_key_values=cache), wanted)
    assert torch.equal(generated(), wanted)
    restore(model)
    assert not any("append_to_cache" in vars(module) for module in model.modules())


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
    with pytest.raises(
        ValueError, match=r"^twotower BlockCache: expected heads and widths of \(2, 8, 8\), got \(1, 8, 8\)"
    ):
        cache.update(*(x[:, :1] for x in states(1)), 0)
    with pytest.raises(ValueError, match=r"^twotower BlockCache: expected to replace tokens that are in use"):
        cache.replace(*states(2), 0, 2)
    config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(
        NotImplementedError, match=r"^twotower BlockCache: layers of type indexed_attention are not served"
    ):
        BlockCache(config, 2, 4)

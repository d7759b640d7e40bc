"""Models of transformers give the same logits and the same tokens with these kernels as with its own."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.integrations.tiny_models import MODELS, PACKED, diffusion_gemma, padded_batch, tiny
from twotower_kernels.integrations.transformers import BlockCache, register, replace, restore
from twotower_kernels.integrations.transformers.experts import experts

register()
NEW_TOKENS = 12


def ours(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("twotower")
    model.set_experts_implementation("twotower")
    return model


def theirs(model: PreTrainedModel, attention: str = "eager") -> PreTrainedModel:
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager")
    return model


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found if mask is None else found[mask.bool()]


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "no_repeat_ngram_size": 1} | options  # no token twice
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens(name: str) -> None:
    model, (ids, mask) = theirs(tiny(name)), padded_batch()
    wanted = logits(model, ids, mask), logits(model, ids)
    tokens = generated(model, ids, mask)
    assert len({tuple(row) for row in tokens[:, ids.shape[1] :].tolist()}) == len(ids)  # each row says its own
    swaps = replace(ours(model), norms=False, routers=False, mixers=False)
    assert any(swap.swapped for swap in swaps) == (name in PACKED)
    torch.testing.assert_close(logits(model, ids, mask), wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model, ids), wanted[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(generated(model, ids, mask), tokens)
    assert torch.equal(generated(model, ids, mask, cache_implementation="static"), tokens)
    for page_size in (None, 4):
        cache = BlockCache(model.config, *ids.shape[:1], ids.shape[1] + NEW_TOKENS, page_size=page_size)
        assert torch.equal(generated(model, ids, mask, past_key_values=cache), tokens)


@pytest.mark.parametrize("padded", [False, True])
def test_diffusion_gemma(padded: bool) -> None:
    """Its encoder and decoder by its own `generate`, whose eager masks fail; with a static cache its decoder sees other
    keys, in transformers itself, and so other tokens come."""
    model, (ids, mask) = diffusion_gemma(), padded_batch()
    mask = mask if padded else torch.ones_like(mask)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = []
        for choose in (lambda: theirs(model, "sdpa"), lambda: ours(model)):
            choose()
            torch.manual_seed(1)
            found.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, **cache).sequences)
        assert torch.equal(*found) and len(found[0][:, ids.shape[1] :].unique()) > 8


@pytest.mark.parametrize("name", ["GptOss", "Mixtral"])
def test_experts_are_packed_and_restored(name: str) -> None:
    model, (ids, mask) = theirs(tiny(name)), padded_batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = logits(model, ids, mask)
    swaps = replace(model, norms=False, routers=False)
    assert [swap.name for swap in swaps] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    if name in PACKED:
        assert all(swap.swapped and swap.why == "its layout was transposed and interleaved" for swap in swaps)
        again = replace(model, norms=False, routers=False)
        assert [(swap.swapped, swap.why) for swap in again] == 2 * [(False, "it is packed already")]
        with pytest.raises(ValueError, match=r"^twotower replace: the weights of GptOssExperts are packed"):
            model.state_dict()
        with pytest.raises(ValueError, match=r"^twotower replace: the weights of GptOssExperts are packed"):
            model.load_state_dict(before)
    else:
        assert not any(swap.swapped for swap in swaps) and swaps[0].why == "its layout is served as it is"
    torch.testing.assert_close(logits(model, ids, mask), wanted, rtol=1e-3, atol=1e-3)  # whatever is set
    restore(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits(model, ids, mask), wanted)


@pytest.mark.parametrize(
    "kind", ["minimax_m3_vl.MiniMaxM3VLExperts", "openai_privacy_filter.OpenAIPrivacyFilterExperts"]
)
def test_other_clamped_experts(kind: str) -> None:
    """Gate rows first, and transposed or not."""
    family, name = kind.split(".")
    sizes = {
        "num_local_experts": 4,
        "hidden_size": 16,
        "intermediate_size": 12,
        "swiglu_alpha": 1.5,
        "swiglu_limit": 0.7,
    }
    module = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)(
        SimpleNamespace(**sizes, _experts_implementation="eager")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x, weights = torch.randn(9, 16, generator=generator), torch.rand(9, 2, generator=generator)
    choice = torch.randint(4, (9, 2), generator=generator)
    wanted = module(x, choice, weights)
    replace(module)
    module.config._experts_implementation = "twotower"
    torch.testing.assert_close(module(x, choice, weights), wanted)


def test_absent_experts_add_nothing() -> None:
    """The index E marks an expert of another process."""
    module = tiny("Qwen3Moe").model.layers[0].mlp.experts
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    choice = torch.tensor([[0, 6], [6, 6], [1, 2]])
    kept = weights.masked_fill(choice == 6, 0)
    torch.testing.assert_close(experts(module, x, choice, weights), experts(module, x, choice.clamp(max=5), kept))


@pytest.mark.parametrize(("name", "fullgraph"), [("Llama", True), ("Qwen3Moe", True), ("Mistral", False)])
def test_compiled(name: str, fullgraph: bool) -> None:
    """A sliding pattern is a closure, which a trace cannot look into: its mask is made between two graphs."""
    model, (ids, mask) = tiny(name), padded_batch()
    wanted = logits(theirs(model), ids, mask)
    compiled = torch.compile(ours(model), fullgraph=fullgraph, backend="eager")
    torch.testing.assert_close(logits(compiled, ids, mask), wanted, rtol=1e-3, atol=1e-3)

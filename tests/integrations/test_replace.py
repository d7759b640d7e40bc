"""Models give the same logits and tokens after `replace`, and the same bits again after `restore`."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.integrations.test_transformers import generated, logits, ours, theirs
from tests.integrations.tiny_models import HYBRID, MODELS, PACKED, diffusion_gemma, padded_batch, tiny
from twotower_kernels.integrations.transformers import Swap, register, replace, restore

register()


def kinds_swapped(model: PreTrainedModel, swaps: list[Swap]) -> set[str]:
    return {type(model.get_submodule(swap.name)).__name__ for swap in swaps if swap.swapped}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.thorough) for name in HYBRID)])
def test_logits_and_tokens(name: str) -> None:
    model, (ids, mask) = theirs(tiny(name)), padded_batch()
    wanted = logits(model, ids, mask), logits(model, ids)
    tokens = generated(model, ids, mask)
    keys = list(model.state_dict())
    swaps = replace(model)
    assert all(swap.swapped for swap in swaps if not swap.name.endswith("experts") and "computes it" not in swap.why)
    parts = {type(module).__name__ for module in model.modules()}
    assert kinds_swapped(model, swaps) >= {kind for kind in parts if kind.endswith(("RMSNorm", "outer", "Mixer"))}
    if name not in PACKED:
        assert list(model.state_dict()) == keys
    for choose in (theirs, ours):
        model = choose(model)
        torch.testing.assert_close(logits(model, ids, mask), wanted[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits(model, ids), wanted[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(generated(model, ids, mask), tokens)
    assert torch.equal(generated(model, ids, mask, cache_implementation="static"), tokens)
    assert not any(swap.swapped for swap in replace(model))
    restore(theirs(model))
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids, mask), wanted[0]) and torch.equal(logits(model, ids), wanted[1])


def test_diffusion_gemma() -> None:
    """By its own `generate`: the sampler draws by the same generator."""
    model, (ids, mask) = theirs(diffusion_gemma(), "sdpa"), padded_batch()

    def run(**options: object) -> Tensor:
        torch.manual_seed(1)
        options |= {"max_new_tokens": 16, "max_denoising_steps": 5}
        return model.generate(input_ids=ids, attention_mask=mask, **options).sequences

    static = {"cache_implementation": "static", "disable_compile": True}
    wanted = run(), run(**static)
    swaps = [swap for swap in replace(model) if not swap.name.endswith("append_to_cache")]
    assert kinds_swapped(model, swaps[1:]) == {
        "DiffusionGemmaRMSNorm",
        "DiffusionGemmaTextRouter",
        "Gemma4RMSNorm",
    }
    assert swaps[0] == Swap("generate", True, "EntropyBoundSampler over remask")
    ours(model)
    assert torch.equal(run(), wanted[0]) and torch.equal(run(**static), wanted[1])
    restore(theirs(model, "sdpa"))
    assert torch.equal(run(), wanted[0]) and "_prepare_sampler" not in vars(model)


def test_what_is_asked_for() -> None:
    model = tiny("NemotronH")
    none = {"norms": False, "routers": False, "mixers": False, "experts": False}
    assert replace(model, **none) == []
    for part, kinds in {
        "norms": {"NemotronHRMSNorm", "NemotronHRMSNormGated"},  # which stands alone where the mixer is left
        "routers": {"NemotronHTopkRouter"},
        "mixers": {"NemotronHMamba2Mixer"},
    }.items():
        assert kinds_swapped(model, replace(model, **none | {part: True})) == kinds
        restore(model)


def test_a_gated_norm_alone() -> None:
    model, (ids, mask) = theirs(tiny("NemotronH")), padded_batch()
    wanted = logits(model, ids, mask)
    assert any(swap.why == "gated_rms_norm, rounded first" for swap in replace(model, mixers=False))
    torch.testing.assert_close(logits(model, ids, mask), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "GptOss", "Ernie4_5_Moe"])
def test_router_logits_are_recorded(name: str) -> None:
    model, (ids, _) = theirs(tiny(name)), padded_batch()
    call = {"input_ids": ids, "output_router_logits": True, "labels": ids}
    with torch.no_grad():
        wanted = model(**call)
        replace(model)
        found = model(**call)
    assert len(found.router_logits) == 2
    for x, y in zip(found.router_logits, wanted.router_logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)  # dtype and shape, too
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss)


def test_weights_that_come_later() -> None:
    """What was swapped reads its module's weights at each call, and a copy its own."""
    model, (ids, mask) = theirs(tiny("NemotronH")), padded_batch()
    other = theirs(tiny("NemotronH"))
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    wanted = logits(model, ids, mask), logits(other, ids, mask)
    replace(model)
    twin = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, ids, mask), wanted[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(twin, ids, mask), wanted[0], rtol=1e-3, atol=1e-3)
    restore(twin)
    assert torch.equal(logits(twin, ids, mask), wanted[0])


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Bamba"])
def test_gradients_are_refused(name: str) -> None:
    model, (ids, _) = theirs(tiny(name)), padded_batch()
    replace(model.train())
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with pytest.raises(NotImplementedError, match=r"^twotower::\w+ is not differentiable"):
        loss.backward()


def test_a_forward_of_its_own_is_left() -> None:
    model = tiny("Llama")
    norm = model.model.norm
    norm.forward = norm.forward
    swap = next(swap for swap in replace(model) if swap.name == "model.norm")
    assert not swap.swapped and swap.why.startswith("LlamaRMSNorm has been given a forward already")
    restore(model)
    assert "forward" in vars(norm)


def test_attention_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code with attention of its own: `set_attn_implementation` returns, and nothing changes."""
    remote = ModuleType("transformers_modules.some.modeling_some")
    monkeypatch.setitem(sys.modules, remote.__name__, remote)
    source = """
import torch
class SomeAttention(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)
class OtherAttention(torch.nn.Module):
    def forward(self, x):
        return ALL_ATTENTION_FUNCTIONS["twotower"](self, x)
class SomeRMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x)
"""
    exec(source, vars(remote))
    model = nn.Sequential(remote.SomeAttention(), remote.OtherAttention(), remote.SomeRMSNorm())
    why = "SomeAttention, remote code, does not ask which attention is set: set_attn_implementation has no effect on it"
    assert replace(model) == [Swap("0", False, why), Swap("2", True, "rms_norm, rounded first")]
    assert not any(swap.name.endswith("self_attn") for swap in replace(tiny("Llama")))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe", "Bamba"])
def test_compiled(name: str) -> None:
    model, (ids, mask) = tiny(name), padded_batch()
    wanted = logits(theirs(model), ids, mask)
    replace(ours(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, ids, mask), wanted, rtol=1e-3, atol=1e-3)

"""Which form of RMSNorm a module has is found by computing; what has none is left."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from twotower_kernels.integrations.transformers import replace, restore
from twotower_kernels.integrations.transformers.norms import Norm, norm_of
from twotower_kernels.integrations.transformers.swap import NotServed

# A class of each form there is in transformers, and the form.
FORMS = {
    "llama.LlamaRMSNorm": Norm(1e-6, "plain", True),
    "gpt_oss.GptOssRMSNorm": Norm(1e-6, "plain", False),
    "nemotron_h.NemotronHRMSNorm": Norm(1e-6, "plain", False),
    "gemma2.Gemma2RMSNorm": Norm(1e-6, "one_more", False),
    "gemma3n.Gemma3nRMSNorm": Norm(1e-6, "plain", False),
    "llama4.Llama4TextRMSNorm": Norm(1e-5, "plain", True),
    "t5.T5LayerNorm": Norm(1e-6, "plain", True, mixed=False),
    "bamba.BambaRMSNormGated": Norm(1e-6, "plain", True, groups=3),
    "falcon_h1.FalconH1RMSNormGated": Norm(1e-6, "plain", False, groups=3),
}
ARGUMENTS = {
    "bamba.BambaRMSNormGated": {"group_size": 8},
    "falcon_h1.FalconH1RMSNormGated": {"n_groups": 3, "norm_before_gate": False},
}


def norm(kind: str, **more: object) -> nn.Module:
    family, name = kind.split(".")
    of_family = import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(of_family, name)(24, **ARGUMENTS.get(kind, {}) | more)
    module.weight.data = torch.randn(24, generator=torch.Generator().manual_seed(0))
    return module


def inputs(form: Norm, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = torch.logspace(-3, 2, 40)[:, None]
    return [(torch.randn(3, 40, 24, generator=generator) * size).to(dtype) for _ in range(1 + bool(form.groups))]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weight", [None, torch.float32])
def test_forms(kind: str, dtype: torch.dtype, of_weight: torch.dtype | None) -> None:
    """The numbers of the original, rounding included: what differs in float32's last digits rarely shows."""
    module, form = norm(kind).to(of_weight or dtype), FORMS[kind]
    given = inputs(form, dtype)
    with torch.no_grad():
        wanted = module(*given)
        assert replace(module) == [("", True, form.why)] and norm_of(norm(kind)) == form
        if of_weight is not None and of_weight != dtype and not form.mixed:
            with pytest.raises(NotImplementedError, match=r"^twotower T5LayerNorm: a weight in torch.float32"):
                module(*given)
            return
        found = module(*given)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=8e-3 if found.dtype != torch.float32 else 2e-6, atol=1e-6)
        if dtype != torch.float32:
            assert (found != wanted).float().mean() < 0.01
        restore(module)
        assert torch.equal(module(*given), wanted)


class ShiftedRMSNorm(nn.Module):
    """RMSNorms with a little more."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight, self.eps, self.what = nn.Parameter(torch.ones(16)), 1e-6, what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "mean":
            x = x - x.mean(-1, keepdim=True)
        root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps * (10 if self.what == "eps" else 1))
        return (x * root * self.weight.abs() ** (0.9 if self.what == "power" else 1.0)).to(x.dtype)


@pytest.mark.parametrize("what", ["mean", "eps", "power", "abs"])
def test_what_computes_something_else_is_left(what: str) -> None:
    """Also where the weights at hand, ones, would not show it."""
    assert replace(ShiftedRMSNorm(what)) == [("", False, "ShiftedRMSNorm computes something else than an RMSNorm")]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.LayerNorm(8), "LayerNorm is not an RMSNorm with an eps and at most a weight [H]"),
        (nn.LayerNorm(8, bias=False), "LayerNorm computes something else than an RMSNorm"),
        (nn.RMSNorm(8), "RMSNorm is not an RMSNorm with an eps and at most a weight [H]"),  # whose eps is the dtype's
        (nn.RMSNorm((4, 8), eps=1e-6), "RMSNorm is not an RMSNorm with an eps and at most a weight [H]"),
        (nn.BatchNorm1d(8), "BatchNorm1d is not an RMSNorm with an eps and at most a weight [H]"),
        (
            norm("falcon_h1.FalconH1RMSNormGated", norm_before_gate=True),
            "FalconH1RMSNormGated computes something else than an RMSNorm",
        ),
    ],
)
def test_other_norms_are_left(module: nn.Module, why: str) -> None:
    with pytest.raises(NotServed) as error:
        norm_of(module)
    assert str(error.value) == why


def test_gates() -> None:
    gated, plain = norm("bamba.BambaRMSNormGated"), norm("llama.LlamaRMSNorm")
    x = torch.randn(2, 3, 24)
    replace(nn.Sequential(gated, plain))
    with pytest.raises(NotImplementedError, match=r"^twotower BambaRMSNormGated: expected a gate"):
        gated(x)
    with pytest.raises(NotImplementedError, match=r"^twotower LlamaRMSNorm: expected no gate"):
        plain(x, x)


def test_without_weights_at_hand() -> None:
    """The weights are neither read nor needed: a model may be swapped before they are there."""
    with torch.device("meta"):
        module = nn.Sequential(nn.RMSNorm(12, eps=1e-6))
    assert replace(module)[0].swapped
    module.to_empty(device="cpu")[0].weight.data.fill_(2)
    x = torch.randn(4, 12)
    torch.testing.assert_close(module(x), nn.functional.rms_norm(x, (12,), torch.full((12,), 2.0), 1e-6))

"""Routers give the choice, the weights and the logits of the original, each in its dtype; others are left."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from twotower_kernels.integrations.transformers import replace, restore
from twotower_kernels.integrations.transformers.routers import KNOWN

EXPERTS = 12
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 3),
    **{"hidden_size": 24, "norm_topk_prob": True, "n_group": 3, "topk_group": 2, "moe_norm_min": 1e-12},
    **{"routed_scaling_factor": 2.5, "router_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "topk_method": "noaux_tc"},
}
COMMON = {
    *("DeepseekV3TopkRouter", "DiffusionGemmaTextRouter", "Ernie4_5_MoeTopKRouter", "GptOssTopKRouter"),
    *("GraniteMoeTopKRouter", "JambaTopKRouter", "MiniMaxM2TopKRouter", "Mistral4TopkRouter", "MixtralTopKRouter"),
    *("NemotronHTopkRouter", "OlmoeTopKRouter", "Qwen3MoeTopKRouter"),
}


@cache
def families() -> dict[str, str]:
    """The module of each class of a router."""
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^class (\w+Router)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def router(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    module = getattr(import_module(families()[kind]), kind)(SimpleNamespace(**SIZES | more))
    generator = torch.Generator().manual_seed(0)
    for x in (*module.parameters(), *module.buffers()):
        x.data = (torch.randn(x.shape, generator=generator) / 4).to(dtype)
    return module.eval()


def call(module: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    given = [rows]
    if type(module).__name__ in ("Dots3NoteVisionTopKRouter", "HYV3TopKRouter", "MiniMaxM2TopKRouter"):
        given.append(torch.linspace(-0.5, 0.5, EXPERTS))
    with torch.no_grad():
        return module(*given)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in COMMON else pytest.mark.thorough) for kind in sorted(KNOWN)]
)
def test_routers(kind: str) -> None:
    for more in ({}, {"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1}):
        module = router(kind, **more)
        rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
        wanted = call(module, rows)
        assert replace(module)[0] == ("", True, "moe_gate and moe_route")
        found = call(module, rows)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        weights = [torch.zeros(200, EXPERTS).scatter(1, result[2], result[1]) for result in (found, wanted)]
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
        restore(module)
        assert all(torch.equal(x, y) for x, y in zip(call(module, rows), wanted, strict=True))
    narrow = router(kind, torch.bfloat16)
    wanted = call(narrow, rows.bfloat16())
    replace(narrow)
    for x, y in zip(call(narrow, rows.bfloat16()), wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape


def test_the_choice_is_not_left_to_rounding() -> None:
    """In bfloat16 two experts' logits may round to one number; the better one is chosen all the same."""
    module = router("Qwen3MoeTopKRouter", torch.bfloat16)
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    replace(module)
    best = (rows.double() @ module.weight.double().T).topk(3).indices
    assert torch.equal(call(module, rows)[2], best)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Cohere2MoeTopKRouter", {"expert_selection_fn": "softmax"}),
        ("DeepseekV2TopkRouter", {}),
        ("Llama4Router", {}),
    ],
)
def test_unknown_routers_are_left(kind: str, more: dict[str, object]) -> None:
    assert replace(router(kind, **more)) == [("", False, f"{kind} is not known")]


def test_a_router_of_a_known_name_that_computes_something_else_is_left() -> None:
    class MixtralTopKRouter(type(router("MixtralTopKRouter"))):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, experts = super().forward(hidden_states)
            return logits, weights * 1.001, experts

    module = router("MixtralTopKRouter")
    module.__class__ = MixtralTopKRouter
    why = "MixtralTopKRouter computes something else than the router of that name"
    assert replace(module) == [("", False, why)]

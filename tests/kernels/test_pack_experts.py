"""`pack_experts`: every layout of checkpoints, and its refusals. The judge is `moe_experts` on what it packed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import twotower_kernels as tt
from twotower_kernels.reference import moe
from twotower_kernels.testing.budget import assert_within_budget, widened
from twotower_kernels.testing.drawing import DTYPES

E, H, I = 4, 6, 5  # noqa: E741


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


GATE, UP, DOWN = drawn(E, I, H), drawn(E, I, H) + 1, drawn(E, H, I)
FUSED = torch.cat([GATE, UP], 1)
ALTERNATING = torch.stack([GATE, UP], 2).flatten(1, 2)  # rows g0 u0 g1 u1 ...


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "separate": lambda: tt.pack_experts(GATE, UP, DOWN),
    "lists": lambda: tt.pack_experts(list(GATE), list(UP), list(DOWN)),
    "lists and stacks": lambda: tt.pack_experts(tuple(GATE), UP, list(DOWN)),
    "in one": lambda: tt.pack_experts(FUSED, None, DOWN),
    "a list of both in one": lambda: tt.pack_experts(list(FUSED), None, DOWN),
    "interleaved": lambda: tt.pack_experts(ALTERNATING, None, DOWN, interleaved=True),
    "transposed": lambda: tt.pack_experts(turned(GATE), turned(UP), turned(DOWN), transposed=True),
    "transposed lists": lambda: tt.pack_experts(
        list(turned(GATE)), list(turned(UP)), list(turned(DOWN)), transposed=True
    ),
    "transposed in one": lambda: tt.pack_experts(turned(FUSED), None, turned(DOWN), transposed=True),
    "of gpt-oss": lambda: tt.pack_experts(turned(ALTERNATING), None, turned(DOWN), interleaved=True, transposed=True),
    "views that are turned": lambda: tt.pack_experts(
        turned(GATE).transpose(1, 2), turned(UP).transpose(1, 2), turned(DOWN).transpose(1, 2)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    w_up, w_down = LAYOUTS[layout]()
    assert torch.equal(w_up, FUSED) and torch.equal(w_down, DOWN)
    assert w_up.is_contiguous() and w_down.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_a_gate(transposed: bool) -> None:
    up, down = (turned(UP), turned(DOWN)) if transposed else (UP, DOWN)
    for given in (up, list(up)):
        w_up, w_down = tt.pack_experts(None, given, down, transposed=transposed)
        assert torch.equal(w_up, UP) and torch.equal(w_down, DOWN)


def test_what_lies_well_is_not_copied() -> None:
    w_up, w_down = tt.pack_experts(FUSED, None, DOWN)
    assert w_up.data_ptr() == FUSED.data_ptr() and w_down.data_ptr() == DOWN.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    for packed in tt.pack_experts(GATE.to(dtype), UP.to(dtype), list(DOWN.to(dtype))):
        assert packed.dtype == dtype


def test_gradients_pass() -> None:
    leaves = [x.double().requires_grad_() for x in (GATE, UP, DOWN)]
    assert torch.autograd.gradcheck(lambda *x: tt.pack_experts(*x), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt_oss_experts_dropped_in(dtype: torch.dtype) -> None:
    """transformers' layer and ours from its own parameters; gates beyond the limit are among them."""
    config = SimpleNamespace(
        intermediate_size=20,
        num_local_experts=8,
        hidden_size=16,
        swiglu_alpha=1.702,
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    layer = GptOssExperts(config).requires_grad_(False).to(dtype)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    x = drawn(33, 16).to(dtype)
    weights, experts = tt.moe_route(drawn(33, 8).to(dtype), top_k=3, score="softmax")
    w_up, w_down = tt.pack_experts(layer.gate_up_proj, None, layer.down_proj, interleaved=True, transposed=True)
    bias = layer.gate_up_proj_bias
    arguments: dict[str, Any] = dict(
        x=x,
        w_up=w_up,
        w_down=w_down,
        weights=weights,
        experts=experts,
        up_bias=torch.cat([bias[:, ::2], bias[:, 1::2]], 1),
        down_bias=layer.down_proj_bias,
        activation="clamped_gated",
        alpha=config.swiglu_alpha,
        limit=config.swiglu_limit,
    )
    theirs = layer(x, experts.long(), weights)
    assert_within_budget(tt.moe_experts(**arguments), theirs, moe.moe_experts(**widened(arguments)))
    unclamped = tt.moe_experts(**arguments | {"limit": 100.0})
    assert (unclamped - theirs).abs().max() > 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.pack_experts(GATE, UP, turned(DOWN)), ValueError, r"expected \[4, 6, 5\] for down .*=False"),
        (lambda: tt.pack_experts(GATE, UP, turned(DOWN), transposed=True), ValueError, "down .*=True, got"),
        (lambda: tt.pack_experts(FUSED, None, DOWN, transposed=True), ValueError, "for down .*=True, got"),
        (lambda: tt.pack_experts(turned(FUSED), None, turned(DOWN)), ValueError, "for down .* with transposed=False"),
        (lambda: tt.pack_experts(GATE, None, DOWN), ValueError, r"gate: expected \[4, 10, 6\] .* got \[4, 5, 6\]"),
        (lambda: tt.pack_experts(None, FUSED, DOWN), ValueError, r"up: expected \[4, 5, 6\] .* got \[4, 10, 6\]"),
        (lambda: tt.pack_experts(GATE[:3], UP, DOWN), ValueError, r"gate: expected \[4, 5, 6\] .* got \[3, 5, 6\]"),
        (lambda: tt.pack_experts(GATE, UP[:, 1:], DOWN), ValueError, r"up: expected \[4, 5, 6\] .* got \[4, 4, 6\]"),
        (lambda: tt.pack_experts(FUSED[:, 1:], None, DOWN, interleaved=True), ValueError, r"\[4, 10, 6\] .* 9, 6\]"),
        (lambda: tt.pack_experts(GATE, UP, DOWN, interleaved=True), ValueError, "interleaved: expected .* in one"),
        (lambda: tt.pack_experts(None, UP, DOWN, interleaved=True), ValueError, "interleaved: expected .* in one"),
        (lambda: tt.pack_experts(None, None, DOWN), ValueError, "expected down, and gate or up, got down"),
        (lambda: tt.pack_experts(GATE, UP, None), ValueError, "expected down, and gate or up, got gate and up"),
        (lambda: tt.pack_experts([], [], []), ValueError, r"gate: expected a matrix for every expert, .* got \[\]"),
        (lambda: tt.pack_experts([GATE[0], GATE[1, 1:]], UP, DOWN), ValueError, "gate: expected a matrix for every"),
        (lambda: tt.pack_experts(GATE[0], UP[0], DOWN[0]), ValueError, r"gate: expected matrices \[E, rows, columns\]"),
        (lambda: tt.pack_experts(GATE, UP.half(), DOWN), TypeError, "up: expected torch.float32 as gate, got torch.fl"),
        (lambda: tt.pack_experts([GATE[0], GATE[1].half()], UP, DOWN), TypeError, r"gate\[1\]: expected torch.float32"),
        (lambda: tt.pack_experts(GATE, UP, DOWN.int()), TypeError, "down: expected torch.float32 as gate, got"),
        (lambda: tt.pack_experts(GATE, UP, DOWN.to("meta")), ValueError, "down: expected device cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_matrices_are_named(call, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_views_that_would_be_misread_are_refused() -> None:
    """By `moe_experts` itself, wherever the dimensions tell."""
    x, weights, experts = drawn(3, H), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    backward = tt.pack_experts(turned(GATE), turned(UP), turned(DOWN))  # H taken for I
    with pytest.raises(ValueError, match=r"w_up: expected \[E, 2I, 6\], got \[4, 12, 5\]"):
        tt.moe_experts(x, *backward, weights, experts, activation="silu_gated")
    for w_up, w_down in ((turned(FUSED), turned(DOWN)), (FUSED, turned(DOWN)), (turned(FUSED), DOWN)):
        with pytest.raises(ValueError, match=r"transposed, as it seems: tt\.pack_experts\(\.\.\., transposed=True\)"):
            tt.moe_experts(x, w_up, w_down, weights, experts, activation="silu_gated")
    with pytest.raises(ValueError, match=r"w_up: expected \[4, 10, 6\]"):
        tt.moe_experts(x, ALTERNATING[:, ::2], DOWN, weights, experts, activation="silu_gated")

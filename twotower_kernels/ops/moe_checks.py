"""What the mixture of experts' operators accept (`moe.py`)."""

from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops._library import check_alike, check_floats, check_index, same_device

# The order of Activation in csrc/cpu/moe.h: first those of one product, then those of a gate's and a value's.
PLAIN = ("relu2", "silu", "gelu", "gelu_tanh")
ACTIVATIONS = (*PLAIN, "silu_gated", "gelu_gated", "gelu_erf_gated", "clamped_gated")


def check_gate(x: Tensor, gate_weight: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, H], got {list(x.shape)}")
    if gate_weight.ndim != 2 or gate_weight.shape[1] != x.shape[1]:
        raise ValueError(f"gate_weight: expected [E, {x.shape[1]}], got {list(gate_weight.shape)}")
    check_floats(x, x=x, gate_weight=gate_weight)


def _check_choice(
    e: int,
    correction_bias: Tensor | None,
    per_expert_scale: Tensor | None,
    top_k: int,
    softmax: bool,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scaling: Any,
    exclude_dropped: bool,
) -> None:
    if n_group < 1 or e % n_group:
        raise ValueError(f"n_group: expected a divisor of {e} experts, got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: expected 1..{n_group} for {n_group} groups, got {topk_group}")
    if not 1 <= top_k <= e:
        raise ValueError(f"top_k: expected 1..{e} for {e} experts, got {top_k}")
    kept = e // n_group * topk_group
    if exclude_dropped and top_k > kept:
        raise ValueError(f"top_k: expected 1..{kept}, the experts of {topk_group} of {n_group} groups, got {top_k}")
    for name, vector in (("correction_bias", correction_bias), ("per_expert_scale", per_expert_scale)):
        if vector is not None and vector.shape != (e,):
            raise ValueError(f"{name}: expected shape {[e]}, got {list(vector.shape)}")


def check_route(logits: Tensor, correction_bias: Tensor | None, per_expert_scale: Tensor | None, *options: Any) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [N, E], got {list(logits.shape)}")
    _check_choice(logits.shape[1], correction_bias, per_expert_scale, *options)
    check_floats(logits, logits=logits, correction_bias=correction_bias, per_expert_scale=per_expert_scale)


def check_router(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor | None, per_expert_scale: Tensor | None, *options: Any
) -> None:
    check_gate(x, gate_weight)
    _check_choice(gate_weight.shape[0], correction_bias, per_expert_scale, *options)
    check_floats(x, correction_bias=correction_bias, per_expert_scale=per_expert_scale)


def _check_experts(experts: Tensor) -> None:
    if experts.ndim != 2:
        raise ValueError(f"experts: expected [N, k], got {list(experts.shape)}")
    check_index(experts=experts)


def check_number(experts: Tensor, num_experts: int) -> None:
    _check_experts(experts)
    if num_experts < 0:
        raise ValueError(f"num_experts: expected 0 or more, got {num_experts}")


def check_choices(x: Tensor, weights: Tensor, experts: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, H], got {list(x.shape)}")
    _check_experts(experts)
    if experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts: expected [{x.shape[0]}, k] for {x.shape[0]} tokens, got {list(experts.shape)}")
    if weights.shape != experts.shape:
        raise ValueError(f"weights: expected the experts' shape {list(experts.shape)}, got {list(weights.shape)}")


def check_matrices(up: tuple[str, Tensor], down: tuple[str, Tensor], stack: str, h: int, activation: str) -> None:
    """`up` is `[..., I or 2I, H]` and `down` `[..., H, I]`, stacked over experts or single."""
    (up_name, w_up), (down_name, w_down) = up, down
    factor = 1 if activation in PLAIN else 2
    ndim = 3 if stack else 2
    if w_up.ndim != ndim or w_up.shape[-1] != h:
        rows = "I" if factor == 1 else "2I"
        raise ValueError(f"{up_name}: expected [{stack}{rows}, {h}], got {list(w_up.shape)}{_hint(w_up, ndim, -2, h)}")
    if w_down.ndim != ndim or w_down.shape[-2] != h:
        got = f"{list(w_down.shape)}{_hint(w_down, ndim, -1, h)}"
        raise ValueError(f"{down_name}: expected [{stack}{h}, I], got {got}")
    if w_up.shape[:-1] != (*w_down.shape[:-2], factor * w_down.shape[-1]):
        fits = [*w_down.shape[:-2], factor * w_down.shape[-1], h]
        raise ValueError(f"{up_name}: expected {fits} for {down_name} {list(w_down.shape)}, got {list(w_up.shape)}")


def _hint(matrix: Tensor, ndim: int, dim: int, h: int) -> str:
    """Where a matrix has its H in the other dimension, how to turn it."""
    turned = matrix.ndim == ndim and matrix.shape[dim] == h
    return "; transposed, as it seems: tt.pack_experts(..., transposed=True) turns it" if turned else ""


def check_biases(w_up: Tensor, w_down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None) -> None:
    for name, bias, matrices in (("up_bias", up_bias, w_up), ("down_bias", down_bias, w_down)):
        if bias is not None and bias.shape != matrices.shape[:2]:
            raise ValueError(f"{name}: expected {list(matrices.shape[:2])}, got {list(bias.shape)}")


def check_plan(counts: Tensor | None, offsets: Tensor | None, pairs: Tensor | None, e: int, experts: Tensor) -> None:
    sizes = {"counts": (counts, e), "offsets": (offsets, e + 1), "pairs": (pairs, experts.numel())}
    if counts is None and offsets is None and pairs is None:
        return
    for name, (tensor, size) in sizes.items():
        if tensor is None:
            raise ValueError(f"plan.{name}: expected all three tensors of a plan or none, got None")
        if tensor.shape != (size,):
            raise ValueError(f"plan.{name}: expected shape {[size]}, got {list(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise TypeError(f"plan.{name}: expected torch.int64, got {tensor.dtype}")
    same_device(experts, counts=counts, offsets=offsets, pairs=pairs)


def check_mixture(*arguments: Any) -> None:
    """Arguments in the order of the schema, here and in the kernels."""
    x, w_up, w_down, weights, experts, counts, offsets, pairs, *others, activation, _, limit = arguments
    shared_up, shared_down, up_bias, down_bias = others
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    check_choices(x, weights, experts)
    check_matrices(("w_up", w_up), ("w_down", w_down), "E, ", x.shape[1], activation)
    if (shared_up is None) != (shared_down is None):
        raise ValueError("shared_up and shared_down: expected both or neither, got one")
    if shared_up is not None and shared_down is not None:
        check_matrices(("shared_up", shared_up), ("shared_down", shared_down), "", x.shape[1], activation)
    check_biases(w_up, w_down, up_bias, down_bias)
    shared = {"shared_up": shared_up, "shared_down": shared_down}
    check_alike("x", x, w_up=w_up, w_down=w_down, **shared, up_bias=up_bias, down_bias=down_bias)
    check_floats(x, weights=weights)
    if not limit >= 0:
        raise ValueError(f"limit: expected 0 or more, got {limit}")
    check_plan(counts, offsets, pairs, w_up.shape[0], experts)
    same_device(x, experts=experts)

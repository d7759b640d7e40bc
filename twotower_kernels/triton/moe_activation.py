"""What is between an expert's two products. Formulas: `reference/moe.py`."""

from __future__ import annotations

import triton
import triton.language as tl

RELU2 = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU_GATED = tl.constexpr(4)  # from here on, there is a gate beside the value
GELU_GATED = tl.constexpr(5)
GELU_ERF_GATED = tl.constexpr(6)
CLAMPED_GATED = tl.constexpr(7)
ACTIVATIONS = {
    "relu2": RELU2.value,
    "silu": SILU.value,
    "gelu": GELU.value,
    "gelu_tanh": GELU_TANH.value,
    "silu_gated": SILU_GATED.value,
    "gelu_gated": GELU_GATED.value,
    "gelu_erf_gated": GELU_ERF_GATED.value,
    "clamped_gated": CLAMPED_GATED.value,
}


@triton.jit
def _function(x, alpha, ACTIVATION: tl.constexpr):
    """SiLU, and GELU. The tanh form of GELU is x / (1 + exp(-2u)), without cancellation at negative u."""
    if (ACTIVATION == GELU) | (ACTIVATION == GELU_ERF_GATED):
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    z = x
    if (ACTIVATION == GELU_TANH) | (ACTIVATION == GELU_GATED):
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    if ACTIVATION == CLAMPED_GATED:
        z = alpha * x
    return x / (1 + tl.exp(-z))


@triton.jit
def activated(gate, value, alpha, limit, T: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rounded after every step. NaN stays NaN."""
    value = value.to(T).to(tl.float32)
    if ACTIVATION == RELU2:
        return tl.where(value < 0, 0, value * value).to(T)
    if ACTIVATION < SILU_GATED:
        return _function(value, alpha, ACTIVATION).to(T)
    gate = gate.to(T).to(tl.float32)
    if ACTIVATION == CLAMPED_GATED:
        limit = tl.cast(limit, tl.float32).to(T).to(tl.float32)
        gate = tl.where(gate > limit, limit, gate)
        value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
        value = (value + 1).to(T).to(tl.float32)
    return (_function(gate, alpha, ACTIVATION).to(T).to(tl.float32) * value).to(T)

"""RMSNorm, adaLN modulation and the gated residual.

    rms(x)          = x / sqrt(mean(x²) + eps) · w                      over the last dimension; also without w
    modulate_norm   : y = rms(x · (1 + scale) + shift)                  Mamba-2 and attention layers
    norm_modulate   : y = rms(x) · (1 + scale) + shift                  MoE and dense MLP layers
    gated residual  : h = r + gate · y

`shift`, `scale` and `gate` are one vector per sequence, `[B, H]`, for activations `[B, S, H]`: the adaLN-single
conditioning of PixArt-α (arXiv 2310.00426), after DiT (arXiv 2212.09748). RMSNorm: arXiv 1910.07467.
The norm is computed in float32 (float64 for float64 inputs) and rounded once. Modulation and residual round after every
operation to the activations' dtype, as when the model was trained: in bfloat16 that rounding is part of the definition.
"""

from typing import Any

import torch
from torch import Tensor

ORDERS = ("modulate_norm", "norm_modulate")


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    """A conditioning vector is `[B, H]` for `x [B, ..., H]`."""
    if vector is not None and vector.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"{name}: expected shape {(x.shape[0], x.shape[-1])}, got {tuple(vector.shape)}")


def _per_token(vector: Tensor, x: Tensor) -> Tensor:
    """`[B, H]` -> `[B, 1, ..., H]`, broadcastable against `x`, in its dtype."""
    return vector.to(x.dtype).reshape(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, round_first: bool = False) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467, eq. 4), the weight multiplied before rounding.

    Args:
        x: `[..., H]`, any floating dtype.
        weight: `[H]`, or None for 1.
        eps: added to the mean square.
        round_first: round what is normalised to the dtype of `x` before the weight multiplies it, and once more after.

    Returns:
        `[..., H]` in the dtype of `x`.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    acc = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    normed = acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).to(acc.dtype)
    return (normed if weight is None else normed * weight.to(acc.dtype)).to(x.dtype)


def adaln_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> Tensor:
    """RMSNorm with adaLN modulation before or after it; without `shift` and `scale`, plain RMSNorm.

    Args:
        x: `[B, S, H]`.
        weight: `[H]`.
        shift, scale: `[B, H]`, or both None.
        eps: of the norm.
        order: "modulate_norm" (`rms(x·(1+scale) + shift)`) or "norm_modulate" (`rms(x)·(1+scale) + shift`).

    Returns:
        `[B, S, H]` in the dtype of `x`.

    Raises:
        ValueError: unknown order, wrong shapes, or only one of shift and scale.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if (shift is None) != (scale is None):
        raise ValueError("shift and scale: expected both or neither")
    _check_vector("shift", shift, x)
    _check_vector("scale", scale, x)
    if shift is None or scale is None:
        return rms_norm(x, weight, eps=eps)
    shift, scale = _per_token(shift, x), _per_token(scale, x)
    if order == "modulate_norm":
        return rms_norm(x * (1 + scale) + shift, weight, eps=eps)
    return rms_norm(x, weight, eps=eps) * (1 + scale) + shift


def gated_residual(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """`residual + gate · y`, or `residual + y` without a gate.

    Args:
        residual: `[B, S, H]`; its dtype is the result's (it may be wider than `y`: `residual_in_fp32`).
        y: `[B, S, H]`.
        gate: `[B, H]` or None.
    """
    if y.shape != residual.shape:
        raise ValueError(f"y: expected the residual's shape {tuple(residual.shape)}, got {tuple(y.shape)}")
    _check_vector("gate", gate, y)
    return residual + (y if gate is None else _per_token(gate, y) * y)


def gated_residual_adaln_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> tuple[Tensor, Tensor]:
    """One layer's gated residual and the next layer's modulated norm, which kernels fuse.

    Returns:
        `(h, normed)` with `h = gated_residual(residual, y, gate)` and `normed = adaln_norm(h, weight, shift, scale)`;
        the norm reads `h` as rounded to the residual's dtype, so that fusing changes no bit of the definition.
    """
    h = gated_residual(residual, y, gate)
    return h, adaln_norm(h, weight, shift, scale, eps=eps, order=order)


_SIZES: dict[str, dict[str, int]] = {
    "one": dict(b=1, s=1, h=1),
    "empty_batch": dict(b=0, s=4, h=8),
    "empty_block": dict(b=2, s=0, h=8),
    "odd": dict(b=3, s=5, h=17),
    "block": dict(b=2, s=16, h=96),
    "released": dict(b=1, s=16, h=2688),
}
CASES: dict[str, dict[str, dict]] = {
    "rms_norm": _SIZES
    | {
        "unweighted": dict(b=2, s=3, h=33, weighted=False),
        "rounded_first": dict(b=2, s=16, h=96, round_first=True),
    },
    "adaln_norm": {
        f"{name}_{order}": dict(sizes, order=order) for name, sizes in _SIZES.items() for order in ("plain", *ORDERS)
    },
    "gated_residual": {
        f"{name}{'_gated' * gated}": dict(sizes, gated=gated) for name, sizes in _SIZES.items() for gated in (0, 1)
    },
    "gated_residual_adaln_norm": {
        f"{name}_{order}": dict(sizes, order=order) for name, sizes in _SIZES.items() for order in ("plain", *ORDERS)
    },
}


def make_inputs(
    op: str, case: str | dict, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments for `op`; `case` is a name in `CASES[op]` or a dict of the same keys."""
    sizes = CASES[op][case] if isinstance(case, str) else case
    b, s, h = sizes["b"], sizes["s"], sizes["h"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight = normal(b, s, h), normal(h)
    if op == "rms_norm":
        options = {"round_first": True} if sizes.get("round_first") else {}
        return dict(x=x, weight=weight if sizes.get("weighted", True) else None, eps=1e-5, **options)
    if op == "gated_residual":
        return dict(residual=x, y=normal(b, s, h), gate=normal(b, h) if sizes["gated"] else None)
    plain = sizes["order"] == "plain"
    norm: dict[str, Any] = dict(
        weight=weight,
        shift=None if plain else normal(b, h),
        scale=None if plain else normal(b, h),
        eps=1e-5,
        order="modulate_norm" if plain else sizes["order"],
    )
    if op == "adaln_norm":
        return dict(x=x, **norm)
    return dict(residual=x, y=normal(b, s, h), gate=None if plain else normal(b, h), **norm)

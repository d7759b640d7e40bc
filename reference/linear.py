"""The linear layer.

    y[m, r] = sum over k of x[m, k] · weight[r, k] + bias[r]

Summed in float32 (float64 for float64 inputs) and rounded once to the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x·weightᵀ + bias`.

    Args:
        x: `[..., K]`, any floating dtype.
        weight: `[R, K]`, dtype of `x`.
        bias: `[R]`, dtype of `x`, or None.

    Returns:
        `[..., R]` in the dtype of `x`.

    Raises:
        ValueError: wrong shape. TypeError: dtypes that differ.
    """
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected [R, K] for x [..., K], got {list(weight.shape)} for {list(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {tensor.dtype}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


CASES: dict[str, dict[str, dict]] = {
    "linear": {
        "one": dict(rows=(), k=1, r=1),
        "no_rows": dict(rows=(0,), k=8, r=3),
        "nothing_to_sum": dict(rows=(2,), k=0, r=3, bias=True),
        "no_outputs": dict(rows=(2,), k=8, r=0),
        "odd": dict(rows=(2, 3), k=17, r=5, bias=True),
        "blocks": dict(rows=(70,), k=300, r=130, bias=True),
        "released": dict(rows=(16,), k=2688, r=10304),
        "released_down": dict(rows=(16,), k=4096, r=2688),
    }
}


def make_inputs(
    op: str, case: str | dict, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments for `op`; `case` is a name in `CASES[op]` or a dict of the same keys."""
    sizes = CASES[op][case] if isinstance(case, str) else case
    k, r = sizes["k"], sizes["r"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight = normal(*sizes["rows"], k), normal(r, k) / max(k, 1) ** 0.5
    bias = normal(r).to(device, dtype) if sizes.get("bias") else None
    return dict(x=x.to(device, dtype), weight=weight.to(device, dtype), bias=bias)

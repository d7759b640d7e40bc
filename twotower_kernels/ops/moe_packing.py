"""Experts' matrices from the layouts of checkpoints into the one that `moe_experts` reads (`moe.py`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_kernels.ops._library import check_alike

Matrices = Tensor | Sequence[Tensor]


def pack_experts(
    gate: Matrices | None, up: Matrices | None, down: Matrices, *, interleaved: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The `w_up` and `w_down` of `moe_experts`, made of an experts' gate, up and down projections; once, at load.

    Args:
        gate: the gates' matrices, stacked `[E, I, H]` or one `[I, H]` per expert in a list; or, where `up` is None,
            gates and values in one, `[E, 2I, H]`, gate rows first. None for experts without a gate.
        up: the values' matrices, shaped as `gate`; None if they are in it.
        down: `[E, H, I]`, or one `[H, I]` per expert.
        interleaved: gates and values, in one, alternate: row 2i is the gate of i, row 2i + 1 its value (gpt-oss).
        transposed: every matrix is the other way round: `[E, H, I]`, `[E, H, 2I]` and `[E, I, H]` (gpt-oss).

    The dimensions alone tell whether matrices are transposed; where H = I, or 2I, nothing can, and the caller has to
    know, as with what is interleaved. A bias that is interleaved becomes `torch.cat([b[:, ::2], b[:, 1::2]], 1)`.

    Returns:
        w_up `[E, 2I, H]`, without a gate `[E, I, H]`, and w_down `[E, H, I]`: contiguous, in the matrices' dtype, new
        unless they already were so. Differentiable.

    Raises:
        ValueError: shapes that do not fit each other, devices that differ, no expert in a list, neither gate nor up,
            `interleaved` matrices that are not in one, or have an odd number of rows. TypeError: dtypes that differ.
    """
    fused = gate is not None and up is None
    if interleaved and not fused:
        raise ValueError("interleaved: expected gates and values in one, as gate, and up None")
    given = {name: _stacked(name, x) for name, x in (("gate", gate), ("up", up), ("down", down)) if x is not None}
    if "down" not in given or len(given) == 1:
        raise ValueError(f"gate, up and down: expected down, and gate or up, got {' and '.join(given) or 'none'}")
    (first_name, first), *others = given.items()
    check_alike(first_name, first, **dict(others))
    if transposed:
        given = {name: x.transpose(1, 2) for name, x in given.items()}
    _check(given, fused, transposed)
    if interleaved:
        given["gate"] = torch.cat([given["gate"][:, ::2], given["gate"][:, 1::2]], 1)
    w_up = [given[name] for name in ("gate", "up") if name in given]
    return (torch.cat(w_up, 1) if len(w_up) > 1 else w_up[0]).contiguous(), given["down"].contiguous()


def _stacked(name: str, matrices: Matrices) -> Tensor:
    if not isinstance(matrices, Tensor):
        shapes = {tuple(x.shape) for x in matrices}
        if len(shapes) != 1:
            raise ValueError(f"{name}: expected a matrix for every expert, all of one shape, got {sorted(shapes)}")
        first, *others = matrices
        check_alike(f"{name}[0]", first, **{f"{name}[{n}]": x for n, x in enumerate(others, 1)})
        matrices = torch.stack(list(matrices))
    if matrices.ndim != 3:
        raise ValueError(f"{name}: expected matrices [E, rows, columns], got {list(matrices.shape)}")
    return matrices


def _check(given: dict[str, Tensor], fused: bool, transposed: bool) -> None:
    """The matrices, turned as `moe_experts` wants them, fit each other."""
    e, h, i = given["down"].shape
    for name in given.keys() - {"down"}:
        fits = [e, 2 * i if fused else i, h]
        got = list(given[name].shape)
        if got != fits:
            shape = f"{[e, h, fits[1]]} for down {[e, i, h]}" if transposed else f"{fits} for down {[e, h, i]}"
            got = [got[0], got[2], got[1]] if transposed else got
            raise ValueError(f"{name}: expected {shape} with transposed={transposed}, got {got}")

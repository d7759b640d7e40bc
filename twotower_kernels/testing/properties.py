"""What is asked of a kernel beside its numbers: the same bits twice, and of a row in any batch, and nothing written
where nothing is to be written. Each calls the kernel with its inputs by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.testing.budget import as_tuple
from twotower_kernels.testing.layouts import same_bits, sliced


def results_of(
    kernel: Callable[..., Any], inputs: Mapping[str, Any], writes: Collection[str] = (), *, copies: bool = True
) -> tuple[Any, ...]:
    """What a kernel returns, or of one that returns nothing the arguments that it writes.

    copies: those are given to it as copies.
    """
    given = dict(inputs)
    for name in writes:
        given[name] = given[name].clone() if copies else given[name]
    result = kernel(**given)
    return tuple(given[name] for name in writes) if writes and result is None else as_tuple(result)


def assert_deterministic(
    kernel: Callable[..., Any], inputs: Mapping[str, Any], *, times: int = 2, writes: Collection[str] = ()
) -> None:
    """Raises AssertionError unless the results of several calls are the same to the bit.

    writes: the arguments that the kernel writes to in place; each call gets copies of them.
    """
    first = results_of(kernel, inputs, writes)
    for call in range(1, times):
        for n, (a, b) in enumerate(zip(first, results_of(kernel, inputs, writes), strict=True)):
            assert same_bits(a, b), f"result {n} of call {call} has other bits: {_first_difference(a, b)}"


def assert_row_invariant(
    kernel: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    rows: Collection[str],
    part: slice = slice(0, 1),
    alone: Callable[..., Any] | None = None,
) -> None:
    """Raises AssertionError unless rows have the same bits in a smaller batch as among all.

    rows: the arguments whose first dimension is the batch; so is that of every result. part: the rows of the smaller
    batch. alone: the kernel for that, as on another number of threads; default the same.
    """
    together = results_of(kernel, inputs)
    some = {name: x[part] if name in rows and isinstance(x, Tensor) else x for name, x in inputs.items()}
    for n, (all_rows, few) in enumerate(zip(together, results_of(alone or kernel, some), strict=True)):
        whole = all_rows[part]
        assert same_bits(whole, few), f"result {n} has other bits in a smaller batch: {_first_difference(whole, few)}"


def assert_untouched(
    kernel: Callable[..., Any], inputs: Mapping[str, Any], *, writes: Collection[str] = ()
) -> tuple[Any, ...]:
    """Calls the kernel with every tensor in the middle of a larger one. Raises AssertionError if an argument is not as
    it was, or what lies around it. Returns the results.

    writes: the arguments that the kernel writes to in place, of which only what lies around is looked at.
    """
    larger, given = {}, dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            larger[name], given[name] = sliced(x)
    before = {name: x.clone() for name, x in larger.items()}
    results = results_of(kernel, given, writes, copies=False)
    for name, x in larger.items():
        inside = tuple(slice(1, n + 1) for n in inputs[name].shape)
        if name not in writes:
            assert same_bits(x[inside], before[name][inside]), f"{name} was changed"
        around = x.clone()
        around[inside] = before[name][inside]
        assert same_bits(around, before[name]), f"{name}: what lies around it was changed"
    return results


def _first_difference(a: Tensor, b: Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}"
    places = torch.nonzero(a != b)
    if not len(places):
        return "zeros of other signs, or other kinds of NaN"
    place = tuple(places[0].tolist())
    return f"at {list(place)} {a[place].item():.9g}, then {b[place].item():.9g}"

"""What a check knows of an op: its arguments, its specification, how its inputs are drawn and its results judged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.testing.budget import Yardstick
from twotower_kernels.testing.needs import strategies as st

Inputs = dict[str, Any]


class Judge:
    """Says of results on some inputs whether they are right, by the error budget.

    any_order: as in `Yardstick.judge`.
    """

    any_order = False

    def __init__(self, reference: Callable[..., Any], inputs: Inputs) -> None:
        self.yardstick = Yardstick(reference, inputs)

    @property
    def usable(self) -> bool:
        """Whether the naive program is finite where the truth is; else there is nothing to measure by."""
        pairs = zip(self.yardstick.naive, self.yardstick.exact, strict=True)
        floats = [(a, b.to(a.dtype)) for a, b in pairs if a.is_floating_point()]
        return all(bool((a.isfinite() == b.isfinite()).all()) for a, b in floats)

    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        """Raises Mismatch where they are not. row: judges that of their first dimension alone."""
        self.yardstick.judge(results, row=row, any_order=self.any_order)


@dataclass(frozen=True)
class Arguments:
    """The arguments of an op that a kernel takes; those of them that the op may be called without and the kernel may
    not; and those without which there is no call of the op, though some of them may be None."""

    taken: frozenset[str]
    demanded: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()

    def gives(self, name: str, drawn: bool) -> bool:
        """Whether an argument that may be left out is given, if `drawn` says so of one that may be either way."""
        return name in self.taken and (drawn or name in self.demanded)

    def kept(self, inputs: Mapping[str, Any]) -> Inputs:
        """Of inputs those that the kernel takes and, unless it must be given them, that are not None."""
        always = self.demanded | self.required
        return {name: x for name, x in inputs.items() if name in self.taken and (x is not None or name in always)}


@dataclass(frozen=True)
class Op:
    """One public op.

    draw: from the arguments that a kernel takes and a dtype to a strategy of inputs, with NaN in what is not to be
        looked at.
    rows: from inputs to the arguments whose first dimension is the batch, if a row can be taken out of them.
    own: those of them whose numbers are a row's alone, and no other row's business.
    writes: arguments that are written in place.
    judge: of inputs.
    padding: from inputs to the places in them that are not to be looked at.
    refusable: from inputs to what a kernel may refuse of them by any exception, in words.
    dtypes: those that are tried unless others are asked for.
    everything: the options of an op with optional results, for all of them.
    """

    public: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Mapping[str, Any]
    make: Callable[..., Inputs]
    draw: Callable[[Arguments, torch.dtype], st.SearchStrategy[Inputs]]
    own: Collection[str] = ()
    rows: Callable[[Inputs], Collection[str]] = lambda inputs: ()
    writes: tuple[str, ...] = ()
    judge: Callable[[Callable[..., Any], Inputs], Judge] = Judge
    padding: Callable[[Inputs], dict[str, Tensor]] = field(default=lambda inputs: where_nan(inputs))
    refusable: Callable[[Inputs], list[str]] = field(default=lambda inputs: empty(inputs))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    everything: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.public.__name__

    @property
    def required(self) -> frozenset[str]:
        """The arguments without which there is no call."""
        return frozenset(p.name for p in self.parameters.values() if p.default is p.empty)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.public).parameters


def where_nan(inputs: Inputs) -> dict[str, Tensor]:
    """The places of NaN in the floating tensors that hold one: bool, as their shapes."""
    floats = {name: x.isnan() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: places for name, places in floats.items() if places.any()}


def empty(inputs: Inputs) -> list[str]:
    """That there are empty tensors, if so."""
    return ["empty tensors"] * any(isinstance(x, Tensor) and x.numel() == 0 for x in inputs.values())

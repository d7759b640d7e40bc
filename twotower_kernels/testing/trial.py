"""One input, and all that is asked of a kernel with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.testing.budget import Mismatch
from twotower_kernels.testing.cases.op import Arguments, Inputs, Judge, Op
from twotower_kernels.testing.layouts import LAYOUTS, awkward, same_bits, sliced
from twotower_kernels.testing.properties import results_of

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Example:
    """An input and how it is handed over.

    layout: see `layouts.awkward`. row: the one that is looked at among others, modulo their number.
    """

    dtype: torch.dtype
    inputs: Inputs
    layout: int = 1
    row: int = 0


class Refused(Exception):
    """The kernel said that it does not serve an input."""


@dataclass
class Outcome:
    """Of one example: the promises that held, those that are broken, with the reason and the inputs, what the kernel
    refused, whether it was given an `out`, and whether a row had the same bits alone."""

    held: list[str] = field(default_factory=list)
    broken: dict[str, tuple[AssertionError, Mapping[str, Any]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    out: bool = False
    batch_invariant: bool | None = None


class Trial:
    """Asks of a kernel what is promised."""

    def __init__(self, op: Op, kernel: Callable[..., Any], arguments: Arguments, device: str) -> None:
        self.op, self.kernel, self.arguments, self.device = op, kernel, arguments, device

    def __call__(self, example: Example) -> Outcome:
        outcome = Outcome()
        padding = self.op.padding(example.inputs)
        clean = filled(example.inputs, padding)
        judge = self.judge(clean)
        if not judge.usable:
            return outcome
        out = {"out": torch.full_like(judge.yardstick.naive[0], torch.nan)} if "out" in self.arguments.taken else {}
        clean |= out if "out" in self.arguments.demanded else {}
        try:
            first = self.call(clean)
        except Refused as error:
            outcome.refused.append(str(error))
            return outcome
        except Exception as error:
            refusable = self.op.refusable(clean)
            if refusable:
                outcome.refused.append(f"{refusable[0]}: {said(error)}")
            else:
                outcome.broken["runs"] = AssertionError(said(error)), clean
            return outcome
        outcome.held.append("runs")
        if not self.ask(outcome, "numbers", clean, lambda: judge(first)):
            return outcome  # of a wrong result there is nothing more to say
        self.again(outcome, clean, first)
        if padding:
            poisoned = clean | {name: example.inputs[name] for name in padding}
            other = self.judge(poisoned) if self.op.writes else judge
            self.ask(outcome, "padding", poisoned, lambda: agrees(self.call(poisoned), first, other))
        if example.layout:
            self.laid_out(outcome, clean | out, judge, example.layout)
        rows = self.op.rows(clean)
        if rows and not self.op.writes:
            self.among_others(outcome, clean, judge, rows, first, example.row)
        return outcome

    def judge(self, inputs: Inputs) -> Judge:
        judge = self.op.judge(self.op.reference, inputs)
        judge.any_order = True
        return judge

    def call(self, inputs: Mapping[str, Any]) -> Results:
        """The kernel's results for copies of the inputs."""
        return self.results(moved(inputs, self.device))

    def results(self, given: Mapping[str, Any]) -> Results:
        """The kernel's results, on the CPU. Refused: it says that it does not serve this."""
        try:
            results = results_of(self.kernel, given, self.op.writes, copies=False)
        except NotImplementedError as error:
            raise Refused(said(error)) from None
        for n, x in enumerate(results):
            if not isinstance(x, Tensor):
                raise Mismatch(f"result {n}: expected a tensor, got {type(x).__name__}")
        if "out" in given and results[0].data_ptr() != given["out"].data_ptr():
            raise Mismatch("out: expected the result in the tensor that was given for it, got another")
        return tuple(x.detach().cpu() for x in results)

    def ask(self, outcome: Outcome, promise: str, inputs: Mapping[str, Any], test: Callable[[], Any]) -> bool:
        """Whether a test passes, which is written down."""
        try:
            test()
        except Refused as error:
            outcome.refused.append(str(error))
        except AssertionError as error:
            outcome.broken[promise] = error, inputs
            return False
        except Exception as error:
            outcome.broken[promise] = AssertionError(said(error)), inputs
            return False
        else:
            outcome.held.append(promise)
        return True

    def again(self, outcome: Outcome, inputs: Inputs, first: Results) -> None:
        """The same bits, and inputs that are as before."""
        given = moved(inputs, self.device)
        before = moved(given, self.device)
        self.ask(outcome, "deterministic", inputs, lambda: assert_same(first, self.results(given)))
        self.ask(outcome, "untouched", inputs, lambda: self.assert_unchanged(given, before))

    def assert_unchanged(self, given: Inputs, before: Inputs) -> None:
        for name, x in before.items():
            if isinstance(x, Tensor) and name not in (*self.op.writes, "out"):
                assert same_bits(given[name], x), f"{name} was changed"

    def laid_out(self, outcome: Outcome, inputs: Inputs, judge: Judge, layout: int) -> None:
        """On tensors with other strides; slices of larger ones, around which nothing may be written. Strides are
        refused by any exception: what is not served loudly is not served wrongly."""
        given = moved(inputs, self.device)
        larger = {}
        for name, x in given.items():
            if isinstance(x, Tensor) and layout == 1:
                larger[name], given[name] = sliced(x)
            elif isinstance(x, Tensor):
                # storage must have its last dimension contiguous
                given[name] = awkward(x, 2 if name in self.op.writes else layout)
        around = {name: x.clone() for name, x in larger.items()}
        try:
            results = self.results(given)
        except Mismatch as error:
            outcome.broken["strides"] = error, given
            return
        except Exception as error:
            outcome.refused.append(f"tensors that are {LAYOUTS[layout]}: {said(error)}")
            return
        outcome.out = "out" in given
        self.ask(outcome, "strides", given, lambda: judge(results))
        for name, x in larger.items():
            inside = tuple(slice(1, n + 1) for n in given[name].shape)
            if name in (*self.op.writes, "out"):
                around[name][inside] = x[inside]
            if not same_bits(x, around[name]):
                outcome.broken["untouched"] = AssertionError(f"{name}, or what lies around it, was changed"), given

    def among_others(
        self, outcome: Outcome, inputs: Inputs, judge: Judge, rows: Collection[str], first: Results, row: int
    ) -> None:
        """A row, when all others hold NaN; and alone."""
        own = [name for name in self.op.own if name in rows and isinstance(inputs.get(name), Tensor)]
        count = min((len(inputs[name]) for name in own), default=0)
        if count < 2 or any(len(x) != count for x in first):
            return
        row %= count
        others = torch.arange(count) != row
        given = dict(inputs)
        for name in own:
            if inputs[name].is_floating_point():
                given[name] = inputs[name].clone()
                given[name][others] = torch.nan
        self.ask(outcome, "rows", given, lambda: agrees(self.call(given), first, judge, row))
        rows = {*rows, "out"}
        alone = {name: x[row : row + 1] if name in rows and isinstance(x, Tensor) else x for name, x in inputs.items()}
        try:
            few = self.call(alone)
        except Exception:
            return  # nothing asks it
        outcome.batch_invariant = all(same_bits(a[row : row + 1], b) for a, b in zip(first, few, strict=False))


def agrees(results: Results, first: Results, judge: Judge, row: int | None = None) -> None:
    """Raises Mismatch unless results are right, as those are to which they are equal."""
    part = slice(None) if row is None else slice(row, row + 1)
    same = len(results) == len(first) and all(a.ndim == b.ndim for a, b in zip(results, first, strict=True))
    if not same or any(
        not same_bits(a[part] if a.ndim else a, b[part] if b.ndim else b) for a, b in zip(results, first, strict=True)
    ):
        judge(results, row)


def assert_same(first: Results, again: Results) -> None:
    for n, (a, b) in enumerate(zip(first, again, strict=True)):
        if not same_bits(a, b):
            differ = torch.nonzero(a != b) if a.shape == b.shape else a.new_empty(0)
            if not len(differ):
                raise Mismatch(f"result {n} has other bits when called again: another shape, zero or NaN")
            place = tuple(differ[0].tolist())
            raise Mismatch(
                f"result {n} has other bits when called again: {a[place].item():.9g}, then {b[place].item():.9g}",
                place=list(place),
                got=b[place].item(),
            )


def filled(inputs: Inputs, padding: Mapping[str, Tensor]) -> Inputs:
    """Inputs with ordinary numbers in the padding."""
    clean, generator = dict(inputs), torch.Generator().manual_seed(0)
    for name, places in padding.items():
        x = inputs[name].clone()
        x[places] = 3 * torch.randn(int(places.sum()), generator=generator).to(x.dtype)
        clean[name] = x
    return clean


def moved(inputs: Mapping[str, Any], device: str) -> Inputs:
    """Copies of the tensors on a device, of those in named tuples, too."""

    def there(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, copy=True)
        return type(x)(*map(there, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x

    return {name: there(x) for name, x in inputs.items()}


def said(error: Exception) -> str:
    """The first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]

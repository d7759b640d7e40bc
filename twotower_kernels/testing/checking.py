"""Searches for inputs that a kernel gets wrong, and makes the smallest of them."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from twotower_kernels.testing import drawing
from twotower_kernels.testing.budget import Mismatch
from twotower_kernels.testing.cases import OPS
from twotower_kernels.testing.cases.op import Arguments, Inputs, Op
from twotower_kernels.testing.needs import hypothesis
from twotower_kernels.testing.needs import strategies as st
from twotower_kernels.testing.report import PROMISES, Failure, Report
from twotower_kernels.testing.trial import Example, Outcome, Trial

SMALLER = 250  # inputs that are tried for being smaller than one that fails
RELEASED = "released"  # in the names of cases at the sizes of a released model


def check(
    op: str,
    kernel: Callable[..., Any],
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    examples: int = 200,
    seed: int = 0,
) -> Report:
    """Tries a kernel on inputs of a public op against the specification in float64.

    Args:
        op: the op's name, as in `twotower_kernels`.
        kernel: takes the op's arguments by name and returns what the op returns. What it does not take is not tried;
            of what it takes without a default it is always given a value. It says by NotImplementedError that it does
            not serve an input.
        device: where it gets its tensors. They are drawn, and judged, on the CPU.
        dtypes: of the inputs; default float32, bfloat16 and float16, of `moe_route` float64 as well.
        examples: how many inputs are drawn.
        seed: the same draws the same inputs.

    Returns:
        A `Report`, true when all that was tried held.

    Raises:
        ValueError: no such op, a kernel without an argument that every call needs or with one that the op does not
            have. TypeError: a kernel whose arguments cannot be read.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if examples < 1:
        raise ValueError(f"examples: expected at least 1, got {examples}")
    known = OPS[op]
    wanted = known.dtypes if dtypes is None else tuple(dtypes)
    if not wanted or any(dtype not in drawing.DTYPES for dtype in wanted):
        raise ValueError(f"dtypes: expected some of {', '.join(map(str, drawing.DTYPES))}, got {wanted}")
    arguments = arguments_of(known, kernel)
    search = _Search(Trial(known, kernel, arguments, device), wanted, seed)
    search.run(examples)
    return search.report(kernel, device)


def arguments_of(op: Op, kernel: Callable[..., Any]) -> Arguments:
    """The op's arguments that a kernel takes."""
    try:
        given = inspect.signature(kernel).parameters
    except (TypeError, ValueError):
        raise TypeError(f"kernel: expected a function that names its arguments, got {kernel!r}") from None
    by_name = [p for p in given.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {p.name for p in by_name}
    if any(p.kind is p.VAR_KEYWORD for p in given.values()):
        names |= set(op.parameters)
    missing = [name for name in op.parameters if name in op.required and name not in names]
    listed = f"the arguments of {op.name}: {', '.join(op.parameters)}"
    if missing:
        raise ValueError(f"kernel: expected {', '.join(missing)} among its arguments, got {', '.join(given)}; {listed}")
    demanded = {p.name for p in by_name if p.default is p.empty}
    unknown = sorted(demanded - set(op.parameters))
    if unknown:
        raise ValueError(f"kernel: expected a default of {', '.join(unknown)}, which is none of {listed}")
    return Arguments(frozenset(names & set(op.parameters)), frozenset(demanded) - op.required, op.required)


class _Broken(Exception):
    """To Hypothesis: this input fails."""


class _Search:
    """Draws inputs until every promise has held on all, or has been broken by a small one."""

    def __init__(self, trial: Trial, dtypes: tuple[torch.dtype, ...], seed: int) -> None:
        self.trial, self.dtypes, self.seed = trial, dtypes, seed
        defaults = {name: trial.op.parameters[name].default for name in trial.arguments.demanded}
        self.demanded = {name: value for name, value in defaults.items() if value is not None}
        self.failures: dict[str, Failure] = {}
        self.begin()

    def begin(self) -> None:
        """Counts anew: each search draws the same inputs as the one before."""
        self.counts = {name: Counter[str]() for name in ("held", "broken", "refused", "tried")}
        self.examples = self.cases = 0
        self.batch_invariant: bool | None = None

    def run(self, examples: int) -> None:
        while not self.draw(examples):
            self.begin()
        for name in self.trial.op.cases:
            if RELEASED not in name:
                for dtype in self.dtypes:
                    self.of_case(name, dtype)

    def draw(self, examples: int) -> bool:
        """Whether no promise was broken but those known to be."""

        @hypothesis.seed(self.seed)
        @hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=False,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(self.strategy())
        def try_one(example: Example) -> None:
            if found and next(tries) >= SMALLER:
                return
            outcome = self.trial(example)
            new = [promise for promise in outcome.broken if promise not in known]
            if new:
                found.update({promise: (example, outcome) for promise in new[:1]})
                raise _Broken
            if not found:
                self.examples += 1
                self.count(example, outcome)

        known, found, tries = set(self.failures), dict[str, tuple[Example, Outcome]](), itertools.count()
        try:
            try_one()
        except Exception:
            if not found:
                raise
        for promise, (example, outcome) in found.items():
            self.failures[promise] = failure(promise, example, outcome)
        return not found

    def strategy(self) -> st.SearchStrategy[Example]:
        def of(dtype: torch.dtype) -> st.SearchStrategy[Example]:
            inputs = self.trial.op.draw(self.trial.arguments, dtype).map(lambda drawn: self.demanded | drawn)
            return st.builds(Example, st.just(dtype), inputs, drawing.layouts(), st.integers(0, 7))

        return st.sampled_from(self.dtypes).flatmap(of)

    def of_case(self, name: str, dtype: torch.dtype) -> None:
        """One of the specification's cases, if the kernel takes what it needs."""
        op, arguments = self.trial.op, self.trial.arguments
        inputs = self.demanded | {key: x for key, x in op.make(name, dtype=dtype).items() if x is not None}
        defaults = {key: parameter.default for key, parameter in op.parameters.items()}
        needed = {key for key, x in inputs.items() if isinstance(x, torch.Tensor) or x != defaults[key]}
        if not needed <= arguments.taken or not arguments.demanded <= inputs.keys():
            return
        given: Inputs = {**dict.fromkeys(op.required), **inputs, **op.everything}
        example = Example(dtype, arguments.kept(given))
        outcome = self.trial(example)
        self.cases += 1
        self.count(example, outcome)
        for promise in outcome.broken:
            self.failures.setdefault(promise, failure(promise, example, outcome))

    def count(self, example: Example, outcome: Outcome) -> None:
        self.counts["held"].update(outcome.held)
        self.counts["broken"].update(outcome.broken.keys())
        self.counts["refused"].update(outcome.refused)
        if "runs" in outcome.held:
            defaults = {name: parameter.default for name, parameter in self.trial.op.parameters.items()}
            given = example.inputs.items()
            self.counts["tried"].update(["out"] * outcome.out)
            self.counts["tried"].update(
                name for name, x in given if isinstance(x, torch.Tensor) or (x is not None and x != defaults[name])
            )
        if outcome.batch_invariant is not None:
            self.batch_invariant = outcome.batch_invariant and self.batch_invariant is not False

    def report(self, kernel: Callable[..., Any], device: str) -> Report:
        names = list(self.trial.op.parameters)
        broken = self.counts["broken"]
        return Report(
            op=self.trial.op.name,
            kernel=getattr(kernel, "__qualname__", None) or repr(kernel),
            device=device,
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in self.dtypes),
            examples=self.examples,
            cases=self.cases,
            held={promise: self.counts["held"][promise] for promise in PROMISES},
            failures=[
                Failure(**vars(self.failures[promise]) | {"count": max(1, broken[promise])})
                for promise in PROMISES
                if promise in self.failures
            ],
            tried={name: self.counts["tried"][name] for name in names if name in self.trial.arguments.taken},
            not_tried=[name for name in names if name not in self.trial.arguments.taken],
            refused=dict(self.counts["refused"].most_common()),
            batch_invariant=self.batch_invariant,
        )


def failure(promise: str, example: Example, outcome: Outcome) -> Failure:
    error, inputs = outcome.broken[promise]
    at = {}
    if isinstance(error, Mismatch):
        at = {name: getattr(error, name) for name in ("place", "got", "naive", "exact")}
    return Failure(promise, str(error), inputs, str(example.dtype).removeprefix("torch."), **at)

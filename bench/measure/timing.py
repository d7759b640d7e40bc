"""One way to measure: outputs checked first, then programs timed in turns (`clock`, `gpu_clock`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from twotower_kernels.bench.costs.costs import Cost, arithmetic
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.clock import Timing, interleaved
from twotower_kernels.bench.measure.gpu_clock import on_gpu

# The names of programs: ours, code as the models' authors write it, candidates for "the best PyTorch", and any others.
OURS, ORIGINAL, PYTORCH = "twotower_kernels", "original style", "PyTorch:"


# At least so many times as fast as the original style and as the best PyTorch, and the share of the ceiling.
Goals = tuple[float | None, float | None, float | None]
NO_GOALS: Goals = (None, None, None)
SECONDS = {"cpu": 1.0, "cuda": 0.1}  # that a program is timed, if nobody says how long


@dataclass(frozen=True)
class Case:
    """One operation at one shape, and the programs that compute it.

    Attributes:
        op, shape, dtype: what is computed; shape is for people.
        programs: the calls, `OURS` among them.
        check: compares our output with another's and raises AssertionError if they disagree.
        cost: what the operation must move and compute at least.
        floor: the least seconds on a machine with these ceilings, where it is not the larger of bytes and arithmetic.
        goals: what this case should reach on the device that it was made for; None: no goal.
        sizes: what its shape says, by name: batch, block, context, ...
        inputs: keyword arguments of the public operation.
    """

    op: str
    shape: str
    dtype: torch.dtype
    programs: Mapping[str, Callable[[], Any]]
    check: Callable[[Any, Any], None]
    cost: Cost
    goals: Goals = NO_GOALS
    floor: Callable[[Ceilings], float] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def against(self, name: str, function: Callable[..., Any]) -> Case:
        """The same case with one more program, `function(**inputs)`."""
        return replace(self, programs={**self.programs, name: partial(function, **self.inputs)})


@dataclass(frozen=True)
class Result:
    """A case without its programs, which hold their tensors, and the times of those that agreed.

    Attributes:
        skipped: programs that cannot run here, and why.
        wrong: programs that fail, or whose output disagrees with ours, and how.
    """

    case: Case
    timings: Mapping[str, Timing]
    skipped: Mapping[str, str]
    wrong: Mapping[str, str]

    def ratio(self, name: str) -> float | None:
        """How many times as long as ours another program takes."""
        return self.timings[name].median / self.timings[OURS].median if name in self.timings else None

    def best(self) -> str | None:
        """The fastest program in plain PyTorch: a candidate for that, or even the original style."""
        found = [name for name in self.timings if name == ORIGINAL or name.startswith(PYTORCH)]
        return min(found, key=lambda name: self.timings[name].median, default=None)

    def share(self, ceilings: Ceilings) -> float:
        """The least time that bytes and arithmetic allow on this machine, over ours."""
        cost = self.case.cost
        computed = getattr(torch, arithmetic(self.case.op, str(self.case.dtype).removeprefix("torch.")))
        moving, computing = cost.bytes / ceilings.read, cost.flops / ceilings.matrix(computed)
        floor = max(moving, computing) / 1e9 if self.case.floor is None else self.case.floor(ceilings)
        return floor / self.timings[OURS].median


def cannot_run(error: Exception) -> bool:
    """Whether an error says that a program cannot run here: no such kernel, not installed, not enough memory."""
    known = NotImplementedError, ImportError, MemoryError, torch.OutOfMemoryError
    return isinstance(error, known) or "allocate memory" in str(error)  # PyTorch's allocator on a CPU


def said(error: Exception) -> str:
    """An error in a line."""
    kind = "" if cannot_run(error) and str(error) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or [""])[0]


@torch.inference_mode()  # for the checks too: what is compiled then must be what is timed
def measure(case: Case, seconds: float | None = None, device: str = "cpu") -> Result:
    """Checks every program's output against ours, then times those that agree, each for so long (default: SECONDS).

    Raises:
        Exception: whatever our own program raises.
    """
    ours, programs = case.programs[OURS](), {OURS: case.programs[OURS]}
    skipped, wrong = {}, {}
    for name, call in case.programs.items():
        if name == OURS:
            continue
        try:
            theirs = call()
        except Exception as error:
            (skipped if cannot_run(error) else wrong)[name] = said(error)
            continue
        try:
            case.check(ours, theirs)
        except AssertionError as error:
            wrong[name] = f"disagrees, {error}"
        else:
            programs[name] = call
        del theirs
    del ours
    kind = torch.device(device).type
    timings = (interleaved if kind == "cpu" else on_gpu)(programs, SECONDS[kind] if seconds is None else seconds)
    return Result(replace(case, programs={}, inputs={}), timings, skipped, wrong)


def close(limit: float) -> Callable[[Any, Any], None]:
    """A check in 2-norm: bfloat16 programs round at different places, and single entries are sums that cancel."""

    def check(ours: Any, theirs: Any) -> None:
        first, second = ours, theirs
        if isinstance(ours, tuple):
            first, second = ours[0], theirs[0]
        first, second = first.double(), second.double()
        error = (first - second).norm() / second.norm()
        assert error <= limit, f"relative error {error:.1e}, expected at most {limit:.0e}"

    return check

"""One way to time: outputs checked first, programs interleaved, medians with their spread.

On a GPU, device events bracket each call, behind a write to a buffer larger than the second-level cache: it leaves the
caches cold, and while it runs the host has time to queue the call, so that launches are not what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.costs import Cost, arithmetic

# The names of programs: ours, code as the models' authors write it, candidates for "the best PyTorch", and any others.
OURS, ORIGINAL, PYTORCH = "twotower_kernels", "original style", "PyTorch:"


# At least so many times as fast as the original style and as the best PyTorch, and the share of the ceiling.
Goals = tuple[float | None, float | None, float | None]
NO_GOALS: Goals = (None, None, None)


@dataclass(frozen=True)
class Case:
    """One operation at one shape, and the programs that compute it.

    Attributes:
        op, shape, dtype: what is computed; shape is for people.
        programs: the calls, `OURS` among them.
        check: compares our output with another's and raises AssertionError if they disagree.
        cost: what the operation must move and compute at least.
        floor: the least seconds on a machine with these ceilings, where it is not the larger of bytes and arithmetic.
        goals: what this case should reach on a CPU; None: no goal.
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
class Timing:
    """Seconds per call: median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float
    calls: int


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


def interleaved(programs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """All programs in turns, in alternating order, until each had `seconds`, and three calls at least. Between two
    calls next to nothing happens: what it threw out of the caches would be charged to the next. (`measure` has called
    each before.)"""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    total, order = dict.fromkeys(programs, 0.0), list(programs.items())
    while any(len(taken[name]) < 3 or total[name] < seconds for name in programs):
        for name, call in order:
            if len(taken[name]) >= 3 and total[name] >= 3 * seconds:
                continue  # the slow need not wait for the fast
            start = time.perf_counter()
            call()
            spent = time.perf_counter() - start
            taken[name].append(spent)
            total[name] += spent
        order.reverse()
    return {name: _timing(times) for name, times in taken.items()}


def _timing(times: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1], len(times))


def on_gpu(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """All programs in turns, in alternating order, so many times each, after three calls to warm up."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB
    for call in programs.values():
        for _ in range(3):
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name, call in list(programs.items())[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: _timing([start.elapsed_time(end) / 1e3 for start, end in pairs]) for name, pairs in events.items()}


def cannot_run(error: Exception) -> bool:
    """Whether an error says that a program cannot run here: no such kernel, not installed, not enough memory."""
    known = NotImplementedError, ImportError, MemoryError, torch.OutOfMemoryError
    return isinstance(error, known) or "allocate memory" in str(error)  # PyTorch's allocator on a CPU


def said(error: Exception) -> str:
    """An error in a line."""
    kind = "" if cannot_run(error) and str(error) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or [""])[0]


@torch.inference_mode()  # for the checks too: what is compiled then must be what is timed
def measure(case: Case, seconds: float = 1.0, device: str = "cpu") -> Result:
    """Checks every program's output against ours, then times those that agree.

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
    on_cpu = torch.device(device).type == "cpu"
    timings = interleaved(programs, seconds) if on_cpu else on_gpu(programs, rounds=30)
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

"""What a machine must show before its figures count.

Every operation that the device has a kernel for, on every case of its specification, in every dtype: within the error
budget against float64, bit for bit the same twice, and on a GPU bit for bit the same when replayed from a CUDA graph.
The models too: recorded tensors and texts, agreement with the specification, the shipped model's text, and on a GPU a
text through recorded graphs. Processes share the checks.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from twotower_kernels.bench.checks.model import of_the_model
from twotower_kernels.bench.checks.operations import (
    DTYPES,
    RELEASED,
    Task,
    check_draws,
    of_operations,
    of_the_router,
)
from twotower_kernels.bench.checks.processes import BEGINS, FAILED, HELD, INTERRUPTED, REFUSED, Tally, in_processes
from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.bench.measure.timing import said
from twotower_kernels.options.flags import integer

MOST_JOBS = 16
MEMORY = 4 * 2**30  # bytes of a GPU for each process
PROGRAM = ("twotower_kernels.bench.checks",)


def tasks(device: str, *, graphs: bool = True, interpreted: bool = False) -> Iterator[Task]:
    """Everything that is checked on a device; interpreted: the Triton kernels alone, on a CPU."""
    yield from of_operations(device, graphs=graphs, interpreted=interpreted)
    if not interpreted:
        yield from of_the_router(device, graphs=graphs)
        yield "draws", lambda: check_draws(device)
        yield from of_the_model(device, graphs=graphs)


def of_share(number: int, shares: int, labels: Sequence[str]) -> list[str]:
    """The labels that a process takes, those that take longest first. The released sizes are shared by the first few,
    one dtype each: the float64 truths of three of them fit into a large GPU's memory side by side."""
    large = [label for label in labels if RELEASED in label]
    small = [label for label in labels if RELEASED not in label]
    small.sort(key=lambda label: not label.startswith("model"))
    few = len(DTYPES)
    if shares <= few:
        return [*large, *small][number::shares]
    return large[number::few] if number < few else small[number - few :: shares - few]


def run(found: Sequence[tuple[str, Callable[[], None]]], device: str, first: int = 0) -> int:
    """Runs checks, without those before the first, and says of each that it begins and how it ends. Returns 0, or 1 if
    one failed, INTERRUPTED, or LOST: then those behind the last one that began need another process."""
    failed = 0
    for index, (label, check) in enumerate(found):
        if index < first:
            continue
        print(f"{BEGINS}{index} {label}", flush=True)
        try:
            check()
            print(HELD, flush=True)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            print(f"{REFUSED}{label}: {said(error)}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{FAILED}{label}: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-3)
            if lost(device):
                return LOST
        except KeyboardInterrupt:
            print(f"interrupted in {label}", flush=True)
            return INTERRUPTED
    return int(failed > 0)


def usual_jobs(device: str) -> int:
    """A process per core, as far as a GPU's memory goes round."""
    jobs = min(MOST_JOBS, os.cpu_count() or 1)
    if device == "cuda":
        jobs = min(jobs, torch.cuda.get_device_properties(0).total_memory // MEMORY)
    return max(1, jobs)


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    found.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="where (default: cuda)")
    found.add_argument("--only", action="append", default=[], help="checks whose label holds this; may be given again")
    found.add_argument("--eager", action="store_true", help="record no graphs, for runs under a checker of memory")
    found.add_argument("--jobs", type=integer(1, 1024), help="processes to share the checks (default: a core each)")
    found.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/checks.json, anew as results come in")
    found.add_argument("--share", nargs=2, type=int, metavar=("I", "N"), help="one such process's share, in this one")
    found.add_argument("--first", type=int, default=0, metavar="N", help="leave out those of the share before this")
    return found


def main(arguments: Sequence[str] | None = None, *, program: Sequence[str] = PROGRAM, interpreted: bool = False) -> int:
    """Runs the command line (default: the process's own). Returns 0 if everything held, 1 if something failed.

    program: the words behind `python -m` with which processes run their share. interpreted: see `tasks`."""
    reader = parser(f"python -m {program[0]}")
    options = reader.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        reader.error("--device cuda: expected a GPU, PyTorch sees none (--device cpu checks the kernels for CPUs)")
    found = dict(tasks(options.device, graphs=not options.eager, interpreted=interpreted))
    wanted = [label for label in found if not options.only or any(part in label for part in options.only)]
    if not wanted:
        reader.error(f"--only: no check's label holds {' or '.join(options.only)}")
    if options.share is not None:
        number, shares = options.share
        return run([(label, found[label]) for label in of_share(number, shares, wanted)], options.device, options.first)
    words = [*program, "--device", options.device, *["--eager"] * options.eager]
    words += [f"--only={part}" for part in options.only]
    tally = Tally(options.device, len(wanted), options.save and options.save / "checks.json")
    jobs = min(options.jobs or usual_jobs(options.device), len(wanted))
    try:
        bad = in_processes(jobs, words, tally)
    except KeyboardInterrupt:
        bad = INTERRUPTED
    tally.save()
    print(tally)
    return bad if bad == INTERRUPTED else int(bool(bad or tally.failed))

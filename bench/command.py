"""The benchmark: every operation beside its baselines, checked and timed in one run (docs/benchmarking.md)."""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from twotower_kernels import cpu
from twotower_kernels.bench.baselines import peers
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.bench.measure.timing import (
    NO_GOALS,
    ORIGINAL,
    OURS,
    PYTORCH,
    Case,
    Result,
    cannot_run,
    measure,
    said,
)
from twotower_kernels.bench.pictures.operations import roofline
from twotower_kernels.bench.report import tables
from twotower_kernels.bench.report.tables import Skipped
from twotower_kernels.bench.sizes.shapes import RELEASED, SMALL, Shapes
from twotower_kernels.options.flags import integer, number

FILES = ("attention", "moe", "linear", "mamba2", "adaln", "remask", "model")
INTERRUPTED = 130  # the exit code after Ctrl-C
BASELINES = ("all", "none", "original", "best", "peers")


def parser(prog: str = "python -m bench") -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    found.add_argument("--op", action="append", choices=FILES, help="only this family; may be given again")
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    found.add_argument(
        "--shapes",
        default="released",
        metavar="released|small|FILE",
        help="sizes: the released model's (default), small ones, or those of a model's config.json",
    )
    for name, most, what in (("batch", 2**16, "blocks at a time"), ("context", 2**24, "tokens before the block")):
        found.add_argument(
            f"--{name}", action="append", type=integer(1, most), metavar="N", help=f"{what}; may be given again"
        )
    found.add_argument(
        "--baselines",
        "--rivals",  # its name of before
        action="append",
        choices=BASELINES,
        help="which programs stand beside ours: original style, best PyTorch, peers (what others wrote), all "
        "(default) or none, and so without checks; may be given again",
    )
    found.add_argument(
        "--seconds", type=number(0, most=3600), help="that each program is timed at least (default: 1, on a GPU 0.1)"
    )
    found.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/NAME.json, NAME.md and NAME.png")
    found.add_argument("--name", help="of the files that are written (default: the CPU's instruction set, or ops)")
    return found


def wanted(program: str, kinds: Sequence[str]) -> bool:
    """Whether a program is ours or a baseline of one of these kinds."""
    kind = "original" if program == ORIGINAL else "best" if program.startswith(PYTORCH) else "peers"
    return program == OURS or "all" in kinds or kind in kinds


def cases(family: str, options: argparse.Namespace, shapes: Shapes) -> Iterator[Case]:
    """Those that were asked for; goals are the released model's."""
    module = importlib.import_module(f"twotower_kernels.bench.cases.{family}")
    for case in module.cases(options.device, shapes, options.batch, options.context):
        programs = {**case.programs, **peers.of(case.op, case.inputs, options.device)}
        programs = {name: call for name, call in programs.items() if wanted(name, options.baselines or ["all"])}
        yield replace(case, programs=programs, goals=case.goals if shapes == RELEASED else NO_GOALS)


def picture(run: dict[str, Any], path: Path) -> str | None:
    """Draws a saved run, or says why it cannot."""
    try:
        roofline(run, path)
    except (ImportError, ValueError) as error:  # no matplotlib; no case that has a place in it
        return f"no picture: {error}"
    return None


def measured(
    options: argparse.Namespace,
    shapes: Shapes,
    limits: Ceilings,
    console: Console,
    keep: Callable[[list[Result], list[Skipped]], None],
) -> tuple[list[Result], list[Skipped], int]:
    """Every case that was asked for: results, programs that were not timed, and the exit code: 1 if our own program
    failed, LOST if the GPU went with it, and what was asked for behind it was not measured. `keep` is told after every
    case what there is until then."""
    results, skipped, code = [], [], 0
    families = options.op or FILES
    # Drawn between two cases alone: a bar that moves by itself takes time from what is measured.
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=len(families))
        for family in families:
            waiting = cases(family, options, shapes)
            while True:
                op, shape = family, ""
                try:
                    case = next(waiting, None)
                    if case is None:
                        break
                    op, shape = case.op, case.shape
                    bar.update(task, description=f"{op}, {shape}", refresh=True)
                    result = measure(case, options.seconds, options.device)
                except KeyboardInterrupt:
                    console.print(f"interrupted at {op}, {shape}: what was measured until then follows")
                    return results, skipped, INTERRUPTED
                except Exception as error:  # of whatever kind: what was measured until then is not thrown away
                    skipped.append(Skipped(op, shape, OURS, said(error)))
                    code = code if cannot_run(error) else 1
                    if lost(options.device):
                        left = families[families.index(family) + 1 :]
                        skipped += [Skipped(name, "", OURS, "the GPU was lost to this process before") for name in left]
                        return results, skipped, LOST
                else:
                    results.append(result)
                    skipped += tables.not_timed(result)
                    console.print("  ".join(tables.cells(result, limits)))
                keep(results, skipped)
                case = None  # and its tensors, before those of the next are drawn
                gc.collect()
            bar.advance(task)
    return results, skipped, code


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Runs the command line (default: the process's own). Returns 1 if a program fails or disagrees, 130 if it is
    interrupted and 77 if a GPU is lost to it, neither of which loses anything that was measured, else 0."""
    reader = parser(prog)
    options = reader.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        reader.error("--device cuda: expected a GPU, PyTorch sees none")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)
    shapes = {"released": RELEASED, "small": SMALL}.get(options.shapes)
    if shapes is None:
        try:
            shapes, missing = Shapes.from_file(Path(options.shapes))
        except ValueError as error:
            reader.error(f"--shapes: {error}")
        if missing:
            console.print(f"{options.shapes} lacks {', '.join(missing)}: as in the released model")
    limits = ceilings.measure(options.device)
    console.print(tables.heading(limits))
    name = options.name or (cpu.kernels().isa() if options.device == "cpu" else "ops")

    def keep(results: list[Result], skipped: list[Skipped]) -> None:
        """What was measured, even if this process does not come to its end."""
        if options.save:
            tables.save(results, limits, options.save, name, skipped)

    results, skipped, code = measured(options, shapes, limits, console, keep)
    if code not in (INTERRUPTED, LOST):
        limits = limits.better_of(ceilings.measure(options.device))  # what else the machine does changes
    console.print(tables.heading(limits))
    for rows in (tables.rows(results, limits), tables.others(results), tables.left_out(skipped)):
        if len(rows) > 1:
            console.print(tables.table(rows))
    wrong = [f"{r.case.op}, {r.case.shape}: {', '.join(r.wrong)}" for r in results if r.wrong]
    for names in wrong:
        console.print(f"{names}: wrong", style="bold red")
    if options.save:
        run = tables.save(results, limits, options.save, name, skipped)
        if problem := picture(run, options.save / f"{name}.png"):
            console.print(problem)
    return code or int(bool(wrong))

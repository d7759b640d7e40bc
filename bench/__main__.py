"""`python -m bench`: every operation beside its rivals, in one run."""

from __future__ import annotations

import argparse
import gc
import importlib
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench import ceilings, report
from bench.timing import OURS, measure
from twotower_kernels import cpu

FILES = ("attention", "moe", "linear", "mamba2", "adaln", "remask", "model")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", action="append", choices=FILES, help="only this family; may be given again")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each program is timed at least (default: 1)")
    parser.add_argument("--ours", action="store_true", help="without the rivals, and so without checks")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/NAME.json and NAME.md")
    parser.add_argument("--name", help="of the files that are written (default: the CPU's instruction set, or ops)")
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    limits, results = ceilings.measure(options.device), []
    console.print(report.heading(limits), highlight=False)
    for name in track(options.op or FILES, description="measuring", console=console, transient=True):
        for case in importlib.import_module(f"bench.bench_{name}").cases(options.device):
            if options.ours:
                case = replace(case, programs={OURS: case.programs[OURS]})
            try:
                results.append(measure(case, options.seconds, options.device))
            except NotImplementedError as error:
                console.print(f"{case.op}, {case.shape}: skipped, {error}", highlight=False, markup=False)
                continue
            console.print("  ".join(report.cells(results[-1], limits)), highlight=False)
            gc.collect()
    limits = limits.better_of(ceilings.measure(options.device))  # what else the machine does changes
    console.print(report.heading(limits), highlight=False)
    console.print(report.table(results, limits))
    if options.save:
        name = options.name or (cpu.kernels().isa() if options.device == "cpu" else "ops")
        report.save(results, limits, options.save, name)


if __name__ == "__main__":
    main()

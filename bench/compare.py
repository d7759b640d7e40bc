"""Two commits side by side on this machine: `python -m bench.compare BASE [HEAD]`, or `make bench-compare BASE=...`.

Each commit is checked out and compiled in a folder of its own under build/compare. Both are timed by this checkout's
benchmarks, ours alone, in processes that take turns and change places every round, so that what else the machine does
falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from twotower_kernels.bench.command import FILES
from twotower_kernels.bench.measure.timing import OURS
from twotower_kernels.bench.report.checkout import ROOT
from twotower_kernels.options.flags import integer, number

Case = tuple[str, str, str]  # op, shape, dtype
Medians = Mapping[Case, float]  # seconds


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def prepared(commit: str) -> Path:
    """The commit's own package, compiled, with this checkout's benchmarks where they fit."""
    folder = ROOT / "build" / "compare" / commit
    if not folder.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(folder), commit)
    if (folder / "twotower_kernels" / "options" / "flags.py").exists():
        shutil.rmtree(folder / "bench")
        shutil.copytree(ROOT / "bench", folder / "bench")
    else:  # its modules lie where these benchmarks do not look for them; its own measure the same
        print(f"{commit}: older than this layout of the package, and timed by its own benchmarks", file=sys.stderr)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True)
    return folder


def medians(folder: Path, ops: Sequence[str], seconds: float) -> Medians:
    """One round of a commit's operations, in a process of its own."""
    options = [option for op in ops for option in ("--op", op)]
    # --rivals is the flag's oldest name, which older commits know.
    command = [sys.executable, "-m", "twotower_kernels.bench", "--rivals", "none", "--seconds", str(seconds)]
    command += ["--save", "build", "--name", "round"]
    environment, path = {**os.environ, "PYTHONPATH": str(folder)}, folder / "build" / "round.json"
    path.unlink(missing_ok=True)
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": [], "skipped": []}
    if done.returncode:
        reasons = [f"{s['op']}: {s['reason']}" for s in saved["skipped"]] or done.stderr.strip().splitlines()[-1:]
        said = "; ".join(reasons) or "no message"
        raise SystemExit(f"{folder.name}: its package does not run this checkout's benchmarks: {said}")
    found = saved["results"]
    return {(r["op"], r["shape"], r["dtype"]): r["seconds"][OURS]["median"] for r in found}


def ratios(base: Sequence[Medians], head: Sequence[Medians]) -> dict[Case, tuple[float, float, float, float]]:
    """Per case that both have: head's median seconds over the rounds; base's seconds over head's in each round, their
    median, lowest and highest."""
    found = {}
    for case in head[0]:
        if case in base[0]:
            each = [before[case] / after[case] for before, after in zip(base, head, strict=True)]
            seconds = statistics.median(after[case] for after in head)
            found[case] = seconds, statistics.median(each), min(each), max(each)
    return found


def table(found: Mapping[Case, tuple[float, float, float, float]], base: str, head: str) -> Table:
    shown = Table()
    for name in ("op", "shape", "dtype"):
        shown.add_column(name)
    for name in (f"{head}, µs", f"times as fast as {base}", "spread"):
        shown.add_column(name, justify="right")
    for case, (seconds, ratio, low, high) in found.items():
        shown.add_row(*case, f"{seconds * 1e6:.1f}", f"{ratio:.2f}×", f"{low:.2f} to {high:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", default="HEAD", help="the commit it is compared with (default: HEAD)")
    parser.add_argument("--op", action="append", choices=FILES, help="only this family; may be given again")
    parser.add_argument("--rounds", type=integer(1, 1000), default=5, help="that each commit is timed (default: 5)")
    parser.add_argument(
        "--seconds", type=number(0, most=3600), default=0.3, help="of each case in a round (default: 0.3)"
    )
    options = parser.parse_args()
    if ROOT is None:
        parser.error("expected a checkout, which has commits to compare; these benchmarks are installed")
    try:
        names = [git("rev-parse", "--short", "--verify", f"{name}^{{commit}}") for name in (options.base, options.head)]
    except subprocess.CalledProcessError as error:
        parser.error(f"expected two commits: {error.stderr.strip()}")
    folders = [prepared(name) for name in names]
    rounds: tuple[list[Medians], list[Medians]] = [], []
    for turn in range(options.rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            rounds[side].append(medians(folders[side], options.op or FILES, options.seconds))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(ratios(*rounds), *names))


if __name__ == "__main__":
    main()

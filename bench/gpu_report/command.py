"""One report of a machine: what held, and how fast it was, beside predictions and ceilings.

Part by part, each in a process of its own, saved as it goes. Nothing in it says who made it or where.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.gpu_report import runner
from twotower_kernels.bench.gpu_report.page import page
from twotower_kernels.bench.gpu_report.parts import Part, parts
from twotower_kernels.bench.gpu_report.runner import DONE, HELD, INTERRUPTED
from twotower_kernels.bench.report.saved import write_json, write_text

FORMAT = 1
FOLDER = Path("twotower-gpu-report")
STOPPED = 130  # the exit code after Ctrl-C


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    found.add_argument(
        "--device", default="cuda", choices=("cpu", "cuda"), help="of what (default: cuda, the first GPU)"
    )
    found.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"for its files (default: {FOLDER})")
    found.add_argument(
        "--resume", action="store_true", help="go on with the report in FOLDER: parts that are done stay"
    )
    found.add_argument("--part", action="append", metavar="NAME", help="only this one; may be given again")
    return found


def begun(device: str) -> dict[str, Any]:
    """A report without parts."""
    about = {"format": FORMAT, "made by": "twotower gpu-report", "twotower_kernels": tt.__version__, "device": device}
    return about | {"date": datetime.date.today().isoformat(), "finished": False, "parts": []}


def resumed(path: Path, device: str) -> dict[str, Any]:
    """The report in a file.

    Raises:
        ValueError: there is none, or one of another version or device.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        of = {name: found[name] for name in ("format", "twotower_kernels", "device")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: expected a report in {path}, got {type(error).__name__}: {error}") from None
    here = begun(device)
    for name, value in of.items():
        if value != here[name]:
            raise ValueError(f"--resume: expected {name} {here[name]}, the report in {path} is of {value}")
    return found


def chosen(device: str, names: Sequence[str] | None) -> list[Part]:
    found = parts(device)
    known = [part.name for part in found]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--part: expected {', '.join(known)}, got {name}")
    return [part for part in found if not names or part.name in names]


def save(report: dict[str, Any], folder: Path, entries: list[dict[str, Any]]) -> None:
    """The file to send and the page to read, as of now: these parts, and of the others what there was before."""
    order = [part.name for part in parts(report["device"])]
    known = {entry["part"]: entry for entry in [*report["parts"], *entries]}
    report["parts"] = [known[name] for name in order if name in known]
    report["finished"] = all(name in known and known[name]["state"] in DONE for name in order)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", page(report))


def made(report: dict[str, Any], wanted: Sequence[Part], folder: Path) -> int:
    """Runs what is wanted into a report, and says what to do with it. Returns 0 if everything held, 1 if not, 130 after
    Ctrl-C."""
    say = partial(print, flush=True)
    keep = partial(save, report, folder)
    entries = runner.run(wanted, folder, report["parts"], keep, say)
    keep(entries)
    states = [entry["state"] for entry in entries]
    say(f"{states.count(HELD)} of {len(wanted)} parts held.")
    for entry in entries:
        if entry["state"] != HELD:
            say(f"  {entry['title']}: {runner.outcome(entry)}")
    if not set(states) <= set(DONE):
        say(f"Not every part came to its end: with --resume --out {folder} the same command tries those again.")
    say(f"To read: {folder / 'report.md'}")
    say(f"To send, attached to an issue of twotower_kernels: {folder / 'report.json'}")
    if INTERRUPTED in states:
        return STOPPED
    return int(states.count(HELD) < len(wanted))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench.gpu_report.command") -> int:
    """Runs the command line (default: the process's own). Returns 0 if everything held, 1 if something did not, 2 if it
    cannot begin, 130 after Ctrl-C."""
    reader = parser(prog)
    options = reader.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        reader.error("--device cuda: expected a GPU, PyTorch sees none (--device cpu reports on the processor)")
    path = options.out / "report.json"
    try:
        wanted = chosen(options.device, options.part)
        report = resumed(path, options.device) if options.resume else begun(options.device)
        if path.exists() and not options.resume:
            raise ValueError(f"--out: {options.out} holds a report already; --resume goes on with it")
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        reader.error(str(error))
    return made(report, wanted, options.out)


if __name__ == "__main__":
    raise SystemExit(main())

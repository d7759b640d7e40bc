"""Runs a report's parts, each in a process of its own, and keeps what is known after each.

A part that takes too long is interrupted as by Ctrl-C, which lets it write what it has, and killed after that. A part
that crashes, or takes the GPU from its process, costs itself alone. What a part had written until then is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twotower_kernels.bench.gpu_report.parts import Part
from twotower_kernels.bench.gpu_report.privacy import cleaned
from twotower_kernels.bench.measure.device import LOST
from twotower_kernels.bench.report.checkout import ROOT

HELD, FAILED, HUNG, CRASHED, INTERRUPTED = "held", "failed", "hung", "crashed", "interrupted"
DONE = (HELD, FAILED)  # the states of a part that came to its end
GRACE = 10.0  # seconds between an interruption and the end
SAYS = 20.0  # seconds between two lines of progress
LINES = 40  # that are kept of what a part printed
LONGEST = 500  # characters of such a line

Say = Callable[[str], None]


def _environment() -> dict[str, str]:
    """A checkout that is not installed is found from the folder of a part, too."""
    found = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    if ROOT is not None:
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def _signalled(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
    """To a part and everything that it started, which are one group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, which)


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Interrupted, then killed. A process that waits for a driver may outlive even that: it is left behind."""
    for which in (signal.SIGINT, signal.SIGKILL):
        _signalled(process, which)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            break
    _signalled(process, signal.SIGKILL)  # what it started and left behind


def said(log: Path) -> list[str]:
    """The last lines that a part printed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
    return [line[:LONGEST] for line in lines if line][-LINES:]


def _waited(process: subprocess.Popen[bytes], part: Part, log: Path, say: Say) -> bool:
    """Whether a part came to its end in time; what it is at is said meanwhile."""
    begun = time.monotonic()
    spoken = begun
    while True:
        left = part.seconds - (time.monotonic() - begun)
        try:
            process.wait(max(0.0, min(left, 1.0)))
            return True
        except subprocess.TimeoutExpired:
            if left <= 0:
                return False
        if time.monotonic() - spoken > SAYS:
            spoken = time.monotonic()
            say(f"    {spoken - begun:.0f} s: {(said(log) or ['...'])[-1][:100]}")


def _state(code: int | None, in_time: bool) -> str:
    if not in_time:
        return HUNG
    if code is None or code < 0 or code == LOST:
        return CRASHED
    return HELD if code == 0 else FAILED


def _result(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it came to write none
        return None


def run_part(part: Part, folder: Path, say: Say) -> dict[str, Any]:
    """A part as the report holds it, whatever happens to it."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True) as name:
        work = Path(name).resolve()
        log = work / "said.txt"
        command = [sys.executable, *part.words, "--save", str(work)]
        begun = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                in_time = _waited(process, part, log, say)
                state = _state(process.returncode, in_time)
            except KeyboardInterrupt:
                state = INTERRUPTED
            finally:
                _ended(process)
        code = process.returncode
        entry: dict[str, Any] = {"part": part.name, "title": part.title, "state": state}
        entry |= {"exit code": code, "seconds": round(time.monotonic() - begun, 1), "limit": part.seconds}
        if code is not None and code < 0 and state == CRASHED:
            entry["signal"] = signal.Signals(-code).name
        if code == LOST:
            entry["lost"] = "the GPU was lost to the process"
        return entry | cleaned({"said": said(log), "result": _result(work / part.result)})


def run(
    parts: Sequence[Part],
    folder: Path,
    before: Sequence[dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
    say: Say,
) -> list[dict[str, Any]]:
    """The parts, in order; those that came to their end before are kept. `save` is told after each what there is until
    then. Ctrl-C ends the part that runs, and leaves out those behind it."""
    kept = {entry["part"]: entry for entry in before if entry["state"] in DONE}
    found: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        head = f"[{number}/{len(parts)}] {part.title}"
        if part.name in kept:
            say(f"{head}: kept, {kept[part.name]['state']}")
            found.append(kept[part.name])
            continue
        say(f"{head}: at most {part.seconds:.0f} s")
        entry = run_part(part, folder, say)
        say(f"    {outcome(entry)}")
        found.append(entry)
        save(found)
        if entry["state"] == INTERRUPTED:
            break
    return found


def outcome(entry: dict[str, Any]) -> str:
    """What became of a part, in a few words."""
    state, seconds = entry["state"], f"{entry['seconds']:.0f} s"
    if state == HUNG:
        return f"{HUNG}: ended after {seconds}"
    if state == CRASHED:
        why = entry.get("signal") or entry.get("lost") or f"exit code {entry['exit code']}"
        return f"{CRASHED}: {why} after {seconds}"
    return f"{state}, {seconds}"

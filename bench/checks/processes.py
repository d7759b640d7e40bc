"""Checks shared by processes. One that hangs, crashes, or takes the GPU from its process costs its own result alone:
another process goes on behind it.

A process says on its standard output, a line each: `begins NUMBER LABEL`, then `held`, or `refused LABEL: why`, or
`FAILED LABEL: why`. Whatever else it says is printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower_kernels.bench.measure.device import LOST
from twotower_kernels.bench.report.saved import write_json

BEGINS, HELD, REFUSED, FAILED = "begins ", "held", "refused ", "FAILED "
HANGS = 80.0  # seconds without a word, after which a process is ended
SAVES, SPEAKS = 2.0, 15.0  # seconds between two writings of what was found, and two lines about it
INTERRUPTED = 130


@dataclass
class Tally:
    """What was found, of so many checks, written to a file as it comes in."""

    device: str
    checks: int
    path: Path | None = None
    held: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    saved: float = 0.0
    spoken: float = field(default_factory=time.perf_counter)
    lock: Any = field(default_factory=threading.Lock)

    def take(self, line: str) -> bool:
        """Counts what a process says of a check. Returns whether it is to be printed."""
        with self.lock:
            if line.rstrip() == HELD:
                self.held += 1
            for kind, entries in ((REFUSED, self.refused), (FAILED, self.failed)):
                if line.startswith(kind):
                    label, _, why = line.removeprefix(kind).rstrip().partition(": ")
                    entries.append({"check": label, "why": why})
            if time.perf_counter() > self.saved + SAVES:
                self.save()
            if time.perf_counter() > self.spoken + SPEAKS:
                self.spoken = time.perf_counter()
                print(f"so far: {self}", flush=True)
        return not line.startswith(BEGINS) and line.rstrip() != HELD

    def save(self) -> None:
        self.saved = time.perf_counter()
        if self.path is not None:
            write_json(self.path, self.entry())

    def entry(self) -> dict[str, Any]:
        """As it is saved. What is in none of the three did not come to its end."""
        counts = {"device": self.device, "checks": self.checks, "held": self.held}
        return counts | {"refused": self.refused, "failed": self.failed, "seconds": time.perf_counter() - self.begun}

    def __str__(self) -> str:
        left = self.checks - self.held - len(self.refused) - len(self.failed)
        others = [f"{len(self.failed)} failed"] + [f"{len(self.refused)} refused"] * bool(self.refused)
        others += [f"{left} without a result"] * bool(left)
        seconds = time.perf_counter() - self.begun
        return f"{self.held} of {self.checks} checks held, {', '.join(others)}, in {seconds:.0f} s"


def ended(command: Sequence[str], environment: dict[str, str], tally: Tally) -> tuple[int, str]:
    """Runs a process, counting what it says. Its exit code, negative if a signal ended it, and what began last: number
    and label. A process that says nothing for long is ended."""
    began = ""
    child = subprocess.Popen(
        command, env=environment, text=True, bufsize=1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    while True:
        timer = threading.Timer(HANGS, child.kill)
        timer.start()
        line = child.stdout.readline()
        timer.cancel()
        if not line:
            return child.wait(), began
        if line.startswith(BEGINS):
            began = line.removeprefix(BEGINS).rstrip()
        if tally.take(line):
            print(line, end="", flush=True)


def share_in_processes(number: int, shares: int, program: Sequence[str], tally: Tally) -> int:
    """A share of the checks in a process, and behind one that ends it, in another. Returns how many did not end well.

    program: words behind `python -m` that run checks."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // shares))}
    command = [sys.executable, "-m", *program, "--share", str(number), str(shares)]
    first, bad = 0, 0
    while True:
        code, began = ended([*command, "--first", str(first)], os.environ | threads, tally)
        bad += code != 0
        if code in (0, 1, INTERRUPTED, -signal.SIGINT):
            return bad
        if began:
            index, label = began.split(" ", 1)
            why = "the GPU is lost to its process" if code == LOST else f"its process ended with {code}"
            line = f"{FAILED}{label}: {why}, or said nothing for {HANGS:.0f} s; another one goes on"
            first = int(index) + 1
        else:
            line = f"{FAILED}share {number} of {shares}: its process ended with {code} before it began"
        if code != LOST:  # then it has said itself what failed
            tally.take(line)
        print(line, flush=True)
        if not began:
            return bad


def in_processes(jobs: int, program: Sequence[str], tally: Tally) -> int:
    """The checks in so many processes: most of their time goes into compiling kernels. Returns how many processes did
    not end well."""
    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(lambda number: share_in_processes(number, jobs, program, tally), range(jobs)))

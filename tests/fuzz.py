"""Searches for failures: `python -m tests.fuzz --minutes 10`.

Runs all properties, with other seeds each time, until the time is over. What fails is printed with the blob that
reproduces it and kept in tests/data/found, where every later run of the tests replays it. Ends with 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time

from tests.found import FOLDER
from tests.paths import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search (default: 10)")
    parser.add_argument("--workers", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("tests", nargs="*", default=["tests"], help="where (default: in all of tests)")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(options.workers), "-m", "hypothesis"]
    command += ["--hypothesis-profile=fuzz", "-p", "no:cacheprovider", *options.tests]
    end, rounds, failed = time.monotonic() + 60 * options.minutes, 0, False
    before = set(FOLDER.glob("*.json"))
    while (left := end - time.monotonic()) > 0:
        with subprocess.Popen(command, cwd=ROOT) as run:
            try:
                failed |= run.wait(left) != 0
                rounds += 1
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)  # so that it says what has failed until then
    kept = sorted(set(FOLDER.glob("*.json")) - before)
    print(f"{rounds} rounds and a part of one; {len(kept)} failures kept", *kept, sep="\n", flush=True)
    sys.exit(failed or bool(kept))


if __name__ == "__main__":
    main()

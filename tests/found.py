"""What `make fuzz` has found: a file per failure in tests/data/found, which every later run of that test replays.

A file holds the test, the failing example as Hypothesis prints it, and the blob from which this version of Hypothesis
makes the example again. Where it no longer can, because the test draws otherwise or Hypothesis is another, the test
fails and says so: then write the example into the test by hand (`@example`, or a test of its own) and remove the file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import reproduce_failure
from hypothesis.errors import DidNotReproduce, InvalidArgument

from tests.paths import ROOT

FOLDER = ROOT / "tests" / "data" / "found"


def keep(test: str, error: BaseException) -> Path | None:
    """Writes down what a property failed with. None: Hypothesis has made no blob of it."""
    text = "\n".join(getattr(error, "__notes__", []))
    match = re.search(r"@reproduce_failure\('([^']*)', b('[^']*')\)", text)
    if match is None:
        return None
    version, blob = match[1], ast.literal_eval(match[2])
    name = re.sub(r"\W+", "_", test.split("::")[-1])
    path = FOLDER / f"{name}-{hashlib.sha256(blob.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    example = re.split(r"\nExplanation:|\n\n?You can reproduce", text)[0].splitlines()
    failure = {"test": test, "hypothesis": version, "blob": blob, "example": example}
    path.write_text(json.dumps(failure, indent=1) + "\n", encoding="utf-8")
    return path


def of_test(test: str) -> Iterator[tuple[Path, str, bytes]]:
    """The files of a test, each with Hypothesis's version and blob."""
    for path in sorted(FOLDER.glob("*.json")):
        failure = json.loads(path.read_text(encoding="utf-8"))
        if failure["test"] == test:
            yield path, failure["hypothesis"], failure["blob"].encode()


def replay(item: pytest.Function) -> None:
    """Runs a test on what was found with it. Raises what it fails with."""
    for path, version, blob in of_test(item.nodeid):
        test = reproduce_failure(version, blob)(item.obj)
        try:
            item.runtest()
        except (DidNotReproduce, InvalidArgument) as error:
            if "completed successfully" not in str(error):
                raise AssertionError(f"{path.name} is no longer replayed, see tests/found.py: {error}") from error
        finally:
            test._hypothesis_internal_use_reproduce_failure = None

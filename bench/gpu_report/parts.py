"""What a report is made of: programs of the benchmarks, each with the time that it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAMILIES = ("attention", "moe", "linear", "mamba2", "adaln", "remask")
BENCH = "twotower_kernels.bench"


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        words: what stands behind `python`; `--save FOLDER` is added, into which it writes `result`.
        seconds: after which it is ended.
    """

    name: str
    title: str
    words: Sequence[str]
    seconds: float
    result: str


def part(name: str, title: str, seconds: float, module: str, *words: str, result: str | None = None) -> Part:
    return Part(name, title, ["-m", module, *words], seconds, result or f"{name}.json")


def times(family: str, device: str) -> Part:
    """A family's operations beside the best composition of PyTorch; on a CPU at small sizes, which fit anywhere."""
    words = ["--device", device, "--op", family, "--baselines", "best", "--name", "times"]
    if device == "cpu":
        words += ["--shapes", "small", "--seconds", "0.2"]
    if family == "attention":
        words += ["--batch", "1", "--context", "4096", "--context", "8192" if device == "cpu" else "131072"]
    return part(f"times of {family}", f"times: {family}", 300, BENCH, *words, result="times.json")


def parts(device: str) -> list[Part]:
    """Of a report, in their order: what is short and says most comes first."""
    on = ("--device", device)
    found = [
        part("machine", "versions, driver, card", 90, f"{BENCH}.gpu_report.machine", *on),
        part("ceilings", "memory and matrix products, measured", 180, f"{BENCH}.measure.ceilings", *on),
    ]
    if device == "cuda":
        found.append(part("smoke", "every kernel compiled, every operation called", 300, f"{BENCH}.gpu_smoke"))
    found.append(part("checks", "every operation and the models, checked", 900, f"{BENCH}.checks", *on))
    found += [times(family, device) for family in FAMILIES]
    found.append(part("writing", "the shipped model writes", 300, f"{BENCH}.gpu_report.writing", *on))
    if device == "cuda":
        sizes = ("--size", "1,4096", "--size", "1,131072")
        found.append(part("model", "steps of the released size", 300, f"{BENCH}.gpu_model", *sizes))
        found.append(part("switches", "what only measurement decides", 180, f"{BENCH}.gpu_switches"))
    return found

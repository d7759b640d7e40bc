"""A generation, watched: seconds of its prefill, its steps and its commits, and the memory it takes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

import twotower_kernels as tt

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> int | None:
    """The most bytes of memory that were resident since the last call; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text(encoding="utf-8"))
        FORGET.write_text("5", encoding="utf-8")  # proc(5): the peak is set to what is resident now
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def generated(
    model: tt.TwoTowerModel, prompts: Tensor, prefill: Callable[..., tt.ContextState] | None = None, **options: Any
) -> tuple[dict[str, Any], list[tt.StepEvent]]:
    """One generation, watched: what it cost, and its events.

    What is counted lies between the end of the first block (in the autoregressive modes: of the first token) and that
    of the last, so that a commit belongs to every block as it does in a long text.

    Args:
        prompts: [B, T].
        prefill: makes the state that the generation starts from; None: the model does, from the prompts.
        options: of `tt.TwoTowerModel.stream`.

    Returns:
        "block seconds" (median, from the end of a block, in speculative of a draft, to that of the next), "tokens per
        second" (of the batch, at that rate), "tokens per NFE" (of all that is counted), "step seconds" and "commit
        seconds" (medians; None without un-masking steps behind a block's first), "prefill seconds", and the most bytes
        resident meanwhile: "prefill bytes" during the prefill, "bytes" after it, None where the system does not say.

    Raises:
        ValueError: fewer than two blocks.
    """
    fill, filled = prefill or model.prefill, {}

    def watched(*arguments: Any) -> tt.ContextState:
        peak()
        start = time.perf_counter()
        state = fill(*arguments)
        filled["prefill seconds"], filled["prefill bytes"] = time.perf_counter() - start, peak()
        return state

    model.prefill = watched  # type: ignore[method-assign]
    try:
        marks = [(time.perf_counter(), event) for event in model.stream(prompts, **options)]
    finally:
        del model.prefill
    ends = [i for i, (_, event) in enumerate(marks) if event.committed]
    if len(ends) < 2:
        raise ValueError(f"max_new_tokens: expected two blocks at least, got {len(ends)}")
    finished = [marks[i] for i in ends]
    block = statistics.median(b - a for (a, _), (b, _) in pairwise(finished))
    spans = [(after, b - a) for (a, _), (b, after) in pairwise(marks)]  # each until its event
    steps = [span for event, span in spans if not event.committed and event.step > 0]
    begins = [span for event, span in spans if not event.committed and event.step == 0]  # a commit and a step
    step = statistics.median(steps) if steps else None
    tokens = [int(e.after.numel() if e.accepted is None else e.accepted.sum()) for _, e in finished]
    nfe = [int(event.nfe.sum()) for _, event in finished]
    return {
        **filled,
        "block seconds": block,
        "tokens per second": statistics.fmean(tokens[1:]) / block,
        "tokens per NFE": sum(tokens[1:]) / (nfe[-1] - nfe[0]),
        "step seconds": step,
        "commit seconds": statistics.median(begins) - step if begins and step is not None else None,
        "bytes": peak(),
    }, [event for _, event in marks]

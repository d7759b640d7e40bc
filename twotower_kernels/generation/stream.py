"""A generation in progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from twotower_kernels.generation.request import Request
from twotower_kernels.generation.results import GenerateResult, StepEvent


class Stream(Iterator[StepEvent]):
    """A generation in progress: an iterator over its events, and what it has written so far.

    The model works while the next event is asked for. Whoever stops asking, closes the stream or is interrupted
    (Ctrl-C) keeps every finished block: `result` says what they are. A stream that was interrupted does not go on.
    """

    def __init__(
        self,
        request: Request,
        events: Generator[StepEvent, None, None],
        seconds: float,
        under: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """
        Args:
            request: what the events are about.
            events: a loop over it.
            seconds: spent on it so far.
            under: decorates what computes, so that it does so without gradients.
        """
        self._events, self._seconds = events, seconds
        self._next, self._result = under(events.__next__), under(request.result)

    def __next__(self) -> StepEvent:
        start = time.perf_counter()
        try:
            event: StepEvent = self._next()
            return event
        finally:
            self._seconds += time.perf_counter() - start

    def close(self) -> None:
        """Ends the generation and gives its memory back; `result` remains."""
        self._events.close()

    def result(self) -> GenerateResult:
        """What has been generated so far; a row that has not ended has the finish reason "interrupted"."""
        result: GenerateResult = self._result(self._seconds)
        return result

    def run(self, on_step: Callable[[StepEvent], object] | None = None) -> GenerateResult:
        """Goes on to the end, shows each event to `on_step`, and returns the result."""
        for event in self:
            if on_step is not None:
                on_step(event)
        return self.result()

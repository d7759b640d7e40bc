"""The demo: one prompt, continued three times, and what each way of writing cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from twotower_kernels.cli.show import Painter, Printer, costs, verdict, watch
from twotower_kernels.generation import GenerateResult
from twotower_kernels.model.generate import generate, stream
from twotower_kernels.model.two_tower import TwoTowerModel

FRAME = 0.05  # seconds that a token of autoregression is shown for, at least; the other modes in proportion
TRIED = 0.5  # seconds in which the number of threads is chosen


class Demo:
    """A model and a prompt, to be continued token by token, by drafts, and by blocks.

    Args:
        prompt, ids: the text and its tokens, [1, T].
        options: of `generate`, for every mode.
        threshold: of block diffusion, and for drafts of several steps.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        tokenizer: Tokenizer,
        prompt: str,
        ids: list[list[int]],
        options: dict[str, Any],
        *,
        threshold: float,
    ) -> None:
        size = model.config.block_size or 16
        self.model, self.tokenizer, self.prompt, self.ids, self.options = model, tokenizer, prompt, ids, options
        self.modes: dict[str, dict[str, Any]] = {
            "autoregressive": dict(mode="ar"),
            "speculative": dict(mode="speculative", block_size=min(size, 16)),
            "block diffusion": dict(block_size=size, confidence_threshold=threshold),
        }

    def run(self, console: Console, threads: int | None = None) -> bool:
        """Shows every mode, in a terminal in slow motion, and then what they cost. Returns whether they came to their
        ends, or were interrupted."""
        for mode in self.modes.values():  # first calls are slow
            self._write(mode, 2)
        if threads is None:
            threads = self.fastest_threads()
            torch.set_num_threads(threads)
        start = time.perf_counter()
        self._write(self.modes["autoregressive"], 9)
        slower = FRAME / ((time.perf_counter() - start) / 9) if console.is_terminal else 1.0
        results: dict[str, GenerateResult] = {}
        finished = True
        for name, mode in self.modes.items():
            if not finished:
                break
            console.rule(name, style="dim")
            painter = self._painter(console, name)
            events = stream(self.model, self.ids, **mode, **self.options)
            if name == "autoregressive" and not console.is_terminal:  # a token is no line
                ends, most = self.options["eos_token_id"], self.options["max_new_tokens"]
                printer = Printer(self.tokenizer, [self.prompt], max_new_tokens=most, eos_token_id=ends)
                finished, results[name] = watch(events, printer), events.result()
                continue
            finished, results[name] = watch(events, painter, slower), events.result()
            console.print(painter.page(0, results[name].new_tokens[0].tolist()), soft_wrap=True)
        console.print(costs(console, results))
        if finished:
            console.print(f"text identical to AR: {self.identical(results)}")
            console.print(verdict(results))
            shown = f", shown {slower:.0f} times slower than it was written" if slower > 1 else ""
            console.print(f"{threads} thread{'s' * (threads != 1)}{shown}")
        return finished

    @staticmethod
    def identical(results: dict[str, GenerateResult]) -> str:
        """Which modes wrote what autoregression wrote, in words."""
        (_, alone), *others = results.items()
        same = [(name, torch.equal(alone.new_tokens[0], result.new_tokens[0])) for name, result in others]
        return ", ".join(f"{name} {'yes' if equal else 'no'}" for name, equal in same)

    def fastest_threads(self) -> int:
        """Of one thread and as many as PyTorch would take, the number with which drafts are faster. With other work on
        the machine, several threads wait for each other."""
        most = torch.get_num_threads()
        if most == 1:
            return 1
        spent: dict[int, list[float]] = {1: [], most: []}
        begun = time.perf_counter()
        while time.perf_counter() - begun < TRIED or not all(spent.values()):
            for count, times in spent.items():
                torch.set_num_threads(count)
                start = time.perf_counter()
                self._write(self.modes["speculative"], 8)
                times.append(time.perf_counter() - start)
        return min(spent, key=lambda count: sorted(spent[count])[len(spent[count]) // 2])

    def _painter(self, console: Console, name: str) -> Painter:
        c = self.model.config
        drafts = name == "speculative"
        ends = dict(mask_token_id=c.mask_token_id, eos_token_id=c.eos_token_id)
        return Painter(console, self.tokenizer, [self.prompt], **ends, drafts=drafts)  # type: ignore[arg-type]

    def _write(self, mode: dict[str, Any], count: int) -> None:
        """A few tokens, to no purpose but the time it takes."""
        count = min(count, self.options["max_new_tokens"])
        generate(self.model, self.ids, **mode, **self.options | {"max_new_tokens": count, "eos_token_id": None})

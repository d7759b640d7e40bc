"""Generation made visible: blocks that un-mask in place in a terminal, one line per step elsewhere."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import groupby, takewhile
from operator import itemgetter
from types import TracebackType

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from twotower_kernels.generation import GenerateResult, StepEvent, Stream

BLANK = "░"  # a place that is still masked
NEW = "bold black on green"
DRAFT = "bright_black italic"  # what a draft proposes, until it is verified

# A model may write any character, and some of them steer a terminal.
_UNPRINTABLE = {i: "\N{REPLACEMENT CHARACTER}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class Painter:
    """Paints the events of a generation as they come; a context manager, inside which a terminal is painted on.

    In a terminal the rows share the screen, each with the end of its text. What is painted vanishes afterwards: the
    text itself is for the caller to print. Elsewhere every un-masking step is a line, of drafts every one that was
    verified.

    With `drafts` (mode "speculative") what a draft proposes is grey; of a finished one the accepted tokens become text,
    and the others vanish.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        prompts: list[str],
        *,
        mask_token_id: int,
        eos_token_id: int | tuple[int, ...],
        drafts: bool = False,
    ) -> None:
        self.console, self.tokenizer, self.prompts = console, tokenizer, prompts
        self.mask, self.drafts = mask_token_id, drafts
        self.ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        self.done: list[list[int]] = [[] for _ in prompts]  # per row, the tokens of its finished blocks
        self.block: list[Text] = [Text() for _ in prompts]  # per row, the block it works on
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Painter:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: StepEvent) -> None:
        rows, finished = event.rows.tolist(), event.finished if event.committed else []
        for i, row in enumerate(rows):
            if event.committed:
                self.done[row] += takewhile(lambda token: token not in self.ends, finished[i])
                if event.accepted is not None and self.live is None:
                    self._draft_line(event, row, finished[i], event.after[i].tolist()[len(finished[i]) :])
                self.block[row] = Text()
            elif self.drafts:
                self.block[row] = self.paint_draft(event.after[i].tolist())
            else:
                self.block[row] = self.paint(event.before[i].tolist(), event.after[i].tolist())
                if self.live is None:
                    self._line(event, i, row)
        if self.live:
            self.live.update(self._screen(rows), refresh=True)

    def page(self, row: int, tokens: list[int]) -> Text:
        """A row's prompt, dim, and the text of these tokens after it."""
        return Text.assemble((printable(self.prompts[row]), "dim"), self.decode(tokens))

    def paint(self, before: list[int], after: list[int]) -> Text:
        """A block after a step: masks dim, the tokens that this very step changed highlighted."""
        styles = [
            "dim" if new == self.mask else "" if new == old else NEW for old, new in zip(before, after, strict=True)
        ]
        text = Text()
        for style, run in groupby(zip(styles, after, strict=True), key=itemgetter(0)):
            tokens = [token for _, token in run]  # decoded together, because a character may span several tokens
            text.append(BLANK * len(tokens) if style == "dim" else self.decode(tokens), style)
        return text

    def paint_draft(self, tokens: list[int]) -> Text:
        """A draft: its first token, which is known, then in grey what the denoiser proposes, and masks."""
        text = Text(self.decode(tokens[:1]))
        for masked, run in groupby(tokens[1:], key=lambda token: token == self.mask):
            proposed = list(run)
            text.append(*((BLANK * len(proposed), "dim") if masked else (self.decode(proposed), DRAFT)))
        return text

    def decode(self, tokens: list[int]) -> str:
        return printable(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _line(self, event: StepEvent, i: int, row: int) -> None:
        place = f"block {event.block:2d}  step {event.step:2d}  {int(event.num_masked[i]):2d} masked"
        self._print(row, f"{place}  │{one_line(self.block[row].plain)}│")

    def _draft_line(self, event: StepEvent, row: int, accepted: list[int], rejected: list[int]) -> None:
        place = f"draft {event.block:2d}  {len(accepted):2d} of {len(accepted) + len(rejected):2d} accepted"
        self._print(row, f"{place}  │{one_line(self.decode(accepted))}│{one_line(self.decode(rejected))}│")

    def _print(self, row: int, text: str) -> None:
        place = f"row {row:2d}  " if len(self.prompts) > 1 else ""
        self.console.print(Text(place + text), soft_wrap=True)

    def _screen(self, rows: list[int]) -> Text:
        """As many rows as fit, those that are being worked on first, each with the last lines of its text."""
        height = max(1, self.console.height - 1)
        others = [row for row in range(len(self.prompts)) if row not in set(rows)]
        shown = sorted([*rows, *others][: max(1, height // 3)])
        lines = max(1, height // len(shown) - (len(shown) > 1))  # a blank line between rows
        return Text("\n\n").join(self._tail(row, lines) for row in shown)

    def _tail(self, row: int, lines: int) -> Text:
        """The last lines of a row. Only as much is decoded as can be seen, so that a long text costs no more."""
        width, done = self.console.width, self.done[row]
        room = lines * width
        start = self.page(row, done) if len(done) <= room else Text(self.decode(done[-room:]))
        text = start + self.block[row]
        recent = text[max(0, len(text) - room) :]
        return Text("\n").join(recent.wrap(self.console, width, overflow="fold")[-lines:])


class Printer:
    """Prints texts as they are written, where no terminal is painted: a prompt, then each of its blocks when finished.

    Of several prompts, one after the other: a text waits until those before it are complete. A context manager, which
    prints at its end whatever still waits.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int, eos_token_id: int | tuple[int, ...]
    ) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.most = max_new_tokens
        self.ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        self.tokens: list[list[int]] = [[] for _ in prompts]  # per row, cut as the result is
        self.complete = [not max_new_tokens] * len(prompts)
        self.row, self.begun = 0, False  # the one that is being printed
        self.start, self.read, self.shown = 0, 0, ""  # of its tokens: from `start`, up to `read`, is `shown`

    def __enter__(self) -> Printer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.complete = [True] * len(self.prompts)
            self._go_on()

    def __call__(self, event: StepEvent) -> None:
        if not event.committed:
            return
        for row, new in zip(event.rows.tolist(), event.finished, strict=True):
            count = len(list(takewhile(lambda token: token not in self.ends, new)))
            self.tokens[row] = (self.tokens[row] + new[: count + 1])[: self.most]
            self.complete[row] = count < len(new) or len(self.tokens[row]) == self.most
        self._go_on()

    def _go_on(self) -> None:
        """Prints what can be: more of this row; where it is complete, the next."""
        while self.row < len(self.prompts):
            if not self.begun:
                head = f"--- prompt {self.row + 1}\n" if len(self.prompts) > 1 else ""
                self._print(head + self.prompts[self.row])
                self.begun = True
            self._more(self.complete[self.row])
            if not self.complete[self.row]:
                return
            self._print("\n")
            self.row, self.begun, self.start, self.read, self.shown = self.row + 1, False, 0, 0, ""

    def _more(self, complete: bool) -> None:
        """Prints this row's new tokens: what they add to the text of those before them, whose end a decoder may need.
        A character of which only the first bytes are there waits for the others."""
        tokens = self.tokens[self.row]
        text = self.tokenizer.decode(tokens[self.start :], skip_special_tokens=True)
        if not complete and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        self._print(text[len(self.shown) :])
        self.start, self.read = self.read, len(tokens)
        self.shown = self.tokenizer.decode(tokens[self.start :], skip_special_tokens=True)

    @staticmethod
    def _print(text: str) -> None:
        print(text, end="", flush=True)


def watch(events: Stream, show: Painter | Printer | None, slower: float = 1.0) -> bool:
    """Runs a stream, shown if it is to be, to its end or to Ctrl-C. Returns whether it came to its end.

    slower: each event is shown so many times as long after the first as it came.
    """
    try:
        with show or nullcontext():
            showing, begun = 0.0, time.perf_counter()
            for event in events:
                if show:
                    spent = time.perf_counter() - begun
                    time.sleep(max(0.0, (spent - showing) * slower - spent) if slower > 1 else 0)
                    show(event)
                    showing += time.perf_counter() - begun - spent
        return True
    except KeyboardInterrupt:
        events.close()
        return False


def before_masks(
    tokenizer: Tokenizer, mask_token_id: int, prompts: list[str], ids: list[list[int]]
) -> tuple[list[str], list[int]]:
    """What stands before the first mask of each prompt: its text, and how many of its tokens."""
    mask = tokenizer.id_to_token(mask_token_id) or ""
    lengths = [row.index(mask_token_id) if mask_token_id in row else len(row) for row in ids]
    cut = [length < len(row) for length, row in zip(lengths, ids, strict=True)]
    return [text.partition(mask)[0] if some else text for text, some in zip(prompts, cut, strict=True)], lengths


def one_line(text: str) -> str:
    """The text with its line ends and tabs made visible."""
    return text.replace("\n", "⏎").replace("\t", "→")


def printable(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return text.translate(_UNPRINTABLE)


def fitting(console: Console, table: Table, lines: list[str]) -> RenderableType:
    """The table, or where the console is too narrow for its words these lines, which say the same."""
    wide = console.measure(table, options=console.options.update(width=1000)).maximum
    return table if wide <= console.width else Text("\n".join(["", *lines, ""]))


def costs(console: Console, results: dict[str, GenerateResult]) -> RenderableType:
    """One line per mode: what it wrote, in how many calls of a tower, how many tokens of a draft were accepted, and how
    fast it was."""
    table, lines = Table(box=box.SIMPLE_HEAD, pad_edge=False), []
    table.add_column("mode")
    names = ("new tokens", "NFE", "tokens per NFE", "accepted", "tokens/s")
    for name in names:
        table.add_column(name, justify="right")
    for mode, result in results.items():
        count, accepted = sum(map(len, result.new_tokens)), result.accepted
        kept = "" if accepted is None else f"{accepted:.2f}"
        values = f"{count}", f"{sum(result.nfe)}", f"{result.tokens_per_nfe:.2f}", kept, f"{speed(result):.1f}"
        table.add_row(mode, *values)
        lines += [mode, *(f"  {name}: {value}" for name, value in zip(names, values, strict=True) if value)]
    return fitting(console, table, lines)


def verdict(results: dict[str, GenerateResult]) -> str:
    """Why a mode was faster than autoregression, the first of them, or slower: what a round cost, in tokens of
    autoregression, and how many tokens it brought. A round is a draft and its verification, or a block that was
    denoised and committed. Empty if nothing was written."""
    (first, alone), *others = results.items()
    tokens = sum(map(len, alone.new_tokens))
    if not (tokens and alone.seconds and all(sum(r.verifications or r.nfe) for _, r in others)):
        return ""
    said = []
    for mode, result in others:
        drafts = result.verifications is not None
        rounds = sum(result.verifications or result.nfe)
        what = "a draft and its verification" if drafts else "a call of the denoiser, commits included,"
        cost = result.seconds / rounds / (alone.seconds / tokens)
        brought = sum(map(len, result.new_tokens)) / rounds
        said.append(f"{mode}: {what} took {cost:.1f} times as long as a token of {first} and brought {brought:.1f}.")
    return "\n".join(said)


def speed(result: GenerateResult) -> float:
    """New tokens per second, over all rows."""
    return sum(map(len, result.new_tokens)) / result.seconds if result.seconds else 0.0

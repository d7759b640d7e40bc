"""Painting: what a terminal shows while text is generated."""

import functools
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.model.small_model import EOS, MASK, package_model, save_small_model
from twotower_kernels.cli.show import BLANK, DRAFT, Painter, Printer, costs, printable, verdict, watch
from twotower_kernels.generation import GenerateResult, StepEvent
from twotower_kernels.model.generate import stream
from twotower_kernels.model.two_tower import TwoTowerModel


@functools.cache
def generated(rows: int) -> list[StepEvent]:
    """The events of a generation of two blocks in each of several rows."""
    with tempfile.TemporaryDirectory() as folder:
        model = TwoTowerModel.from_pretrained(save_small_model(Path(folder)))
    return list(stream(model, [[5] * (row + 1) for row in range(rows)], max_new_tokens=8, block_size=4))


@settings(max_examples=25)
@given(rows=st.integers(1, 5), width=st.integers(4, 30), height=st.integers(1, 14))
def test_a_screen_holds_the_ends_of_the_texts(rows: int, width: int, height: int) -> None:
    """In a terminal: never more lines than it has, and of every row that is shown the newest characters."""
    painter, events = painted(rows, width, height)
    screens = []
    for event in events:
        painter(event)
        screens.append(painter._screen(event.rows.tolist()).plain)
    for screen in screens:
        assert len(screen.split("\n")) <= max(1, height - 1)
        assert all(len(line) <= width for line in screen.split("\n"))
    ends = [painter.page(row, painter.done[row]).plain[-1] for row in range(rows)]
    assert {part[-1] for part in screens[-1].split("\n\n")} <= set(ends)
    assert any(BLANK in screen for screen in screens)


def painted(rows: int, width: int, height: int, eos: int = EOS) -> tuple[Painter, list[Any]]:
    """A painter on a terminal of this size, and the events of a generation to be painted."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor")
    words: Any = type("Words", (), {"decode": lambda self, ids, **_: "".join(chr(ord("a") + i) for i in ids)})()
    events = generated(rows)
    prompts = ["x" * (row + 1) for row in range(rows)]
    return Painter(console, words, prompts, mask_token_id=MASK, eos_token_id=eos), events


def test_a_step_highlights_what_it_changed() -> None:
    painter, _ = painted(1, 30, 10)
    text = painter.paint([MASK, 5, MASK, MASK], [6, 5, MASK, 7])
    assert text.plain == f"gf{BLANK}h"
    assert [(span.start, span.end, span.style) for span in text.spans] == [
        (0, 1, "bold black on green"),
        (2, 3, "dim"),
        (3, 4, "bold black on green"),
    ]


def test_a_long_text_is_shown_by_its_end() -> None:
    """Also when the screen has no room for a character of each token."""
    painter, _ = painted(1, 5, 4)
    painter.done[0] = [i % 20 for i in range(1000)]
    assert painter._screen([0]).plain == "fghij\nklmno\npqrst"


def test_a_row_is_shown_up_to_its_end() -> None:
    """What a finished block holds after the EOS is no text."""
    _, events = painted(1, 30, 10)
    tokens = [int(token) for event in events if event.committed for token in event.after[0]]
    last = tokens[1]  # of the first block
    painter, events = painted(1, 30, 10, eos=last)
    painter(next(event for event in events if event.committed))
    assert painter.done[0] == tokens[: tokens.index(last)]


def test_a_terminal_is_painted_and_left_clean() -> None:
    painter, events = painted(2, 30, 10)
    with painter:
        for event in events:
            painter(event)
    output = painter.console.file.getvalue()  # type: ignore[attr-defined]
    assert BLANK in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is back
    assert output.rstrip().endswith("\x1b[2K")  # and the last lines are erased


def test_text_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9bc\td\n") == "a�[2Jb���c\td\n"


def result(seconds: float, nfe: int, tokens: int = 12, verifications: int | None = None) -> GenerateResult:
    drafts = None if verifications is None else [verifications]
    return GenerateResult([], [torch.zeros(tokens)], [nfe], ["length"], seconds, verifications=drafts)


def test_the_verdict_is_the_arithmetic_of_the_table() -> None:
    """Twelve tokens in three seconds; beside them four calls of half a second, and two drafts of one."""
    modes = {"ar": result(3.0, 12), "blocks": result(2.0, 4), "drafts": result(2.0, 4, verifications=2)}
    assert verdict(modes).splitlines() == [
        "blocks: a call of the denoiser, commits included, took 2.0 times as long as a token of ar and brought 3.0.",
        "drafts: a draft and its verification took 4.0 times as long as a token of ar and brought 6.0.",
    ]
    assert verdict({"ar": result(0.0, 0, 0), "blocks": result(0.0, 0, 0)}) == ""


@pytest.mark.parametrize("width", [40, 80])
def test_costs_fit_the_terminal(width: int) -> None:
    """No figure and no word is cut."""
    console = Console(file=io.StringIO(), width=width)
    modes = {"autoregressive": result(3.0, 12), "speculative": result(2.0, 4, verifications=2)}
    console.print(costs(console, modes | {"block diffusion": result(2.0, 4)}))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, output.splitlines())) <= width
    for word in (
        "block diffusion",
        "autoregressive",
        "new tokens",
        "tokens per NFE",
        "tokens/s",
        "accepted",
        "3.00",
        "6.00",
    ):
        assert word in output


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def drafted(terminal: bool) -> Painter:
    """A painter that was shown a draft of which two tokens were accepted: on its way, then finished."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=40, height=10)
    words: Any = Letters()
    painter = Painter(console, words, ["x"], mask_token_id=MASK, eos_token_id=EOS, drafts=True)
    row, filled = torch.zeros(1, dtype=torch.int64), torch.tensor([[5, 6, 7, 8]])
    masks = torch.tensor([[5, MASK, MASK, MASK]])
    painter(StepEvent(0, 0, False, row, masks, torch.tensor([[5, 6, 7, MASK]]), row + 1, row + 1))
    if terminal:
        text = painter.block[0]
        assert text.plain == f"fgh{BLANK}"
        assert [(span.start, span.end, span.style) for span in text.spans] == [(1, 3, DRAFT), (3, 4, "dim")]
    painter(StepEvent(0, 1, True, row, filled, filled, row, row + 2, accepted=row + 2))
    return painter


def test_of_a_draft_the_accepted_tokens_become_text_and_the_others_vanish() -> None:
    painter = drafted(terminal=True)
    assert painter.done[0] == [5, 6] and painter.block[0].plain == ""
    assert painter._screen([0]).plain == "xfg"


def test_a_draft_is_a_line_where_no_terminal_is() -> None:
    output = drafted(terminal=False).console.file.getvalue()  # type: ignore[attr-defined]
    assert output == "draft  0   2 of  4 accepted  │fg│hi│\n"


def test_slow_motion_keeps_the_proportions_and_the_result() -> None:
    """Each event is shown so many times as long after the start as it came, and costs nothing that is counted."""
    with tempfile.TemporaryDirectory() as folder:
        model = TwoTowerModel.from_pretrained(save_small_model(Path(folder)))
    events = stream(model, [[5]], mode="ar", max_new_tokens=4)
    start = time.perf_counter()
    assert watch(events, None, slower=20)
    quick = events.result().seconds
    assert time.perf_counter() - start < 20 * quick, "without a painter nothing waits"
    painter, _ = painted(1, 30, 10)
    events = stream(model, [[5]], mode="ar", max_new_tokens=4)
    start = time.perf_counter()
    assert watch(events, painter, slower=20)
    shown = time.perf_counter() - start
    assert shown > 10 * events.result().seconds and len(painter.done[0]) > 0


# --- without a terminal ---------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("utf-8", "replace")


def finished(row: int, tokens: bytes) -> StepEvent:
    """A block that has been finished."""
    block, none = torch.tensor([list(tokens)]), torch.zeros(1, dtype=torch.int64)
    return StepEvent(0, 1, True, torch.tensor([row]), block, block, none, none)


def printer(prompts: list[str], most: int = 100) -> Printer:
    words: Any = Bytes()
    return Printer(words, prompts, max_new_tokens=most, eos_token_id=ord("$"))


def test_a_block_is_printed_when_it_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """And a character when its last byte is there, or the text's."""
    out = []
    with printer(["so "]) as show:
        for block in (b"it ", "wäre".encode()[:2], "wäre".encode()[2:], "€".encode()[:2]):
            show(finished(0, block))
            out.append(capsys.readouterr().out)
    assert out == ["so it ", "", "wäre", ""]
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_a_text_is_cut_as_the_result_is(capsys: pytest.CaptureFixture[str]) -> None:
    with printer([""], most=5) as show:
        show(finished(0, b"abc"))
        show(finished(0, b"def"))
    assert capsys.readouterr().out == "abcde\n"
    with printer([""]) as show:
        show(finished(0, b"ab$c"))
    assert capsys.readouterr().out == "ab$\n"


def test_texts_are_printed_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """The second waits for the end of the first, and the third has none."""
    with printer(["1", "2", "3"]) as show:
        show(finished(1, b"c"))
        show(finished(0, b"a"))
        assert capsys.readouterr().out == "--- prompt 1\n1a"
        show(finished(1, b"d$"))
        assert capsys.readouterr().out == ""
        show(finished(0, b"b$"))
        assert capsys.readouterr().out == "b$\n--- prompt 2\n2cd$\n--- prompt 3\n3"
    assert capsys.readouterr().out == "\n"


def test_nothing_is_printed_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), printer(["prompt"]):
        raise ValueError("wrong")
    assert capsys.readouterr().out == ""


def test_of_a_draft_what_counts_is_shown() -> None:
    """In a terminal and elsewhere: the text of the tokens that were accepted, and no more."""
    model, rows = package_model(), [[5], [6, 7]]
    events = stream(model, rows, mode="speculative", max_new_tokens=9, block_size=4)
    painter, _ = painted(2, 40, 12)
    printer = Printer(painter.tokenizer, ["", ""], max_new_tokens=9, eos_token_id=())
    for event in events:
        painter(event)
        printer(event)
    assert painter.done == printer.tokens == [new.tolist() for new in events.result().new_tokens]
    assert printer.complete == [True, True]

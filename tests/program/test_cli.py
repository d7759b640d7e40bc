"""The command `twotower`: what it prints, and what it says when it cannot."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import twotower_kernels
from tests.model.small_model import BOS, EOS, save_small_model
from tests.paths import ROOT
from tests.program.command_line import run
from twotower_kernels.cli import command as cli
from twotower_kernels.cli.show import BLANK
from twotower_kernels.model.generate import generate, stream
from twotower_kernels.model.two_tower import TwoTowerModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("--mode ar --max-new-tokens 9", {"mode": "ar", "max_new_tokens": 9}),
        (
            "--mode mock_ar --temperature 1.5 --top-k 5 --top-p 0.9 --seed -1",
            {"mode": "mock_ar", "temperature": 1.5, "top_k": 5, "top_p": 0.9, "seed": -1},
        ),
        (
            "--mode speculative --draft-steps 2 --block-size 5 --max-new-tokens 9",
            {"mode": "speculative", "draft_steps": 2, "block_size": 5, "max_new_tokens": 9},
        ),
        (
            "--threshold 0.3 --steps 3 --block-size 5 --max-new-tokens 12",
            {"confidence_threshold": 0.3, "steps_per_block": 3, "block_size": 5, "max_new_tokens": 12},
        ),
    ],
)
def test_generate_is_the_function(
    folder: Path,
    model: TwoTowerModel,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    options: dict[str, Any],
) -> None:
    """Each flag is its argument; a file of prompts is a batch; a prompt is preceded by the token that begins a text."""
    prompts = ["abc", "de", "a"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('"abc"\n\n{"prompt": "de", "id": 7}\r\n"\\u0061"', encoding="utf-8")
    assert run("generate", "--prompt-file", file, "--model", folder, "--json", *flags.split()) == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    ids = [[BOS, *tokenizer.encode(prompt).ids] for prompt in prompts]
    want = generate(model, ids, **{"max_new_tokens": 64, "eos_token_id": EOS, **options})
    for row, record in enumerate(records):
        new = want.new_tokens[row].tolist()
        assert record.pop("seconds") > 0
        drafts = {} if want.verifications is None else {"accepted": len(new) / want.verifications[row]}
        assert record == drafts | {
            "prompt": prompts[row],
            "text": tokenizer.decode(new),
            "tokens": len(new),
            "nfe": want.nfe[row],
            "tokens_per_nfe": len(new) / want.nfe[row],
            "finish_reason": want.finish_reason[row],
        }
    assert len(records) == 3
    assert err == ""


@pytest.mark.parametrize("how", ["argument", "dash", "piped"])
def test_a_prompt_and_its_continuation(
    folder: Path,
    model: TwoTowerModel,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Piped: the text and nothing else; its costs go to the other output. The last newline of the input is not text, as
    little as the mark before it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfabc\r\n")))
    prompt = {"argument": ["abc"], "dash": ["-"], "piped": []}[how]
    assert run("generate", *prompt, "--model", folder, "--max-new-tokens", 6) == 0
    out, err = capsys.readouterr()
    want = generate(model, [[BOS, *tokenizer.encode("abc").ids]], max_new_tokens=6, eos_token_id=EOS)
    assert out == "abc" + tokenizer.decode(want.new_tokens[0].tolist()) + "\n"
    assert err.startswith(f"twotower: 6 tokens, NFE {want.nfe[0]}, ")
    assert err.count("\n") == 1


def test_texts_of_several_prompts_are_told_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"abc"\n"de"\n', encoding="utf-8")
    assert run("generate", "--prompt-file", file, "--model", folder, "--max-new-tokens", 0) == 0
    assert capsys.readouterr().out == "--- prompt 1\nabc\n--- prompt 2\nde\n"


def test_weights_devices_and_threads_are_as_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoregressive mode reads the context tower alone."""
    asked: list[Any] = []
    load = TwoTowerModel.from_pretrained

    def noted(path: Path, **options: Any) -> TwoTowerModel:
        asked.append(options)
        return load(path, dtype=options["dtype"], towers=options["towers"])  # on the CPU, wherever it was asked for

    monkeypatch.setattr(TwoTowerModel, "from_pretrained", noted)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    flags = ["generate", "abc", "--model", folder, "--max-new-tokens", 1]
    assert run(*flags, "--dtype", "float32", "--threads", 3) == 0
    assert run(*flags, "--mode", "ar") == 0
    assert run(*flags, "--device", "cuda", "--denoiser-device", "cuda:1") == 0
    devices = {"device": "cpu", "context_device": None, "denoiser_device": None}
    there = {"device": "cuda", "context_device": None, "denoiser_device": "cuda:1"}
    assert asked == [
        3,
        {"dtype": torch.float32, "towers": "both", **devices},
        {"dtype": None, "towers": "context", **devices},
        {"dtype": None, "towers": "both", **there},
    ]


def test_the_block_is_the_models_unless_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A larger one is warned about, in a line."""
    save_small_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_size": 4}), encoding="utf-8")
    flags = ["generate", "abc", "--model", tmp_path, "--max-new-tokens", 4, "--json"]
    assert run(*flags) == 0
    assert capsys.readouterr().err == ""
    assert run(*flags, "--block-size", 8) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("twotower: warning: block_size 8 is larger than the 4")


def test_masks_in_a_prompt_are_filled_in(
    folder: Path, model: TwoTowerModel, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """In block diffusion; the text is what follows the part before the first mask."""
    ids = [BOS, *tokenizer.encode("ab<mask><mask>c").ids]
    assert ids[3:5] == [model.config.mask_token_id] * 2
    want = generate(model, [ids], max_new_tokens=6, eos_token_id=EOS)
    text = tokenizer.decode(want.sequences[0][3:].tolist(), skip_special_tokens=True)
    command = ("generate", "ab<mask><mask>c", "--model", folder, "--max-new-tokens", 6)
    assert run(*command) == 0
    assert capsys.readouterr().out == f"ab{text}\n" and text[2:3] == "c"
    assert run(*command, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["tokens"]) == (text, len(want.new_tokens[0])) and record["prompt"] == command[1]
    new = generate(model, [ids], mode="ar", max_new_tokens=6, eos_token_id=EOS).new_tokens[0].tolist()
    assert run(*command, "--json", "--mode", "ar") == 0
    assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(new, skip_special_tokens=True)


# --- interruption ---------------------------------------------------------------------------------------------------


class Interrupted:
    """A stream during which Ctrl-C is pressed after two finished blocks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.events = stream(*args, **options)
        self.result, self.close = self.events.result, self.events.close

    def __iter__(self) -> Iterator[Any]:
        finished = 0
        for event in self.events:
            yield event
            finished += event.committed
            if finished == 2:
                raise KeyboardInterrupt


@pytest.mark.parametrize("flags", [["--json"], []])
def test_ctrl_c_prints_what_was_generated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    command = ["generate", "abc", "--model", folder, "--block-size", 4, *flags]
    assert run(*command, "--max-new-tokens", 8) == 0
    want = capsys.readouterr().out
    monkeypatch.setattr(cli, "stream", Interrupted)
    assert run(*command, "--max-new-tokens", 40) == 130
    out, err = capsys.readouterr()
    if flags:
        got = json.loads(out)
        assert got["finish_reason"] == "interrupted"
        assert got["text"] == json.loads(want)["text"]
    else:
        assert out == want
        assert err.endswith("; interrupted\n")


def test_a_piped_text_comes_block_by_block(folder: Path) -> None:
    """A process of its own, read while it writes; it goes on when there is no end of it in sight."""
    command = [sys.executable, "-m", "twotower_kernels", "generate", "abc", "--model", str(folder), "--threads", "1"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([*command, "--max-new-tokens", "1000000"], **options) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(40)
        assert first.startswith(b"abc")
        assert process.poll() is None
        process.stdout.close()  # as head does
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert run("generate", "abc") == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_as_a_signal(folder: Path) -> None:
    """A process of its own, interrupted after the first step that it shows."""
    command = [sys.executable, "-m", "twotower_kernels", "demo", "--model", str(folder), "--prompt", "abc"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "cwd": ROOT}
    # A parent that ignores the signal (a job in the background) would hand that down.
    with subprocess.Popen(
        [*command, "--max-new-tokens", "100000", "--threads", "1"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        **options,
    ) as process:
        assert process.stdout is not None
        assert "autoregressive" in process.stdout.readline()
        assert process.stdout.read(3) == "abc"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == ""
    assert "new tokens" in out
    assert "speculative" not in out


# --- demo -----------------------------------------------------------------------------------------------------------

MODES_SHOWN = ("autoregressive", "speculative", "block diffusion")


def test_demo_shows_every_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Piped: a line per draft, and per call of block diffusion, masks visible; each text, and what they cost."""
    assert run("demo", "--model", folder, "--prompt", "abc", "--max-new-tokens", 20) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("block ") and "masked" in line]
    for line in steps:
        assert f" {line.count(BLANK)} masked" in line
    drafts = [line for line in lines if line.startswith("draft ")]
    accepted = [int(line.split()[2]) for line in drafts]
    assert sum(accepted) == 20 and min(accepted) > 0
    rows = [(name, line.strip()) for line in lines for name in MODES_SHOWN if line.strip().startswith(f"{name}  ")]
    table = {name: line.removeprefix(name).split() for name, line in rows}
    assert all(row[0] == "20" and float(row[-1]) > 0 for row in table.values())
    assert table["autoregressive"][1:3] == ["20", "1.00"]
    assert int(table["block diffusion"][1]) == len(steps) > 2
    verified = sum(" of  1 " not in line for line in drafts)  # a last known token needs no draft
    assert float(table["speculative"][3]) == pytest.approx(20 / verified, abs=0.01)
    assert [name for name in lines if name.strip("─ ") in MODES_SHOWN] and sum(x.startswith("abc") for x in lines) == 3
    (identical,) = (line for line in lines if line.startswith("text identical to AR: "))
    assert "speculative yes" in identical
    assert any(line.startswith("speculative: a draft and its verification took") for line in lines)


def test_demo_shows_the_shipped_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(twotower_kernels, "demo_path", lambda: asked.append("shipped") or folder)
    assert run("demo", "--max-new-tokens", 1) == 0
    assert asked == ["shipped"]


# --- as it is installed ---------------------------------------------------------------------------------------------


def test_the_command_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts["twotower"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["generate"], ["demo"], ["info"]):
        assert run(*command, "--help") == 0
        assert "usage: twotower" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"twotower-kernels {twotower_kernels.__version__}\n"

"""What the command `twotower` says when it cannot: one line, exit code 2."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.model.small_model import save_small_model
from tests.program.command_line import error_of, run
from twotower_kernels.cli import command as cli
from twotower_kernels.cli.prompts import prompt_file
from twotower_kernels.model.two_tower import TwoTowerModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: COMMAND"),
        ("write", "invalid choice: 'write'"),
        ("generate a b", "unrecognized arguments: b"),
        ("generate a --mode diffusion", "--mode: invalid choice: 'diffusion'"),
        ("generate a --max-new-tokens -1", "--max-new-tokens: expected an integer from 0 to 1000000, got '-1'"),
        ("generate a --max-new-tokens 1.5", "--max-new-tokens: expected an integer"),
        ("generate a --block-size 0", "--block-size: expected an integer from 1 to 65536, got '0'"),
        ("generate a --steps 0", "--steps: expected"),
        ("generate a --threads 0", "--threads: expected"),
        ("generate a --threshold nan", "--threshold: expected a finite number, got 'nan'"),
        ("generate a --threshold 1e400", "--threshold: expected a finite number, got '1e400'"),
        ("generate a --temperature inf", "--temperature: expected a finite number"),
        ("generate a --temperature nan", "--temperature: expected"),
        ("generate a --top-k x", "--top-k: expected"),
        ("generate a --top-p 0", "--top-p: expected a finite number, above 0, at most 1, got '0'"),
        ("generate a --seed 18446744073709551616", "--seed: expected an integer from -9223372036854775808 to 1844"),
        ("generate a --dtype int8", "--dtype: invalid choice"),
        ("generate a --device gpu", "--device: expected cpu, cuda, or cuda with a number, as in cuda:1, got 'gpu'"),
        ("generate a --context-device meta", "--context-device: expected cpu, cuda"),
        ("demo --device cuda:99", "device: expected a device of this machine, got 'cuda:99'"),
        ("generate a --device cuda:1000", "--device: expected cpu, cuda, or cuda with a number"),
        ("generate a --model nowhere", "no model in nowhere: no such folder here, and nothing is downloaded\n"),
        ("generate a --model an-org/a_model.1", "and nothing is downloaded; `hf download an-org/a_model.1 --local-dir"),
        ("info an-org/a-model", "and nothing is downloaded; `hf download an-org/a-model --local-dir FOLDER` does that"),
        ("generate a --model ./nowhere", "and nothing is downloaded\n"),
        ("info pyproject.toml", "expected a folder with config.json, got a file"),
        ("generate a --prompt-file x", "expected a prompt or --prompt-file, got both"),
        ("generate --prompt-file nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("demo --model nowhere", "no model in nowhere"),
        ("info nowhere", "nowhere"),
    ],
)
def test_a_bad_command_line_is_one_line(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert message in error_of(capsys, *line.split())


OPTIONS = {
    "--block-size": "an integer from 1 to 65536",
    "--threads": "an integer from 1 to 1024",
    "--steps": "an integer from 1 to 65536",
    "--max-new-tokens": "an integer from 0 to 1000000",
    "--top-k": "an integer from 0 to 2147483647",
    "--seed": "an integer from -9223372036854775808 to 18446744073709551615",
    "--temperature": "a finite number, 0 or more, at most 1e+06",
    "--top-p": "a finite number, above 0, at most 1",
    "--threshold": "a finite number",
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", [str(2**70), "-" + "9" * 5000, "1e400", "-1e400", "nan", "inf", "", "0x1p3", "two"])
def test_a_number_out_of_range_is_refused_at_once(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named with the option, the range and the beginning of what came, before anything is loaded."""
    if option == "--threshold" and value == str(2**70):
        return  # a number that no confidence exceeds
    monkeypatch.setattr(cli, "_load", None)
    error = error_of(capsys, "generate", "a", f"{option}={value}")
    shown = repr(value) if len(value) <= 40 else f"{value[:40]!r}..."
    assert f"argument {option}: expected {OPTIONS[option]}, got {shown} " in error


@pytest.mark.parametrize("prompt", [["generate", ""], ["demo", "--prompt", ""]])
def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str], prompt: list[str]) -> None:
    assert "prompt: expected text, got an empty prompt" in error_of(capsys, *prompt)


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_standard_input_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert "standard input: expected text, got an empty prompt" in error_of(capsys, "generate")


def test_a_terminal_is_not_waited_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert "expected a prompt, --prompt-file, or text" in error_of(capsys, "generate")


def test_a_standard_input_that_is_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "expected a prompt, --prompt-file, or text" in error_of(capsys, "generate")


LATIN = "expected UTF-8 text, got byte 0xe9 at offset 3; is it Latin-1? iconv -f latin1 -t utf-8 converts it"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_standard_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Whatever the locale says: the byte, and where it is."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding=encoding))
    assert f"standard input: {LATIN}" in error_of(capsys, "generate", "-")


@pytest.mark.parametrize("command", [["generate"], ["demo", "--prompt"]])
def test_an_argument_that_is_no_text(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert f"prompt: {LATIN}" in error_of(capsys, *command, os.fsdecode(b"caf\xe9"))


def test_a_file_without_end_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_kernels.cli.prompts.MOST_BYTES", 1000)
    wanted = "expected at most 1000 bytes of prompts, got more"
    assert f"/dev/zero: {wanted}" in error_of(capsys, "generate", "--prompt-file", "/dev/zero")
    with open("/dev/zero", encoding="utf-8") as zeros:
        monkeypatch.setattr("sys.stdin", zeros)
        assert f"standard input: {wanted}" in error_of(capsys, "generate")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a prompt per line, got none"),
        (b'"a"\n\nabc\n', "line 3: not JSON"),
        (b'"a"\n"\xff"\n', "line 2: not JSON"),
        (b'"a"\n7\n', "line 2: expected a string"),
        (b'{"text": "a"}', "line 1: expected a string"),
        (b'["a"]', "line 1: expected a string"),
        (b'"a"\n""', "line 2: expected text, got an empty prompt"),
        (b'"\\ud800"', "line 1: expected text, got half a character"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    error = error_of(capsys, "generate", "--prompt-file", file)
    assert str(file) in error
    assert message in error


@settings(max_examples=200)
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from([b'"a"', b"\n", b'{"prompt":', b"}", b"[", b"\x00"])).map(b"".join)
)
def test_any_prompt_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(content)
    try:
        prompts = prompt_file(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert prompts
        assert all(prompts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "config.json: not valid JSON"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", b"\x08", "model.safetensors: truncated or not a safetensors file"),
    ],
)
def test_a_broken_model_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    path = save_small_model(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert message in error_of(capsys, "generate", "abc", "--model", tmp_path)


def test_a_token_outside_the_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that belongs to another model."""
    save_small_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["!"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "prompts[0]: expected tokens of a vocabulary of 24, got 24" in error_of(
        capsys, "generate", "a!", "--model", tmp_path
    )


def test_a_reader_that_has_gone_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `twotower generate ... | head -1`: no traceback, and nothing left to be flushed into the closed pipe."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert run("generate", "abc", "--model", folder, "--max-new-tokens", 1) == 1


@pytest.mark.parametrize("command", [["--help"], ["info"], ["generate", "abc", "--max-new-tokens", "9"]])
def test_an_output_that_takes_nothing_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A full disk: said once, and nothing is left to be flushed."""
    options = ["--model", str(folder)] if command[0] == "generate" else []
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run(*command, *options) == 2
        full.write("x")
        full.flush()  # to where it takes everything
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("fails", [lambda: torch.empty(2**50), no_memory])
def test_too_little_memory_is_one_line(
    fails: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_, **__: fails())
    assert "error: not enough memory" in error_of(capsys, "generate", "abc")


def test_a_mistake_of_the_package_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run("generate", "abc")


def test_a_block_beyond_all_memory_is_refused(folder: Path) -> None:
    """By the function, too, before anything of that size is made."""
    model = TwoTowerModel.from_pretrained(folder)
    for name, most in (("block_size", "65536"), ("steps_per_block", "2147483647")):
        for value in (10**10, 2**63, 2**70):
            with pytest.raises(ValueError, match=f"{name}: expected 1 to {most}, got {value}"):
                model.generate([[5]], max_new_tokens=8, **{name: value})

"""What the command `twotower` says when it cannot: one line, exit code 2."""

import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.model.small_model import save_small_model
from tests.program.command_line import error_of, run
from twotower_kernels import cli


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
        ("generate a --max-new-tokens -1", "--max-new-tokens: expected an integer, 0 or more, got '-1'"),
        ("generate a --max-new-tokens 1.5", "--max-new-tokens: expected an integer"),
        ("generate a --block-size 0", "--block-size: expected an integer, 1 or more, got '0'"),
        ("generate a --steps 0", "--steps: expected"),
        ("generate a --threads 0", "--threads: expected"),
        ("generate a --threshold nan", "--threshold: expected a number, got 'nan'"),
        ("generate a --temperature inf", "--temperature: expected a finite number"),
        ("generate a --temperature nan", "--temperature: expected"),
        ("generate a --top-k x", "--top-k: expected"),
        ("generate a --top-p 0", "--top-p: expected a number above 0"),
        ("generate a --seed 18446744073709551616", "--seed: expected an integer of 64 bits"),
        ("generate a --dtype int8", "--dtype: invalid choice"),
        ("generate a --device gpu", "--device: expected cpu, cuda, or cuda with a number, as in cuda:1, got 'gpu'"),
        ("generate a --context-device meta", "--context-device: expected cpu, cuda"),
        ("demo --device cuda:99", "device: expected a device of this machine, got 'cuda:99'"),
        ("generate a --model nowhere", "no model in nowhere: config.json is missing"),
        ("generate a --prompt-file x", "expected a prompt or --prompt-file, got both"),
        ("generate --prompt-file nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("demo --model nowhere", "no model in nowhere"),
        ("info nowhere", "nowhere"),
    ],
)
def test_a_bad_command_line_is_one_line(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert message in error_of(capsys, *line.split())


@pytest.mark.parametrize("prompt", [["generate", ""], ["demo", "--prompt", ""]])
def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str], prompt: list[str]) -> None:
    assert "prompt: expected text, got an empty prompt" in error_of(capsys, *prompt)


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_standard_input_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert "standard input: expected text, got an empty prompt" in error_of(capsys, "generate")


def test_a_terminal_is_not_waited_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert "expected a prompt, --prompt-file, or text" in error_of(capsys, "generate")


def test_standard_input_that_is_no_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert "standard input: expected UTF-8 text" in error_of(capsys, "generate", "-")


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
        prompts = cli._prompt_file(file)
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

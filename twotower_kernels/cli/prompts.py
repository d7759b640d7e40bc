"""The prompts of a command line: an argument, a file of them, or the standard input."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**28


def asked(args: argparse.Namespace) -> list[str]:
    """The prompts that were asked for, from the one place they come from.

    Raises:
        ValueError: none, from two places, empty, not text, or without end.
    """
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise ValueError("expected a prompt or --prompt-file, got both")
        return prompt_file(args.prompt_file)
    if args.prompt is not None and args.prompt != "-":
        return [argument(args.prompt, "prompt")]
    if sys.stdin is None or (args.prompt is None and sys.stdin.isatty()):
        raise ValueError("expected a prompt, --prompt-file, or text on the standard input")
    text = _decoded(_read(sys.stdin.buffer, "standard input"), "standard input")
    text = text.replace("\r\n", "\n").removesuffix("\n")  # the newline with which a line of input ends
    return [_text(text, "standard input")]


def _read(file: BinaryIO, where: str) -> bytes:
    """All of a file that may have no end."""
    try:
        content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{where}: expected at most {MOST_BYTES} bytes of prompts, got more")
    return content


def _decoded(content: bytes, where: str) -> str:
    """UTF-8 as text, without the mark that some programs put before it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ValueError(
            f"{where}: expected UTF-8 text, got {byte}; is it Latin-1? iconv -f latin1 -t utf-8 converts it"
        ) from None


def argument(text: str, where: str) -> str:
    """A text from the command line, where Python keeps bytes that are no text as halves of characters."""
    return _text(_decoded(text.encode("utf-8", "surrogateescape"), where), where)


def prompt_file(path: Path) -> list[str]:
    """A prompt per line that is not blank: a JSON string, or an object with one under "prompt"."""
    try:
        with path.open("rb") as file:
            lines = _read(file, str(path)).removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:  # no such file
        raise ValueError(f"{path}: {error.strerror}") from None
    found = []
    for count, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {count}"
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond reason
                raise ValueError(f"{where}: not JSON: {error}") from None
            found.append(_text(value.get("prompt") if isinstance(value, dict) else value, where))
    if not found:
        raise ValueError(f"{path}: expected a prompt per line, got none")
    return found


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{where}: expected a string, or an object with a string "prompt"')
    if not value:
        raise ValueError(f"{where}: expected text, got an empty prompt")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        raise ValueError(f"{where}: expected text, got half a character") from None
    return value

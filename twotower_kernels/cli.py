"""The command `twotower`: generate text, watch it being generated, say what is installed.

Whatever a user can get wrong is one line on the standard error output and exit code 2. Ctrl-C prints what was generated
until then and ends with 130, as a shell expects it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import twotower_kernels
from twotower_kernels import info
from twotower_kernels.generate import MODES, GenerateResult, Stream, generate, stream
from twotower_kernels.model import TwoTowerModel
from twotower_kernels.show import Painter, costs, printable, speed

MASK = 3  # the released model's convention; no file says it
DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERRUPTED = 130  # 128 + SIGINT
PROMPT = '''def read_lines(filename):
    """Return the lines of a text file, without the newlines."""
'''.rstrip()

# What a user, a file or a machine can be the cause of. Anything else is a mistake in this package, and is shown whole.
EXPECTED = (OSError, ValueError, FloatingPointError, NotImplementedError, ImportError, torch.OutOfMemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's own) and returns its exit code."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # a terminal without some character shows another one
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        _say(f"error: {error}")
        return 2


def _say(text: str) -> None:
    """One line for the user."""
    print("twotower:", printable(" ".join(text.split())), file=sys.stderr)


# --- arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def _checked(kind: type, words: str, allowed: Callable[[Any], Any]) -> Callable[[str], Any]:
    """An argument type, checked before a model is loaded. Comparisons are written so that NaN fails them."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return value

    return parse


COUNT = _checked(int, "an integer, 0 or more", lambda n: n >= 0)
POSITIVE = _checked(int, "an integer, 1 or more", lambda n: n >= 1)
THRESHOLD = _checked(float, "a number", lambda x: not math.isnan(x))
TEMPERATURE = _checked(float, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
FRACTION = _checked(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
DEVICE = _checked(str, "cpu, cuda, or cuda with a number, as in cuda:1", re.compile(r"cpu|cuda(:\d+)?").fullmatch)
SEED = _checked(int, "an integer of 64 bits", lambda n: -(2**63) <= n < 2**64)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="twotower", description="Block diffusion text generation with a TwoTower model.")
    version = f"twotower-kernels {twotower_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    write = commands.add_parser("generate", help="continue one prompt, or a file of them", allow_abbrev=False)
    write.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - or nothing: standard input")
    write.add_argument("--prompt-file", type=Path, metavar="FILE", help='JSON lines: "text" or {"prompt": "text"}')
    write.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    write.add_argument("--mode", choices=MODES, default="mask_diffusion", help="who writes (default: %(default)s)")
    write.add_argument(
        "--block-size", type=POSITIVE, metavar="S", help="tokens per block (default: the model's, or 16)"
    )
    write.add_argument("--steps", type=POSITIVE, default=16, metavar="T", help="calls per block (default: 16)")
    write.add_argument("--top-k", type=COUNT, default=0, metavar="K", help="sample from the K likeliest (0: all)")
    write.add_argument("--top-p", type=FRACTION, default=1.0, metavar="P", help="sample from the nucleus (1: all)")
    write.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="watch the shipped model write, and what it costs", allow_abbrev=False)
    demo.add_argument("--prompt", default=PROMPT, help="text to continue (default: the head of a Python function)")
    demo.set_defaults(run=_demo)

    for command in (write, demo):
        command.add_argument("--max-new-tokens", type=COUNT, default=64, metavar="N", help="default: 64")
        command.add_argument(
            "--threshold", type=THRESHOLD, default=0.8, metavar="X", help="confidence that keeps a token (default: 0.8)"
        )
        command.add_argument(
            "--temperature", type=TEMPERATURE, default=0.0, metavar="X", help="default: 0, no sampling"
        )
        command.add_argument("--seed", type=SEED, default=0, metavar="N", help="default: 0")
        command.add_argument("--model", type=Path, metavar="PATH", help="a model folder (default: the shipped model)")
        command.add_argument("--dtype", choices=DTYPES, help="of weights and computation (default: the model's)")
        command.add_argument("--device", type=DEVICE, default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1")
        for tower in ("context", "denoiser"):
            command.add_argument(f"--{tower}-device", type=DEVICE, metavar="NAME", help=f"of the {tower} tower alone")
        command.add_argument("--threads", type=POSITIVE, metavar="N", help="default: PyTorch's choice")

    about = commands.add_parser("info", help="versions, kernels, devices; sizes of a checkpoint", allow_abbrev=False)
    about.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model folder")
    about.set_defaults(run=_info)

    # Its arguments are the benchmark's to read, --help too, so none of them begins an option here.
    timed = commands.add_parser("bench", help="time the kernels beside their rivals", add_help=False, prefix_chars="\0")
    timed.add_argument("arguments", nargs="*")
    timed.set_defaults(run=_bench)
    return parser


# --- prompts --------------------------------------------------------------------------------------------------------


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that were asked for, from the one place they come from.

    Raises:
        ValueError: none, from two places, empty, or not text.
    """
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise ValueError("expected a prompt or --prompt-file, got both")
        return _prompt_file(args.prompt_file)
    text = args.prompt
    if text is None and sys.stdin.isatty():
        raise ValueError("expected a prompt, --prompt-file, or text on the standard input")
    if text is None or text == "-":
        try:
            text = sys.stdin.read().removesuffix("\n")  # the newline with which a line of input ends
        except UnicodeDecodeError:
            raise ValueError("standard input: expected UTF-8 text") from None
        return [_text(text, "standard input")]
    return [_text(text, "prompt")]


def _prompt_file(path: Path) -> list[str]:
    """A prompt per line that is not blank: a JSON string, or an object with one under "prompt"."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond reason
                raise ValueError(f"{where}: not JSON: {error}") from None
            prompts.append(_text(value.get("prompt") if isinstance(value, dict) else value, where))
    if not prompts:
        raise ValueError(f"{path}: expected a prompt per line, got none")
    return prompts


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


# --- commands -------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace, towers: str = "both") -> tuple[TwoTowerModel, Tokenizer]:
    """The model and its tokenizer, from disk alone."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = twotower_kernels.demo_path() if args.model is None else args.model
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no model in {folder}: {name} is missing")
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    devices = {name: getattr(args, name) for name in ("device", "context_device", "denoiser_device")}
    return TwoTowerModel.from_pretrained(folder, dtype=dtype, towers=towers, **devices), tokenizer


def _ids(model: TwoTowerModel, tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """As in training: the token that begins a text, then the text."""
    return [[model.config.bos_token_id, *tokenizer.encode(text, add_special_tokens=False).ids] for text in prompts]


def _watch(events: Stream, painter: Painter | None) -> bool:
    """Runs a stream, painted if it is to be, to its end or to Ctrl-C. Returns whether it came to its end."""
    try:
        with painter or nullcontext():
            for event in events:
                if painter:
                    painter(event)
    except KeyboardInterrupt:
        events.close()
        return False
    return True


def _generate(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    model, tokenizer = _load(args, towers="context" if args.mode == "ar" else "both")
    events = stream(
        model,
        _ids(model, tokenizer, prompts),
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        block_size=args.block_size or model.config.block_size or 16,
        steps_per_block=args.steps,
        confidence_threshold=args.threshold,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        mask_token_id=MASK,
        eos_token_id=model.config.eos_token_id,
        seed=args.seed,
    )
    console = Console(highlight=False)
    painter = Painter(console, tokenizer, prompts, mask_token_id=MASK, eos_token_id=model.config.eos_token_id)
    finished = _watch(events, painter if console.is_terminal and not args.json else None)
    result = events.result()
    for row, (prompt, new) in enumerate(zip(prompts, result.new_tokens, strict=True)):
        text = tokenizer.decode(new.tolist(), skip_special_tokens=True)
        if args.json:
            print(json.dumps(_record(prompt, text, result, row), ensure_ascii=False))
            continue
        if len(prompts) > 1:
            print(f"--- prompt {row + 1}")
        if console.is_terminal:
            console.print(painter.page(row, new.tolist()), soft_wrap=True)
        else:
            print(prompt + text)
    if not args.json:
        count = sum(map(len, result.new_tokens))
        cost = f"{count} tokens, NFE {sum(result.nfe)}, {result.tokens_per_nfe:.2f} tokens per NFE"
        _say(f"{cost}, {speed(result):.1f} tokens per second{'' if finished else '; interrupted'}")
    return 0 if finished else INTERRUPTED


def _record(prompt: str, text: str, result: GenerateResult, row: int) -> dict[str, Any]:
    """What --json says of a prompt. The seconds are those of all prompts together: they share a batch."""
    count, calls = len(result.new_tokens[row]), result.nfe[row]
    return {
        "prompt": prompt,
        "text": text,
        "tokens": count,
        "nfe": calls,
        "tokens_per_nfe": count / max(1, calls),
        "seconds": result.seconds,
        "finish_reason": result.finish_reason[row],
    }


def _demo(args: argparse.Namespace) -> int:
    prompts = [_text(args.prompt, "--prompt")]
    model, tokenizer = _load(args)
    ids = _ids(model, tokenizer, prompts)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    options |= {"seed": args.seed, "eos_token_id": model.config.eos_token_id, "mask_token_id": MASK}
    block_size = model.config.block_size or 16
    console = Console(highlight=False)
    painter = Painter(console, tokenizer, prompts, mask_token_id=MASK, eos_token_id=model.config.eos_token_id)

    generate(model, ids, block_size=block_size, **options | {"max_new_tokens": 1})  # first calls are slow: not timed
    generate(model, ids, mode="ar", **options | {"max_new_tokens": 1})
    blocks = stream(model, ids, block_size=block_size, confidence_threshold=args.threshold, **options)
    finished = _watch(blocks, painter)
    results = {"block diffusion": blocks.result()}
    if finished:
        tokens = stream(model, ids, mode="ar", **options)
        finished = _watch(tokens, None)
        results["autoregressive"] = tokens.result()
    for mode, result in results.items():
        console.rule(mode, style="dim")
        console.print(painter.page(0, result.new_tokens[0].tolist()), soft_wrap=True)
    console.print(costs(results))
    return 0 if finished else INTERRUPTED


def _info(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    facts = info.machine() | info.gpu_kernels()
    if args.path is not None:
        sizes = info.sizes(args.path)
        for tower, count in sizes.parameters.items():
            facts[f"{tower} tower"] = f"{count:,} parameters, {info.size(sizes.weights[tower])}"
        facts["keys and values"] = f"{info.size(sizes.kv_per_token)} per token and row"
        facts["Mamba-2 state"] = f"{info.size(sizes.state_per_row)} per row"
        facts["128 K context"] = f"{info.size(sizes.long_context)}, the weights and one row"
        if len(sizes.weights) == 2:
            shares = (f"{tower} tower {info.size(share)}" for tower, share in sizes.long_context_apart.items())
            facts["on two devices"] = f"{', '.join(shares)}, the row in each"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    kernels = Table("op", *info.KEYS, box=box.SIMPLE_HEAD)
    for name, has in info.ops().items():
        kernels.add_row(name, *("yes" if has[key] else "-" for key in info.KEYS))
    console.print(table)
    console.print(kernels)
    return 0


def _bench(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("twotower_kernels.bench.command").main(args.arguments)
    return code

"""The command `twotower`: generate text, watch it being generated, say what is installed.

Whatever a user can get wrong is one line on the standard error output and exit code 2. Ctrl-C prints what was generated
until then and ends with 130, as a shell expects it.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from tokenizers import Tokenizer

import twotower_kernels
from twotower_kernels.cli import demo, info
from twotower_kernels.cli.show import Painter, Printer, before_masks, fitting, printable, speed, watch
from twotower_kernels.generation import GenerateResult
from twotower_kernels.model.generate import MODES, stream
from twotower_kernels.model.two_tower import TwoTowerModel
from twotower_kernels.options.flags import checked, integer, number
from twotower_kernels.options.generation import MOST_BLOCK
from twotower_kernels.options.units import size

DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERRUPTED = 130  # 128 + SIGINT
MOST_BYTES = 2**28  # of prompts
PROMPT = """class TinyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
""".rstrip()

# What a user, a file or a machine can be the cause of. Anything else is a mistake in this package, and is shown whole.
EXPECTED = (
    OSError,
    ValueError,
    FloatingPointError,
    NotImplementedError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's own) and returns its exit code."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # a terminal without some character shows another one
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # closed, as by >&-
                sys.stdout.flush()
    except BrokenPipeError:
        _close()
        return 1
    except OSError as error:
        _close()
        _say(f"error: standard output: {error.strerror}")
        return 2


def _run(argv: Sequence[str] | None) -> int:
    """As `main`; an error of the output itself is left to that."""
    try:
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
            code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except EXPECTED as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise  # the system refused a write: the reader has gone, the disk is full
        _say(f"error: {str(error) or 'not enough memory'}")
        return 2
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # PyTorch's allocator on a CPU
            raise
        _say(f"error: not enough memory: {error}")
        return 2


def _close() -> None:
    """Lets nothing more be written to an output that takes no more, at the process's end either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """One line for the user."""
    print("twotower:", printable(" ".join(text.split())), file=sys.stderr)


# --- arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


# Beyond these a number is a slip of the finger, and would take hours or all memory before that shows.
NEW_TOKENS = integer(0, 1_000_000)
BLOCK = integer(1, MOST_BLOCK)
STEPS = integer(1, MOST_BLOCK)
THREADS = integer(1, 1024)
TOP_K = integer(0, 2**31 - 1)
SEED = integer(-(2**63), 2**64 - 1)
DEVICE = checked(str, "cpu, cuda, or cuda with a number, as in cuda:1", re.compile(r"cpu|cuda(:\d{1,3})?").fullmatch)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="twotower", description="Block diffusion text generation with a TwoTower model.")
    version = f"twotower-kernels {twotower_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    write = commands.add_parser("generate", help="continue one prompt, or a file of them", allow_abbrev=False)
    write.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text to continue, its masks filled in; - or nothing: standard input",
    )
    write.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help='JSON lines, a prompt each: "text" or {"prompt": "text"}'
    )
    write.add_argument("--json", action="store_true", help="one JSON object per prompt, at the end, instead of text")
    write.add_argument(
        "--mode",
        choices=MODES,
        default="mask_diffusion",
        help="who writes: the denoiser, block by block (mask_diffusion, the default) or token by token (mock_ar), the "
        "context tower (ar), or it again, reading drafts of the denoiser (speculative: the same text in fewer passes)",
    )
    write.add_argument(
        "--block-size", type=BLOCK, metavar="S", help="tokens per block or draft (default: the model's, or 16)"
    )
    write.add_argument(
        "--steps", type=STEPS, default=16, metavar="T", help="calls of the denoiser per block at most (default: 16)"
    )
    write.add_argument("--draft-steps", type=STEPS, default=1, metavar="K", help="its calls per draft (default: 1)")
    write.add_argument(
        "--top-k", type=TOP_K, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, all)"
    )
    write.add_argument(
        "--top-p",
        type=number(above=0, most=1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that have probability P together (default: 1, all)",
    )
    write.set_defaults(run=_generate)

    watched = commands.add_parser("demo", help="watch the shipped model write, and what it costs", allow_abbrev=False)
    watched.add_argument("--prompt", default=PROMPT, help="text to continue (default: the head of a Python class)")
    watched.set_defaults(run=_demo)

    for command in (write, watched):
        _add_common(command)

    about = commands.add_parser("info", help="versions, kernels, devices; sizes of a checkpoint", allow_abbrev=False)
    about.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model folder, to be told its sizes")
    about.set_defaults(run=_info)

    # Its arguments are the benchmark's to read, --help too, so none of them begins an option here.
    timed = commands.add_parser("bench", help="time the kernels beside their rivals", add_help=False, prefix_chars="\0")
    timed.add_argument("arguments", nargs="*")
    timed.set_defaults(run=_bench)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    """The options of every command that writes."""
    command.add_argument(
        "--max-new-tokens",
        type=NEW_TOKENS,
        default=64,
        metavar="N",
        help="tokens to write at most, of each prompt (default: 64)",
    )
    command.add_argument(
        "--threshold",
        type=number(),
        default=0.8,
        metavar="X",
        help="a token is kept when the denoiser gives it more than this probability (default: 0.8)",
    )
    command.add_argument(
        "--temperature",
        type=number(0, most=1e6),
        default=0.0,
        metavar="X",
        help="sample, the more evenly the higher (default: 0, always the likeliest token)",
    )
    command.add_argument(
        "--seed", type=SEED, default=0, metavar="N", help="where sampling's random numbers begin (default: 0)"
    )
    command.add_argument(
        "--model", type=Path, metavar="PATH", help="a model folder on this machine (default: the shipped model)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of weights and computation (default: the model's)")
    command.add_argument(
        "--device", type=DEVICE, default="cpu", metavar="NAME", help="where it runs: cpu (default), cuda, cuda:1"
    )
    for tower in ("context", "denoiser"):
        command.add_argument(
            f"--{tower}-device", type=DEVICE, metavar="NAME", help=f"where the {tower} tower runs, if elsewhere"
        )
    command.add_argument(
        "--threads", type=THREADS, metavar="N", help="processor threads to compute with (default: PyTorch's choice)"
    )


# --- prompts --------------------------------------------------------------------------------------------------------


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that were asked for, from the one place they come from.

    Raises:
        ValueError: none, from two places, empty, not text, or without end.
    """
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise ValueError("expected a prompt or --prompt-file, got both")
        return _prompt_file(args.prompt_file)
    if args.prompt is not None and args.prompt != "-":
        return [_argument(args.prompt, "prompt")]
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


def _argument(text: str, where: str) -> str:
    """A text from the command line, where Python keeps bytes that are no text as halves of characters."""
    return _text(_decoded(text.encode("utf-8", "surrogateescape"), where), where)


def _prompt_file(path: Path) -> list[str]:
    """A prompt per line that is not blank: a JSON string, or an object with one under "prompt"."""
    try:
        with path.open("rb") as file:
            lines = _read(file, str(path)).removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:  # no such file
        raise ValueError(f"{path}: {error.strerror}") from None
    prompts = []
    for count, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {count}"
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


def _check_folder(folder: Path, *needed: str) -> None:
    """FileNotFoundError unless it is a folder with these files, which says where a model comes from."""
    if not folder.exists():
        fetch = ""
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
            fetch = f"; `hf download {folder} --local-dir FOLDER` does that, then --model FOLDER"
        raise FileNotFoundError(f"no model in {folder}: no such folder here, and nothing is downloaded{fetch}")
    if not folder.is_dir():
        raise NotADirectoryError(f"no model in {folder}: expected a folder with {' and '.join(needed)}, got a file")
    for name in needed:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no model in {folder}: {name} is missing")


def _load(args: argparse.Namespace, towers: str = "both") -> tuple[TwoTowerModel, Tokenizer]:
    """The model and its tokenizer, from disk alone."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = twotower_kernels.demo_path() if args.model is None else args.model
    _check_folder(folder, "config.json", "tokenizer.json")
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


def _generate(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    model, tokenizer = _load(args, towers="context" if args.mode == "ar" else "both")
    ids = _ids(model, tokenizer, prompts)
    mask = model.config.mask_token_id
    heads, lengths = prompts, [len(row) for row in ids]
    if args.mode == "mask_diffusion":
        heads, lengths = before_masks(tokenizer, mask, prompts, ids)
    events = stream(
        model,
        ids,
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        block_size=args.block_size or model.config.block_size or 16,
        steps_per_block=args.steps,
        draft_steps=args.draft_steps,
        confidence_threshold=args.threshold,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_token_id=model.config.eos_token_id,
        seed=args.seed,
    )
    console, ends = Console(highlight=False), model.config.eos_token_id
    show: Painter | Printer | None = None
    drafts = args.mode == "speculative"
    painter = Painter(console, tokenizer, heads, mask_token_id=mask, eos_token_id=ends, drafts=drafts)
    if console.is_terminal:
        show = painter
    elif heads == prompts:  # a text whose masks are filled in is printed whole
        show = Printer(tokenizer, prompts, max_new_tokens=args.max_new_tokens, eos_token_id=ends)
    finished = watch(events, None if args.json else show)
    result = events.result()
    for row, (prompt, sequence, length) in enumerate(zip(prompts, result.sequences, lengths, strict=True)):
        tokens = sequence[length:].tolist()
        if args.json:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            print(json.dumps(_record(prompt, text, result, row), ensure_ascii=False))
        elif not isinstance(show, Printer):
            if len(prompts) > 1:
                print(f"--- prompt {row + 1}")
            console.print(painter.page(row, tokens), soft_wrap=True)
    if not args.json:
        count = sum(map(len, result.new_tokens))
        cost = f"{count} tokens, NFE {sum(result.nfe)}, {result.tokens_per_nfe:.2f} tokens per NFE"
        cost += "" if result.accepted is None else f", {result.accepted:.2f} accepted per draft"
        _say(f"{cost}, {speed(result):.1f} tokens per second{'' if finished else '; interrupted'}")
    return 0 if finished else INTERRUPTED


def _record(prompt: str, text: str, result: GenerateResult, row: int) -> dict[str, Any]:
    """What --json says of a prompt; the text is what follows its part before the first mask. The seconds are those of
    all prompts together: they share a batch."""
    count, calls = len(result.new_tokens[row]), result.nfe[row]
    drafts = {} if result.verifications is None else {"accepted": count / max(1, result.verifications[row])}
    return {
        "prompt": prompt,
        "text": text,
        "tokens": count,
        "nfe": calls,
        "tokens_per_nfe": count / max(1, calls),
        **drafts,
        "seconds": result.seconds,
        "finish_reason": result.finish_reason[row],
    }


def _demo(args: argparse.Namespace) -> int:
    prompts = [_argument(args.prompt, "--prompt")]
    model, tokenizer = _load(args)
    ids = _ids(model, tokenizer, prompts)
    if model.config.mask_token_id in ids[0]:
        raise ValueError("--prompt: expected text without masks, which only block diffusion fills in")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    options |= {"seed": args.seed, "eos_token_id": model.config.eos_token_id}
    shown = demo.Demo(model, tokenizer, prompts[0], ids, options, threshold=args.threshold)
    finished = shown.run(Console(highlight=False), threads=args.threads)
    return 0 if finished else INTERRUPTED


def _info(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    facts = info.machine() | info.gpu_kernels()
    if args.path is not None:
        _check_folder(args.path, "config.json")
        sizes = info.sizes(args.path)
        for tower, count in sizes.parameters.items():
            facts[f"{tower} tower"] = f"{count:,} parameters, {size(sizes.weights[tower])}"
        facts["keys and values"] = f"{size(sizes.kv_per_token)} per token and row"
        facts["Mamba-2 state"] = f"{size(sizes.state_per_row)} per row"
        facts["128 K context"] = f"{size(sizes.long_context)}, the weights and one row"
        if len(sizes.weights) == 2:
            shares = (f"{tower} tower {size(share)}" for tower, share in sizes.long_context_apart.items())
            facts["on two devices"] = f"{', '.join(shares)}, the row in each"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    console.print(_kernels(console))
    return 0


def _kernels(console: Console) -> RenderableType:
    """The table of kernels, or on a narrow terminal a list with the same words."""
    table = Table("op", "CPU", "GPU", "gradient", box=box.SIMPLE_HEAD)
    lines = []
    for name, op in info.ops().items():
        table.add_row(name, *op.facts)
        named = zip(("CPU: ", "GPU: ", ""), op.facts, strict=True)
        lines += [name, *(f"  {device}{fact}" for device, fact in named if fact != "-")]
    return fitting(console, table, lines)


def _bench(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("twotower_kernels.bench.command").main(args.arguments, prog="twotower bench")
    return code

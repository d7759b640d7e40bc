"""Watch the shipped model write Python: `python -m reference.demo [--prompt TEXT] [--max-new-tokens N] ...`.

Every step of every block is shown as it un-masks, then what block diffusion cost beside one token at a time.
"""

import argparse
import time
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from reference.generate import GenerateResult, StepEvent, generate
from reference.model import TwoTower

FOLDER = Path(__file__).resolve().parent.parent / "twotower_kernels" / "demo"
PROMPT = '''def read_lines(filename):
    """Return the lines of a text file, without the newlines."""
'''.rstrip()
BOS, EOS, MASK = 1, 2, 3
BLANK = "░"


class Show:
    """Paints a generation while it happens: live in a terminal, one line per step when piped."""

    def __init__(self, console: Console, tokenizer: Tokenizer, prompt: str) -> None:
        self.console, self.tokenizer, self.prompt = console, tokenizer, prompt
        self.done: list[int] = []  # tokens of the finished blocks
        self.seconds = 0.0  # spent painting, which is not the model's time
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __call__(self, event: StepEvent) -> None:
        start = time.perf_counter()
        if event.committed:
            self.done += event.after[0].tolist()
        elif self.live:
            self.live.update(self.page(self.done) + self.paint(event), refresh=True)
        else:
            left = int(event.num_masked[0])
            line = self.paint(event).plain.replace("\n", "⏎")
            self.console.print(
                f"block {event.block:2d}  step {event.step:2d}  {left:2d} masked  │{line}│", soft_wrap=True
            )
        self.seconds += time.perf_counter() - start

    def page(self, tokens: list[int]) -> Text:
        """The prompt dim, and what follows it."""
        return Text.assemble((self.prompt, "dim"), self.decode(tokens))

    def paint(self, event: StepEvent) -> Text:
        """The block after this step: masks dim, tokens of this very step highlighted."""
        before, after = event.before[0].tolist(), event.after[0].tolist()
        styles = [
            "dim" if new == MASK else "" if new == old else "bold black on green"
            for old, new in zip(before, after, strict=True)
        ]
        text = Text()
        for style, run in groupby(zip(styles, after, strict=True), key=itemgetter(0)):
            tokens = [token for _, token in run]  # decoded together, because a character may span several tokens
            text.append(BLANK * len(tokens) if style == "dim" else self.decode(tokens), style)
        return text

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def costs(results: dict[str, tuple[GenerateResult, float]]) -> Table:
    """One row per mode: what it wrote, in how many calls of a tower, how fast."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mode")
    for name in ("new tokens", "NFE", "tokens per NFE", "tokens per second"):
        table.add_column(name, justify="right")
    for mode, (result, seconds) in results.items():
        count = len(result.new_tokens[0])
        speed = count / seconds if count else 0.0
        table.add_row(mode, f"{count}", f"{result.nfe[0]}", f"{result.tokens_per_nfe:.2f}", f"{speed:.1f}")
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reference.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: the head of a Python function)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.8, help="confidence above which a token is kept at once")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, default=FOLDER, help="folder with config.json, model.safetensors, tokenizer.json"
    )
    return parser.parse_args()


def load(folder: Path) -> tuple[TwoTower, Tokenizer]:
    """The model and its tokenizer, from disk alone."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SystemExit(f"no model in {folder}: {name} is missing (python -m reference.train_demo trains one)")
    return TwoTower.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    args = arguments()
    model, tokenizer = load(args.model)
    console = Console(highlight=False)
    prompts = [[BOS, *tokenizer.encode(args.prompt, add_special_tokens=False).ids]]
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    options |= {"eos_token_id": EOS, "mask_token_id": MASK}
    show = Show(console, tokenizer, args.prompt)
    try:
        generate(model, prompts, mode="ar", **options | {"max_new_tokens": 1})  # first calls are slow: not timed
        with show.live or nullcontext():
            fast = generate(model, prompts, confidence_threshold=args.threshold, on_step=show, **options)
        slow = generate(model, prompts, mode="ar", **options)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    results = {"block diffusion": (fast, fast.seconds - show.seconds), "autoregressive": (slow, slow.seconds)}
    for mode, (result, _) in results.items():
        console.rule(mode, style="dim")
        console.print(show.page(result.new_tokens[0].tolist()), soft_wrap=True)
    console.print(costs(results))


if __name__ == "__main__":
    main()

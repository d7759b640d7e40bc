"""Measures the demo model on the files held out of its training; writes its card's figures and training curves.

`python -m twotower_kernels.reference.demo_report --model build/demo --out twotower_kernels/demo` also copies the model
there. What its text is worth is measured by `python -m bench.quality --card`, which completes the card.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from twotower_kernels.reference import demo_data
from twotower_kernels.reference.demo_data import SOURCES, SPECIAL, encode, windows
from twotower_kernels.reference.demo_passes import Passes
from twotower_kernels.reference.demo_training import BATCH, LENGTH, MASK
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.train_demo import BLOCK, SHIPPED, WRITTEN

TIMES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MARKER = "## Measured"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 48, 64, 64


@torch.no_grad()
def ar_bits_per_byte(model: TwoTower, tokenizer: Tokenizer, stream: Tensor, most: int = 256) -> tuple[float, float]:
    """Nats per token and bits per byte of the context tower on `most` windows, spread evenly over the stream, each read
    from an empty context."""
    rows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    ids = rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]
    passes, nats = Passes(model, BLOCK, torch.float32, compiled=False), 0.0
    for batch in ids.split(BATCH):
        hidden = passes.context(batch)[0][:, :-1].flatten(0, 1)
        nats += float(passes.losses(hidden, model.context_lm_head.weight, batch[:, 1:].flatten(), torch.float32).sum())
    sizes = torch.tensor([len(_bytes(tokenizer, i)) for i in range(tokenizer.get_vocab_size())])
    predicted_bytes = int(sizes[ids[:, 1:]].sum())
    tokens = ids[:, 1:].numel()
    return nats / tokens, nats / predicted_bytes / math.log(2)


def _bytes(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in the byte-level alphabet, one character per byte; special tokens count nothing."""
    return "" if token < len(SPECIAL) else tokenizer.id_to_token(token) or ""


@torch.no_grad()
def masked_cross_entropy(model: TwoTower, stream: Tensor) -> dict[float, float]:
    """Denoiser cross-entropy in nats per masked token over t, on 32 fixed windows."""
    generator, head = torch.Generator().manual_seed(7), model.lm_head.weight
    passes = Passes(model, BLOCK, torch.float32, compiled=False)
    total, count = dict.fromkeys(TIMES, 0.0), dict.fromkeys(TIMES, 0)
    for ids in windows(stream, LENGTH, 32, generator).split(BATCH):
        _, context = passes.context(ids)
        for t in TIMES:
            masked = torch.rand(ids.shape, generator=generator) < t
            noise = torch.full((len(ids), LENGTH // BLOCK), t)
            hidden = passes.denoise(ids.masked_fill(masked, MASK), noise, context)
            total[t] += float(passes.losses(hidden[masked], head, ids[masked], torch.float32).sum())
            count[t] += int(masked.sum())
    return {t: total[t] / count[t] for t in TIMES}


@torch.no_grad()
def nll_of_continuations(model: TwoTower, sequences: list[Tensor]) -> float:
    """Mean NLL in nats per token that the context tower gives to what follows the prompts."""
    total, count = 0.0, 0
    for sequence in sequences:
        log_p = model.forward_ar(sequence[None, :-1])[0].log_softmax(-1)
        nll = -log_p[torch.arange(len(sequence) - 1), sequence[1:]][PROMPT_TOKENS - 1 :]
        total, count = total + float(nll.sum()), count + len(nll)
    return total / count


def distinct(sequences: list[Tensor]) -> float:
    """The share of 4-grams in the continuations that are not repetitions inside the same continuation."""
    grams = [[tuple(s[i : i + 4].tolist()) for i in range(PROMPT_TOKENS, len(s) - 3)] for s in sequences]
    return sum(len(set(g)) for g in grams) / sum(len(g) for g in grams)


def curves(facts: dict[str, Any], path: Path) -> None:
    """Training and validation loss of both stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"ar": "context tower: next token", "denoiser": "denoiser: what the context tower writes"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(*zip(*facts[name]["train"], strict=True), color="0.7", lw=0.8, label="training batch")
        axis.plot(*zip(*facts[name]["validation"], strict=True), color="C0", marker="o", ms=3, label="held-out files")
        axis.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
        axis.axvline(facts[name]["falls"][0], color="0.5", lw=0.8, ls=":", label="the rate begins to fall")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def measured_part(facts: dict[str, Any], measured: dict[str, Any], size: int) -> str:
    """The part of the model card that is computed, in Markdown; the prose before it is written by hand."""
    stages = {"context tower": facts["ar"], "denoiser": facts["denoiser"]}
    sequences = f"{facts['batch']}×{facts['length']}"
    training = table(
        ["stage", "steps", "sequences × tokens", "million tokens", "learning rate", "hours"],
        [
            [n, s["steps"], sequences, f"{s['steps'] * facts['batch'] * facts['length'] / 1e6:.1f}", s["lr"],
             f"{s['seconds'] / 3600:.2f}"]
            for n, s in stages.items()
        ],
    )  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = measured["sources"]
    losses = table(
        ["held-out files of", "bits per byte", "nats per token", *(f"t = {t:g}" for t in TIMES)],
        [
            [source, f"{row['ar_bits_per_byte']:.3f}", f"{row['ar_nats_per_token']:.3f}",
             *(f"{loss:.2f}" for loss in row["masked_cross_entropy"])]
            for source, row in rows.items()
        ],
    )  # fmt: skip
    paragraphs = [
        MARKER,
        f"{measured['parameters'] / 1e6:.2f} M parameters, {size / 1e6:.1f} MB of weights.",
        f"**Data.** {facts['train_files']} files, {facts['train_tokens'] / 1e6:.1f} M tokens to train on; held out: "
        f"{facts['held_out_tokens'] / 1e3:.0f} k tokens, the files in [held_out.json](held_out.json). {versions}; "
        f"SHA-256 over the list of files and contents `{facts['files']}`.",
        f"**Training**, seed {facts['seed']}, gates started at {facts['gate_start']:g}:",
        training,
        "![training curves](curves.png)",
        f"**Towers**, windows of {LENGTH} tokens read from an empty context. Bits per byte and nats per token are the "
        "context tower's. The others are the denoiser's nats per masked token of the files' own text, over the share "
        "of masks t; it was trained on what the context tower writes.",
        losses,
    ]
    return "\n\n".join(paragraphs) + "\n"


def measure(folder: Path) -> dict[str, Any]:
    """The losses of the model in a folder on the held-out files, per source.

    Raises:
        SystemExit: this machine's files are not those that it was trained on.
    """
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    corpus = demo_data.corpus()
    if corpus.fingerprint != facts["files"]:
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        raise SystemExit(f"these files are not those that the model was trained on ({versions})")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = TwoTower.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    rows = {}
    for source in SOURCES:
        stream = encode(tokenizer, corpus.held_out_texts(source))
        nats, bits = ar_bits_per_byte(model, tokenizer, stream)
        entropies = list(masked_cross_entropy(model, stream).values())
        rows[source] = dict(ar_nats_per_token=nats, ar_bits_per_byte=bits, masked_cross_entropy=entropies)
    return dict(parameters=sum(p.numel() for p in model.parameters()), sources=rows)


def write_card(folder: Path, text: str = "") -> str:
    """Writes the folder's curves and card, from what training and measuring noted there; `text` says what its text is
    worth. Returns the card."""
    facts, measured = (json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("training", "report"))
    curves(facts, folder / "curves.png")
    card = folder / "README.md"
    prose = card.read_text(encoding="utf-8").split(MARKER)[0] if card.exists() else "# The demo model\n\n"
    written = prose + measured_part(facts, measured, (folder / "model.safetensors").stat().st_size)
    card.write_text(written + (f"\n{text}" if text else ""), encoding="utf-8")
    return card.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder with the model and training.json")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder that receives model, card and curves")
    args = parser.parse_args()
    measured = measure(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.out.resolve() != args.model.resolve():
        for name in WRITTEN:
            shutil.copy(args.model / name, args.out / name)
    (args.out / "report.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(write_card(args.out))
    print("what its text is worth: python -m bench.quality --card")


if __name__ == "__main__":
    main()

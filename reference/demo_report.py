"""Measures the demo model on the modules held out of its training; writes its card's figures and training curves.

`python -m twotower_kernels.reference.demo_report --model build/demo --out twotower_kernels/demo` also copies the model
there.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.reference.demo_data import SPECIAL, encode, standard_library, windows
from twotower_kernels.reference.generate import generate
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.train_demo import BLOCK, MASK, SHIPPED
from twotower_kernels.reference.training import denoise_all_blocks, masked_loss

LENGTH = 256  # of evaluation windows, as in training
TIMES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
THRESHOLDS = (0.5, 0.8, 0.9)
MARKER = "## Measured"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 48, 64, 64


@torch.no_grad()
def ar_bits_per_byte(model: TwoTower, tokenizer: Tokenizer, stream: Tensor) -> tuple[float, float]:
    """Nats per token and bits per byte of the context tower on consecutive windows, each read from an empty context."""
    ids = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    nats = 0.0
    for batch in ids.split(64):
        logits = model.forward_ar(batch[:, :-1]).flatten(0, 1)
        nats += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    sizes = torch.tensor([len(_bytes(tokenizer, i)) for i in range(tokenizer.get_vocab_size())])
    predicted_bytes = int(sizes[ids[:, 1:]].sum())
    tokens = ids[:, 1:].numel()
    return nats / tokens, nats / predicted_bytes / math.log(2)


def _bytes(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in the byte-level alphabet, one character per byte; special tokens count nothing."""
    return "" if token < len(SPECIAL) else tokenizer.id_to_token(token) or ""


@torch.no_grad()
def masked_cross_entropy(model: TwoTower, stream: Tensor) -> dict[float, float]:
    """Denoiser cross-entropy in nats per masked token over t, on 128 fixed windows."""
    generator = torch.Generator().manual_seed(7)
    ids = windows(stream, LENGTH, 128, generator)
    result = {}
    for t in TIMES:
        noisy = ids.masked_fill(torch.rand(ids.shape, generator=generator) < t, MASK)
        parts = zip(noisy.split(32), ids.split(32), strict=True)
        logits = torch.cat([denoise_all_blocks(model, n, c, t, block_size=BLOCK) for n, c in parts])
        result[t] = float(masked_loss(logits, noisy, ids, mask_token_id=MASK))
    return result


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


@torch.no_grad()
def generations(model: TwoTower, stream: Tensor) -> list[dict[str, Any]]:
    """Continues held-out prompts in every mode: tokens per NFE, the context tower's NLL, distinct 4-grams."""
    real = windows(stream, PROMPT_TOKENS + NEW_TOKENS, PROMPTS, torch.Generator().manual_seed(11))
    prompts = real[:, :PROMPT_TOKENS]
    runs: dict[str, dict[str, Any]] = {
        "AR, greedy": dict(mode="ar"),
        "AR, T = 1": dict(mode="ar", temperature=1.0),
        "mock-AR, greedy": dict(mode="mock_ar"),
        **{f"diffusion, greedy, γ = {threshold}": dict(confidence_threshold=threshold) for threshold in THRESHOLDS},
        "diffusion, T = 1, γ = 0.8": dict(confidence_threshold=0.8, temperature=1.0),
    }
    texts = list(real)
    rows = [
        dict(run="the real text", tokens_per_nfe=None, nll=nll_of_continuations(model, texts), distinct=distinct(texts))
    ]
    for name, options in runs.items():
        result = generate(model, prompts, max_new_tokens=NEW_TOKENS, **options)
        rows.append(
            dict(
                run=name,
                tokens_per_nfe=result.tokens_per_nfe,
                nll=nll_of_continuations(model, result.sequences),
                distinct=distinct(result.sequences),
            )
        )
    return rows


def curves(facts: dict[str, Any], path: Path) -> None:
    """Training and validation loss of both stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"ar": "context tower: next token", "denoiser": "denoiser: masked tokens"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(*zip(*facts[name]["train"], strict=True), color="0.7", lw=0.8, label="training batch")
        axis.plot(*zip(*facts[name]["validation"], strict=True), color="C0", marker="o", ms=3, label="held-out modules")
        axis.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def measured_part(facts: dict[str, Any], measured: dict[str, Any], size: int) -> str:
    """The part of the model card that is computed, in Markdown; the prose before it is written by hand."""
    stages = {"context tower": facts["ar"], "denoiser": facts["denoiser"]}
    training = table(
        ["stage", "steps", "sequences × tokens", "learning rate", "hours"],
        [
            [n, s["steps"], f"{s['batch']}×{s['length']}", s["lr"], f"{s['seconds'] / 3600:.2f}"]
            for n, s in stages.items()
        ],
    )
    entropies = measured["masked_cross_entropy"]
    runs = table(
        ["run", "tokens per NFE", "NLL", "distinct 4-grams"],
        [
            [
                r["run"],
                f"{r['tokens_per_nfe']:.2f}" if r["tokens_per_nfe"] else "",
                f"{r['nll']:.2f}",
                f"{r['distinct']:.2f}",
            ]
            for r in measured["generations"]
        ],
    )
    held_out = ", ".join(
        f"`{name}`" for name in sorted({f.split("/")[0].removesuffix(".py") for f in facts["held_out_files"]})
    )
    paragraphs = [
        MARKER,
        f"{measured['parameters'] / 1e6:.2f} M parameters, {size / 1e6:.1f} MB of weights.",
        f"**Data.** Python {facts['python']}, SHA-256 over the list of files and contents `{facts['files']}`. "
        f"{facts['train_tokens'] / 1e6:.2f} M tokens to train on; held out: {facts['held_out_tokens'] / 1e3:.0f} k, "
        f"the modules {held_out}.",
        f"**Training**, torch {facts['torch']}, seed {facts['seed']}, gates started at {facts['gate_start']:g}:",
        training,
        "![training curves](curves.png)",
        f"**Context tower** on the held-out modules, windows of {LENGTH} tokens read from an empty context: "
        f"**{measured['ar_bits_per_byte']:.3f} bits per byte**, {measured['ar_nats_per_token']:.3f} nats per token.",
        f"**Denoiser** on the held-out modules, nats per masked token, 128 windows of {LENGTH}:",
        table([f"t = {t:g}" for t in entropies], [[f"{loss:.2f}" for loss in entropies.values()]]),
        f"**Generation.** {PROMPTS} held-out prompts of {PROMPT_TOKENS} tokens, plus {NEW_TOKENS} (S 16, T 16). "
        "NLL: what the context tower gives to the continuation, in nats per token. Distinct: the share of 4-grams "
        "that do not repeat inside a continuation. Greedy text earns a low NLL by repeating itself: read both.",
        runs,
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder with the model and training.json")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder that receives model, card and curves")
    args = parser.parse_args()
    facts = json.loads((args.model / "training.json").read_text(encoding="utf-8"))
    corpus = standard_library()
    if corpus.fingerprint != facts["files"]:
        raise SystemExit(f"this Python's library is not the one the model was trained on (Python {facts['python']})")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = TwoTower.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False)
    stream = encode(tokenizer, list(corpus.held_out.values()))
    nats, bits = ar_bits_per_byte(model, tokenizer, stream)
    measured = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        ar_nats_per_token=nats,
        ar_bits_per_byte=bits,
        masked_cross_entropy=masked_cross_entropy(model, stream),
        generations=generations(model, stream),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.out.resolve() != args.model.resolve():
        for name in ("config.json", "model.safetensors", "tokenizer.json", "training.json"):
            shutil.copy(args.model / name, args.out / name)
    (args.out / "report.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    curves(facts, args.out / "curves.png")
    card = args.out / "README.md"
    prose = card.read_text(encoding="utf-8").split(MARKER)[0] if card.exists() else "# The demo model\n\n"
    card.write_text(prose + measured_part(facts, measured, (args.out / "model.safetensors").stat().st_size), "utf-8")
    print(card.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

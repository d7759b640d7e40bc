"""Four diffusion language models, as their authors write them and with our operations dropped in, side by side:

    python -m bench.drop_in
    python -m bench.drop_in --system llada2_moe --seconds 2 --save bench/results/cpu

Both programs have the same random weights and do the same work: `bench.baselines.diffusion_lms`, and `examples/` of
the repository. A line is a part of a generation: a forward pass, the sampler of a step, a whole generation. Logits and
tokens are compared before anything is timed; the exit code is 1 if they differ anywhere. Programs take turns
(`measure.clock`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from twotower_kernels.bench.baselines import diffusion_lms
from twotower_kernels.bench.baselines.diffusion_lm_weights import random_weights
from twotower_kernels.bench.measure.clock import Timing, interleaved
from twotower_kernels.bench.measure.timing import close
from twotower_kernels.bench.report.tables import about, machine

SAME = 1e-4  # of logits, in 2-norm, float32
PROMPT, BLOCK, NEW = 256, 32, 64
DENSE = dict(
    vocab_size=32768,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sdar": DENSE,
    "dream": DENSE,
    "llada": dict(
        vocab_size=32768,
        embedding_size=32768,
        d_model=1024,
        n_heads=16,
        n_kv_heads=16,
        n_layers=2,
        mlp_hidden_size=2816,
        activation_type="silu",
        block_type="llama",
        rope=True,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        weight_tying=False,
        include_bias=False,
        include_qkv_bias=False,
    ),
    "llada2_moe": DENSE
    | dict(
        partial_rotary_factor=0.5,
        num_experts=64,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        moe_intermediate_size=256,
        num_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        use_qkv_bias=False,
        use_bias=False,
    ),
}


@dataclass(frozen=True)
class Line:
    """A part of a generation: the original's program and ours, and what both give, logits or tokens."""

    system: str
    part: str
    original: Callable[[], Tensor]
    ours: Callable[[], Tensor]

    def difference(self) -> str:
        """How the two differ; empty if they do not."""
        theirs, ours = self.original(), self.ours()
        if not ours.is_floating_point():
            return "" if ours.equal(theirs) else f"{int((ours != theirs).sum())} of {ours.numel()} tokens differ"
        try:
            close(SAME)(ours, theirs)
        except AssertionError as error:
            return str(error)
        return ""


def models(system: str, config: Mapping[str, Any]) -> tuple[Any, Any, int]:
    """The plain program, the example with the same weights, and their mask token."""
    try:
        replay, layers = (importlib.import_module(f"examples.{name}") for name in ("replay", "layers"))
    except ModuleNotFoundError as error:
        raise SystemExit(f"examples/ lies in the repository alone: run this at its root ({error})") from None
    mask = config["vocab_size"] - 1
    weights = random_weights(system, config, mask)
    programs = dict(sdar=diffusion_lms.Sdar, llada2_moe=diffusion_lms.Llada2, dream=diffusion_lms.Dream)
    plain = programs.get(system, diffusion_lms.Llada)(config, weights, mask)
    return plain, replay.SYSTEMS[system](config, layers.Weights(weights), mask), mask


def of_sdar(config: Mapping[str, Any]) -> Iterator[Line]:
    plain, ours, mask = models("sdar", config)
    yield from _of_blocks("sdar", plain, ours, config)
    block = torch.full((1, BLOCK), mask)
    logits = 4 * torch.randn(1, BLOCK, config["vocab_size"])
    rule = replace(tt.RemaskPolicy.named("sdar", "low_confidence_static"), greedy=True)

    def sampled() -> Tensor:
        tokens = block.clone()
        plain.unmask(logits, tokens, BLOCK // 8, "low_confidence_static")
        return tokens

    yield Line("sdar", "sampler", sampled, lambda: _remasked(logits, block, mask, rule, num_steps=8, temperature=1.0))
    prompt = torch.randint(mask, (1, PROMPT))
    options = dict(gen_length=NEW, block_length=BLOCK, denoising_steps=8, strategy="low_confidence_static")
    yield Line(
        *("sdar", f"generation, {NEW} tokens, 8 steps a block"),
        lambda: plain.generate(prompt, **options)[0],
        lambda: torch.stack(ours.generate(prompt, **options).sequences),
    )


def of_llada2_moe(config: Mapping[str, Any]) -> Iterator[Line]:
    plain, ours, mask = models("llada2_moe", config)
    yield from _of_blocks("llada2_moe", plain, ours, config)
    block, threshold = torch.full((1, BLOCK), mask), 0.3
    logits, rule = 4 * torch.randn(1, BLOCK, config["vocab_size"]), tt.RemaskPolicy.named("dinfer", threshold=threshold)
    yield Line(
        *("llada2_moe", "sampler"),
        lambda: plain.unmask(logits, block, threshold),
        lambda: _remasked(logits, block, mask, rule),
    )
    prompt, options = torch.randint(mask, (1, PROMPT)), dict(blocks=NEW // BLOCK, block_length=BLOCK, threshold=0.05)
    steps = ours.generate(prompt, **options)[1]
    yield Line(
        *("llada2_moe", f"generation, {NEW} tokens, {steps} steps"),
        lambda: plain.generate(prompt, **options)[0],
        lambda: ours.generate(prompt, **options)[0],
    )


def of_llada(config: Mapping[str, Any]) -> Iterator[Line]:
    plain, ours, mask = models("llada", config)
    prompt = torch.randint(mask, (1, PROMPT))
    x = F.pad(prompt, (0, NEW), value=mask)
    yield Line("llada", f"forward, {x.shape[1]} tokens", lambda: plain(x)[0], lambda: ours.forward(x))
    past, cache, block = plain(x)[1], ours.cache(1, x.shape[1]), slice(PROMPT, PROMPT + BLOCK)
    ours.forward(x, 0, cache=cache, replace=True)
    yield Line(
        *("llada", f"a block of {BLOCK}, dual cache of {x.shape[1]}"),
        lambda: plain(x[:, block], past, block)[0],
        lambda: ours.forward(x[:, block], PROMPT, cache=cache, replace=True),
    )
    prefix, seen = [(k[:, :, :PROMPT], v[:, :, :PROMPT]) for k, v in past], x[:, PROMPT:]
    yield Line(
        *("llada", f"{NEW} tokens, prefix cache of {PROMPT}"),
        lambda: plain(seen, prefix)[0],
        lambda: ours.forward(seen, PROMPT, cache=cache),
    )
    tokens, quota = x[:, : block.stop], torch.tensor([4])
    logits, rule = 4 * torch.randn(1, block.stop, config["vocab_size"]), tt.RemaskPolicy.named("fast_dllm")
    yield Line(
        *("llada", f"sampler, {block.stop} tokens"),
        lambda: plain.unmask(logits, tokens, tokens == mask, quota, None),
        lambda: _remasked(logits, tokens, mask, rule, num_steps=8),
    )
    for cache_name in (None, "dual"):
        options = dict(steps=8, gen_length=NEW, block_length=BLOCK, cache=cache_name)
        yield Line(
            *("llada", f"generation, {NEW} tokens, 8 steps, {cache_name or 'no'} cache"),
            lambda options=options: plain.generate(prompt, **options)[0],
            lambda options=options: ours.generate(prompt, **options)[0],
        )


def of_dream(config: Mapping[str, Any]) -> Iterator[Line]:
    plain, ours, mask = models("dream", config)
    prompt = torch.randint(mask, (1, PROMPT))
    x = F.pad(prompt, (0, NEW), value=mask)
    yield Line("dream", f"forward, {x.shape[1]} tokens", lambda: plain(x, None), lambda: ours.forward(x))
    logits = 4 * torch.randn(*x.shape, config["vocab_size"])
    for alg in ("maskgit_plus", "topk_margin", "entropy"):
        rule = tt.RemaskPolicy.named("dream", alg)
        yield Line(
            *("dream", f"sampler, {alg}, {x.shape[1]} tokens"),
            lambda alg=alg: plain.unmask(logits, x, alg, 2, 8),
            lambda rule=rule: _remasked(logits, x, mask, rule, step=2, num_steps=8, shift=1),
        )
    options = dict(alg="entropy", steps=8, new_tokens=NEW)
    yield Line(
        *("dream", f"generation, {NEW} tokens, 8 steps"),
        lambda: plain.generate(prompt, **options)[0],
        lambda: ours.generate(prompt, **options)[0],
    )


def _of_blocks(system: str, plain: Any, ours: Any, config: Mapping[str, Any]) -> Iterator[Line]:
    """The forward passes of a model that is causal from block to block."""
    tokens = torch.randint(config["vocab_size"], (1, PROMPT + BLOCK))
    prompt, block = tokens[:, :PROMPT], tokens[:, PROMPT:]
    mask = diffusion_lms.block_mask(PROMPT, BLOCK)
    yield Line(
        *(system, f"prefill, {PROMPT} tokens"),
        lambda: plain(prompt, mask),
        lambda: ours.forward(prompt, block_length=BLOCK),
    )
    past: diffusion_lms.Cache = []
    plain(prompt, mask, 0, past, store=True)
    cache = ours.cache(1, PROMPT + BLOCK)
    ours.forward(prompt, cache=cache, commit=True, block_length=BLOCK)
    whole = torch.ones(BLOCK, PROMPT + BLOCK, dtype=torch.bool)
    yield Line(
        *(system, f"a block of {BLOCK} behind {PROMPT}"),
        lambda: plain(block, whole, PROMPT, past),
        lambda: ours.forward(block, PROMPT, cache=cache),
    )


def _remasked(logits: Tensor, tokens: Tensor, mask: int, policy: tt.RemaskPolicy, **options: Any) -> Tensor:
    return tt.remask(logits, tokens, mask_token_id=mask, policy=policy, **options).tokens


LINES: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Line]]] = {
    "sdar": of_sdar,
    "llada": of_llada,
    "llada2_moe": of_llada2_moe,
    "dream": of_dream,
}
ORIGINAL, OURS = "original style", "dropped in"


@torch.inference_mode()
def measured(system: str, seconds: float, config: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """A row for every line of a system: its part, `seconds` of both programs, or how they differ."""
    torch.manual_seed(0)
    for line in LINES[system](CONFIGS[system] if config is None else config):
        row: dict[str, Any] = {"system": line.system, "part": line.part, "difference": line.difference()}
        if not row["difference"]:
            timings = interleaved({ORIGINAL: line.original, OURS: line.ours}, seconds)
            row["seconds"] = {name: asdict(timing) for name, timing in timings.items()}
        yield row


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("model", "part", "original style, ms", "dropped in, ms", "times as fast", box=None)
    for row in rows:
        if row["difference"]:
            made.add_row(row["system"], row["part"], row["difference"])
            continue
        original, ours = (Timing(**row["seconds"][name]).median for name in (ORIGINAL, OURS))
        made.add_row(row["system"], row["part"], f"{original * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{original / ours:.2f}")
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drop_in", description="Original style against dropped in.")
    parser.add_argument("--system", action="append", choices=LINES, help="only this one; may be given again")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each program is timed at least")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/drop_in.json")
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {"machine": machine("cpu"), "rows": []}
    print(about(run))
    for system in options.system or LINES:
        for row in measured(system, options.seconds):
            print(f"{row['system']}, {row['part']}: {row['difference'] or 'equal'}", flush=True)
            run["rows"].append(row)
    Console(width=None if sys.stdout.isatty() else 120).print(table(run["rows"]))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=1, ensure_ascii=False) + "\n"
        (options.save / "drop_in.json").write_text(text, encoding="utf-8")
    return int(any(row["difference"] for row in run["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""Trains the demo model: `python -m twotower_kernels.reference.train_demo`, resumable at any time.

Two stages (`reference.demo_training`): the context tower by next-token prediction; then, with it frozen, the denoiser,
which learns to guess what the context tower writes from every block boundary. Each stage gets minutes, or repeats what
an earlier run's `training.json` notes of it: by default the shipped model's. Writes `config.json`,
`model.safetensors`, `tokenizer.json`, `held_out.json` and `training.json`;
`python -m twotower_kernels.reference.demo_report` then measures the result and writes the model card.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference import demo_data
from twotower_kernels.reference.demo_data import Corpus, encode, train_tokenizer
from twotower_kernels.reference.demo_passes import Passes
from twotower_kernels.reference.demo_stages import Schedule, run
from twotower_kernels.reference.demo_training import BATCH, LENGTH, context_stage, denoiser_stage
from twotower_kernels.reference.layers import Mamba2
from twotower_kernels.reference.model import NEVER_NARROWED, TwoTower
from twotower_kernels.reference.training import seed_denoiser

BLOCK = 16
WRITTEN = ("config.json", "model.safetensors", "tokenizer.json", "held_out.json", "training.json")
SHIPPED = Path(__file__).parents[1] / "demo"  # of the package, as which this is imported, in a checkout through a link
CONFIG: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=192,
    num_hidden_layers=10,
    hybrid_override_pattern="MEM*EMEM*E",
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=12,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_groups=2,
    conv_kernel=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=80,
    n_shared_experts=1,
    moe_shared_expert_intermediate_size=160,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    layer_norm_epsilon=1e-5,
    time_step_limit=[0.0, float("inf")],
    torch_dtype="bfloat16",
    model_type="nemotron_h",
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    block_size=BLOCK,
)


def initialise(model: TwoTower, generator: torch.Generator) -> None:
    """Normal weights of deviation 1/√fan_in, smaller on the way back to the residual stream; Mamba-2's own rules."""
    depth = len(model.config.hybrid_override_pattern)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "scale_shift" not in name:
            deviation = 0.02 if "embed" in name or "gate" in name else p.shape[1] ** -0.5
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                deviation /= depth**0.5
            nn.init.normal_(p, 0.0, deviation, generator=generator)
    for module in model.modules():
        if isinstance(module, Mamba2):
            heads = len(module.dt_bias)
            step = torch.exp(torch.empty(heads).uniform_(-6.9, -2.3, generator=generator))  # Δ in 0.001 … 0.1
            module.dt_bias.data = step + torch.log(-torch.expm1(-step))  # softplus⁻¹
            module.A_log.data = torch.empty(heads).uniform_(1, 16, generator=generator).log()


def export(model: TwoTower, folder: Path) -> None:
    """Writes the released layout: bfloat16, but router, A_log, D and dt_bias in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p if n.endswith(NEVER_NARROWED) else p.bfloat16() for n, p in model.state_dict().items()}
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")


def prepare(folder: Path) -> tuple[Corpus, Tensor, Tensor]:
    """Reads the sources, trains the tokenizer, writes both's names into `folder`; returns corpus and both streams."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = demo_data.corpus()
    tokenizer = train_tokenizer(list(corpus.train.values()), CONFIG["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out = json.dumps(corpus.held_out_paths(), indent=1) + "\n"
    (folder / "held_out.json").write_text(held_out, encoding="utf-8")
    return corpus, encode(tokenizer, list(corpus.train.values())), encode(tokenizer, list(corpus.held_out.values()))


def schedule_of(minutes: float | None, noted: dict[str, Any] | None) -> Schedule:
    """A stage's course: by the clock, or as noted."""
    return Schedule(minutes, falls=[] if minutes is not None or noted is None else list(noted["falls"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="what to resume from, and the result")
    parser.add_argument(
        "--repeat", type=Path, default=SHIPPED / "training.json", help="notes that stages without minutes repeat"
    )
    parser.add_argument("--ar-minutes", type=float, help="of the context tower's training, earlier runs included")
    parser.add_argument("--denoiser-minutes", type=float, help="of the denoiser's, which writes its targets")
    parser.add_argument("--ar-lr", type=float, default=3e-3, help="highest learning rate of the context tower (3e-3)")
    parser.add_argument("--denoiser-lr", type=float, default=2e-3, help="the denoiser's (2e-3)")
    parser.add_argument("--gate-start", type=float, default=1.0, help="added to every gate's table row; 0 is official")
    parser.add_argument("--seed", type=int, default=0, help="of initial matrices, data order and corruption (0)")
    parser.add_argument(
        "--module-seed", type=int, default=1150563414, help="of what modules draw when they are made: biases, filters"
    )
    args = parser.parse_args()
    # Large buffers come and go in every step: kept by the allocator they cost no page faults.
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        print("set MALLOC_MMAP_MAX_=0 in the environment to train faster")

    corpus, train, held_out = prepare(args.out)
    noted = json.loads(args.repeat.read_text(encoding="utf-8")) if args.repeat.exists() else {}
    torch.manual_seed(args.module_seed)
    model = TwoTower(TwoTowerConfig.from_dict(CONFIG))
    initialise(model, torch.Generator().manual_seed(args.seed))
    passes = Passes(model, BLOCK)
    facts: dict[str, Any] = dict(
        versions=corpus.versions | {"torch": torch.__version__},
        files=corpus.fingerprint,
        train_files=len(corpus.train),
        train_tokens=len(train),
        held_out_tokens=len(held_out),
        batch=BATCH,
        length=LENGTH,
        seed=args.seed,
        module_seed=args.module_seed,
        gate_start=args.gate_start,
    )

    def note(name: str, stage: dict[str, Any]) -> None:
        facts[name] = stage
        (args.out / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")

    schedule = schedule_of(args.ar_minutes, noted.get("ar"))
    stage = context_stage(passes, train, held_out, lr=args.ar_lr, schedule=schedule, seed=args.seed)
    note("ar", run(model, stage, args.out))

    if not (args.out / "denoiser.pt").exists():
        seed_denoiser(model)
        for table in model.scale_shift_tables:
            table.data[2] += args.gate_start
    schedule = schedule_of(args.denoiser_minutes, noted.get("denoiser"))
    rate, seed = args.denoiser_lr, args.seed
    stage = denoiser_stage(passes, train, held_out, args.out, lr=rate, schedule=schedule, seed=seed)
    note("denoiser", run(model, stage, args.out))
    export(model, args.out)
    report = f"python -m twotower_kernels.reference.demo_report --model {args.out} --out {SHIPPED}"
    print(f"written to {args.out}; to ship it, run: {report}")


if __name__ == "__main__":
    main()

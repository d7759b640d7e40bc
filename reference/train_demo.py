"""Trains the demo model: `python -m twotower_kernels.reference.train_demo`, resumable at any time.

First the context tower by next-token prediction, then, with it frozen, the denoiser by the official recipe on blocks of
16 (both AdamW with a warmup-stable-decay schedule). Writes `config.json`, `model.safetensors`, `tokenizer.json` and the
training curves; `python -m twotower_kernels.reference.demo_report` then measures the result and writes the model card.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference.demo_data import Corpus, encode, standard_library, train_tokenizer, windows
from twotower_kernels.reference.layers import Mamba2, Router
from twotower_kernels.reference.model import NEVER_NARROWED, TwoTower
from twotower_kernels.reference.training import ar_loss, denoise_all_blocks, denoiser_loss, masked_loss, seed_denoiser

BLOCK, MASK = 16, 3
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


@dataclass(frozen=True)
class Stage:
    """One optimization run; over the last `decay` of the steps the rate falls linearly to `floor`·lr."""

    name: str
    steps: int
    lr: float
    batch: int = 16
    length: int = 256
    warmup: int = 100
    decay: float = 0.3
    floor: float = 0.01
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Warmup-stable-decay."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min((step + 1) / self.warmup, 1.0, self.floor + (1 - self.floor) * left)


@dataclass
class History:
    """What the curves show: (step, value) pairs, and the seconds spent so far."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


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


def balance_router(router: Router, _: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    """Loss-free load balancing (arXiv 2408.15664): a busy expert's selection bias falls, an idle one's rises."""
    if router.training and torch.is_grad_enabled():
        bias = router.e_score_correction_bias
        load = torch.bincount(output[1].flatten(), minlength=len(bias)).float()
        bias.data += 0.001 * torch.sign(load.mean() - load)


def optimizer(model: TwoTower, stage: Stage) -> torch.optim.AdamW:
    """AdamW over the stage's tower; weight decay on matrices only."""
    ours = ("context_",) if stage.name == "ar" else ("denoiser_", "lm_head", "t_", "scale_shift")
    chosen = {n: p for n, p in model.named_parameters() if n.startswith(ours) and not n.endswith("correction_bias")}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    plain = [p for n, p in chosen.items() if p.dim() < 2 or "embed" in n or "scale_shift" in n]
    decayed = [p for n, p in chosen.items() if all(p is not q for q in plain)]
    groups = [dict(params=decayed, weight_decay=stage.weight_decay), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas)


def loss_of(model: TwoTower, stage: Stage, ids: Tensor, generator: torch.Generator) -> Tensor:
    if stage.name == "ar":
        return ar_loss(model, ids)
    return denoiser_loss(model, ids, block_size=BLOCK, mask_token_id=MASK, generator=generator)


@torch.no_grad()
def validate(model: TwoTower, stage: Stage, stream: Tensor) -> float:
    """Loss on 64 fixed held-out windows: next-token, or masked cross-entropy averaged over t = 0.25, 0.5, 0.75, 1."""
    generator = torch.Generator().manual_seed(1234)
    ids = windows(stream, stage.length, 64, generator)
    if stage.name == "ar":
        return float(ar_loss(model, ids))
    losses = []
    for t in (0.25, 0.5, 0.75, 1.0):
        noisy = ids.masked_fill(torch.rand(ids.shape, generator=generator) < t, MASK)
        logits = denoise_all_blocks(model, noisy, ids, t, block_size=BLOCK)
        losses.append(masked_loss(logits, noisy, ids, mask_token_id=MASK))
    return float(torch.stack(losses).mean())


def run(model: TwoTower, stage: Stage, train: Tensor, held_out: Tensor, folder: Path) -> History:
    """Trains one stage from its last saved step to its end, saving every 50 steps and validating every 200."""
    saved = folder / f"{stage.name}.pt"
    opt, history, first = optimizer(model, stage), History(), 0
    generator = torch.Generator().manual_seed(stage.seed)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        history, first = History(**state["history"]), state["step"]

    def save(step: int) -> None:
        state = dict(model=model.state_dict(), optimizer=opt.state_dict(), step=step, history=asdict(history))
        torch.save(state | dict(generator=generator.get_state()), saved.with_suffix(".part"))
        saved.with_suffix(".part").replace(saved)

    model.train()
    started = time.perf_counter() - history.seconds
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, mininterval=5)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = stage.rate(step)
        loss = loss_of(model, stage, windows(train, stage.length, stage.batch, generator), generator)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], stage.clip)
        opt.step()
        done = step + 1
        if done % 20 == 0:
            history.train.append((done, float(loss.detach())))
            bar.set_postfix(loss=f"{history.train[-1][1]:.3f}")
        if done % 200 == 0 or done == stage.steps:
            history.validation.append((done, validate(model, stage, held_out)))
            tqdm.write(f"{stage.name} {done}: validation {history.validation[-1][1]:.4f}")
        if done % 50 == 0 or done == stage.steps:
            history.seconds = time.perf_counter() - started
            save(done)
    return history


def export(model: TwoTower, folder: Path) -> None:
    """Writes the released layout: bfloat16, but router, A_log, D and dt_bias in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p if n.endswith(NEVER_NARROWED) else p.bfloat16() for n, p in model.state_dict().items()}
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")


def prepare(folder: Path) -> tuple[Corpus, Tensor, Tensor]:
    """Reads the library, trains the tokenizer (saved in `folder`), and returns the corpus and both streams."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = standard_library()
    tokenizer = train_tokenizer(list(corpus.train.values()), CONFIG["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return corpus, encode(tokenizer, list(corpus.train.values())), encode(tokenizer, list(corpus.held_out.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="checkpoints to resume from, and the result"
    )
    for name, tower, steps, rate in (("ar", "context", 1400, 2.5e-3), ("denoiser", "denoiser", 1200, 1.5e-3)):
        parser.add_argument(
            f"--{name}-steps", type=int, default=steps, help=f"of the {tower} tower's training (default: {steps})"
        )
        parser.add_argument(f"--{name}-lr", type=float, default=rate, help=f"its highest learning rate ({rate})")
    parser.add_argument("--gate-start", type=float, default=1.0, help="added to every gate's table row; 0 is official")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, data order and corruption")
    parser.add_argument("--stop-after", choices=("ar", "denoiser"), default="denoiser", help="the last stage to train")
    args = parser.parse_args()

    corpus, train, held_out = prepare(args.out)
    torch.manual_seed(args.seed)
    model = TwoTower(TwoTowerConfig.from_dict(CONFIG))
    initialise(model, torch.Generator().manual_seed(args.seed))
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(balance_router)
        if isinstance(module, Mamba2):
            module.compile()  # the scan is mostly elementwise work: fused, a step takes two thirds of the time
    stages = [Stage("ar", args.ar_steps, args.ar_lr, seed=args.seed)]
    if args.stop_after == "denoiser":
        stages.append(Stage("denoiser", args.denoiser_steps, args.denoiser_lr, seed=args.seed + 1))
    facts: dict[str, Any] = dict(
        python=corpus.python,
        torch=torch.__version__,
        files=corpus.fingerprint,
        held_out_files=sorted(corpus.held_out),
        train_tokens=len(train),
        held_out_tokens=len(held_out),
        seed=args.seed,
        gate_start=args.gate_start,
    )
    for stage in stages:
        if stage.name == "denoiser" and not (args.out / "denoiser.pt").exists():
            seed_denoiser(model)
            for table in model.scale_shift_tables:
                table.data[2] += args.gate_start
        facts[stage.name] = asdict(stage) | asdict(run(model, stage, train, held_out, args.out))
        (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    export(model, args.out)
    report = f"python -m twotower_kernels.reference.demo_report --model {args.out} --out {SHIPPED}"
    print(f"written to {args.out}; to ship it, run: {report}")


if __name__ == "__main__":
    main()

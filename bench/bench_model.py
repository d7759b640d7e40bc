"""One denoiser step of a mid-size model against the same model on plain PyTorch: `python -m bench.bench_model`.

The rivals run the same modules with the same weights, and only the operations are exchanged, so that the figures differ
by the operations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from bench import rivals
from bench.timing import Report
from twotower_kernels import layers
from twotower_kernels import model as wiring

CONTEXT, BLOCK = 8192, 16
CONFIG = tt.TwoTowerConfig(
    vocab_size=32768,
    hidden_size=1024,
    hybrid_override_pattern="MEMEM*EMEMEM*E",
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=32,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=1024,
    routed_scaling_factor=2.5,
)


@contextmanager
def operations(plain: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """The model computes with these instead of the package's operations."""
    places = [(module, name) for name in plain for module in (layers, wiring) if hasattr(module, name)]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, plain[name])
        yield
    finally:
        for (module, name), op in zip(places, before, strict=True):
            setattr(module, name, op)


def random_state(model: tt.TwoTowerModel, batch: int) -> tt.ContextState:
    """A context of random keys, values and states: what it says does not change what it costs."""
    state = model.empty_state(batch)

    def drawn(tensors: dict[int, Tensor], *shape: int) -> dict[int, Tensor]:
        return {i: torch.randn(batch, *(shape or t.shape[1:])).to(t.dtype) for i, t in tensors.items()}

    kv = CONTEXT, CONFIG.num_key_value_heads, CONFIG.head_dim
    return state.replaced(
        lengths=torch.full((batch,), CONTEXT),
        k=drawn(state.k, *kv),
        v=drawn(state.v, *kv),
        conv=drawn(state.conv),
        ssm=drawn(state.ssm),
        longest=CONTEXT,
    )


def step(
    model: tt.TwoTowerModel, ids: Tensor, state: tt.ContextState, t: Tensor, plain: dict[str, Any]
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with operations(plain):
            return model.denoise(ids, state, t)

    return call


def check(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Per position, in relative size. A narrow model's experts may flip at a few of them: the median must agree."""
    error = (ours - theirs).norm(dim=-1) / ours.norm(dim=-1)
    limit = {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]
    assert error.median() < limit, f"outputs differ by {error.median():.1e}"


def main() -> None:
    torch.manual_seed(0)
    report = Report(f"denoise, block of {BLOCK}, context {CONTEXT}")
    for dtype in (torch.bfloat16, torch.float32):
        model = tt.TwoTowerModel(CONFIG, dtype=dtype, towers="denoiser")
        for batch in (1, 4):
            ids = torch.randint(CONFIG.vocab_size, (batch, BLOCK))
            state, t = random_state(model, batch), torch.linspace(0.25, 1, batch)
            programs = {
                "twotower_kernels": step(model, ids, state, t, {}),
                "PyTorch, best": step(model, ids, state, t, rivals.BEST),
                "PyTorch eager": step(model, ids, state, t, rivals.EAGER),
            }
            ours, *others = (call() for call in programs.values())
            for theirs in others:
                check(ours, theirs, dtype)
            report.add(f"[{batch}, {BLOCK}] {dtype}", programs)
    report.show()


if __name__ == "__main__":
    main()

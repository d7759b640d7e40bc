"""A denoiser step, a prefill and the cost over the context, of a mid-size model with random weights.

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
from bench.ceilings import Ceilings
from bench.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals
from twotower_kernels import layers
from twotower_kernels import model as wiring

BLOCK = 16
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


def random_state(model: tt.TwoTowerModel, batch: int, context: int) -> tt.ContextState:
    """A context of random keys, values and states: what it says does not change what it costs."""
    state, c = model.empty_state(batch), model.config

    def drawn(tensors: dict[int, Tensor], *shape: int) -> dict[int, Tensor]:
        return {i: t.new_empty(batch, *(shape or t.shape[1:])).normal_() for i, t in tensors.items()}

    kv = context, c.num_key_value_heads, c.head_dim
    return state.replaced(
        lengths=torch.full_like(state.lengths, context),
        k=drawn(state.k, *kv),
        v=drawn(state.v, *kv),
        conv=drawn(state.conv),
        ssm=drawn(state.ssm),
        longest=context,
    )


def per_position(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    """In relative size, the median over positions. In float32, which is measured first, this says that the programs are
    the same; rounding to bfloat16 makes a random model's routers choose other experts here and there."""
    limit = 1e-4 if dtype == torch.float32 else 0.25

    def check(ours: Tensor, theirs: Tensor) -> None:
        error = (ours - theirs).norm(dim=-1) / ours.norm(dim=-1)
        assert error.median() < limit, f"outputs differ by {error.median():.1e}"

    return check


def of_parameters(model: tt.TwoTowerModel, rows: int) -> tuple[int, int]:
    """Bytes and multiplications times two of all linear layers and of the experts that so many rows hit on average."""
    tower = model.denoiser_tower if model.towers == "denoiser" else model.context_tower
    c = CONFIG
    hit = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** rows)
    moved, products = 0.0, 0.0
    for name, p in tower.named_parameters():
        size = p.numel() * p.element_size()
        if ".experts." in name:
            moved += size * hit / c.n_routed_experts
            products += p.numel() / c.n_routed_experts * c.num_experts_per_tok
        elif p.ndim == 2 and "embeddings" not in name:
            moved += size
            products += p.numel()
    return int(moved), int(2 * products * rows)


def step(model: tt.TwoTowerModel, batch: int, context: int, goals: Goals = NO_GOALS, rivalled: bool = True) -> Case:
    dtype = next(model.parameters()).dtype
    ids = torch.randint(CONFIG.vocab_size, (batch, BLOCK))
    state, t = random_state(model, batch, context), torch.linspace(0.25, 1, batch)

    def run(plain: dict[str, Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with operations(plain):
                return model.denoise(ids, state, t)

        return call

    programs = {OURS: run({})}
    if rivalled:
        programs |= {ORIGINAL: run(rivals.ORIGINAL), "PyTorch: best operations": run(rivals.BEST)}
    moved, flops = of_parameters(model, batch * BLOCK)
    head = model.lm_head.weight
    heads = CONFIG.num_attention_heads * CONFIG.head_dim * len(CONFIG.layers("*"))
    attention = 4 * batch * BLOCK * heads * (context + BLOCK)
    flops += 2 * batch * BLOCK * head.numel() + attention
    shape = f"B {batch}, S {BLOCK}, context {context}"
    moved += head.numel() * head.element_size()

    def floor(c: Ceilings) -> float:
        """Weights at the speed of memory, then attention at 60 % of the peak: neither hides behind the other."""
        return moved / c.read / 1e9 + attention / (0.6 * c.matrix(dtype)) / 1e9

    return Case("denoiser step", shape, dtype, programs, per_position(dtype), moved, flops, goals, floor)


def prefill(dtype: torch.dtype, tokens: int, goals: Goals) -> Case:
    model = tt.TwoTowerModel(CONFIG, dtype=dtype, towers="context")
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))

    def run(plain: dict[str, Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with operations(plain):
                return model.prefill(ids).logits

        return call

    _, flops = of_parameters(model, tokens)
    heads = CONFIG.num_attention_heads * CONFIG.head_dim * len(CONFIG.layers("*"))
    flops += 2 * heads * tokens * (tokens + 1)
    programs = {OURS: run({}), ORIGINAL: run(rivals.ORIGINAL), "PyTorch: best operations": run(rivals.BEST)}
    return Case("prefill", f"{tokens} tokens", dtype, programs, per_position(dtype), flops=flops, goals=goals)


def cases(device: str = "cpu") -> Iterator[Case]:
    if device != "cpu":
        return  # bench/gpu_model.py measures the released size
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = tt.TwoTowerModel(CONFIG, dtype=dtype, towers="denoiser")
        wanted: Goals = (6, 2, 1 / 1.6) if dtype == torch.bfloat16 else NO_GOALS
        yield step(model, 1, 8192, wanted)
        if dtype == torch.bfloat16:
            yield step(model, 4, 8192, rivalled=False)
            for context in (1024, 8192, 32768, 131072):
                yield step(model, 1, context, rivalled=False)
        del model
    # In float32: PyTorch's bfloat16 products take minutes where the processor has none.
    yield prefill(torch.float32, 4096, (3, 1.2, None))

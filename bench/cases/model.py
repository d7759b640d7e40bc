"""A denoiser step, a prefill and the cost over the context, of a mid-size model with random weights.

The baselines run the same modules with the same weights, and only the operations are exchanged, so that the figures
differ by the operations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.costs.cost_model import forward, total
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals
from twotower_kernels.bench.sizes.configs import CONFIG
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.model import layers
from twotower_kernels.model import state as states
from twotower_kernels.model import two_tower as wiring

BLOCK = 16


@contextmanager
def operations(plain: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """The model computes with these instead of the package's operations."""
    places = [(module, name) for name in plain for module in (layers, wiring, states) if hasattr(module, name)]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, plain[name])
        yield
    finally:
        for (module, name), op in zip(places, before, strict=True):
            setattr(module, name, op)


OUTPUTS = ("out_proj.weight", "o_proj.weight", "experts.down", "down_proj.weight")  # what layers add to the residual


def random_model(
    dtype: torch.dtype, towers: str, config: tt.TwoTowerConfig = CONFIG, device: str = "cpu"
) -> tt.TwoTowerModel:
    """Drawn as models begin their training: embeddings of variance 1, and what layers add to them scaled by
    (2 · layers)^-1/2 (GPT-2, section 2.3). The residual then says most of what a router sees, as in a trained model;
    with all weights alike it hangs on the rounding of the first layers which experts are chosen."""
    model = tt.TwoTowerModel(config, device=device, dtype=dtype, towers=towers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("embeddings.weight"):
                p.normal_()
            elif name.endswith(OUTPUTS):
                p.mul_((2 * len(config.hybrid_override_pattern)) ** -0.5)
    return model


def widened(model: tt.TwoTowerModel) -> tt.TwoTowerModel:
    """The same model in float32."""
    float32_copy = tt.TwoTowerModel(CONFIG, dtype=torch.float32, towers=model.towers)
    float32_copy.load_state_dict(model.state_dict())
    return float32_copy


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


def relative(a: Tensor, b: Tensor) -> float:
    """The median over positions of the difference in 2-norm."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def same(ours: Tensor, theirs: Tensor) -> None:
    """In float32, which is measured first: the programs are the same but for rounding."""
    assert relative(ours, theirs) < 1e-4, f"outputs differ by {relative(ours, theirs):.1e}"


def as_near(exact: Tensor) -> Callable[[Tensor, Tensor], None]:
    """In bfloat16, where here and there a router still chooses another expert, both are compared with float32 of the
    same weights: half a per cent to one is what rounding makes. (Unrelated outputs would differ by 1.4.)"""

    def check(ours: Tensor, theirs: Tensor) -> None:
        first, second = relative(ours, exact), relative(theirs, exact)
        assert max(first, second) < min(0.05, 2 * min(first, second)), f"off float32 by {first:.1e} and {second:.1e}"

    return check


def step(
    model: tt.TwoTowerModel,
    batch: int,
    context: int,
    goals: Goals = NO_GOALS,
    compared: bool = True,
    float32_copy: tt.TwoTowerModel | None = None,
) -> Case:
    """`float32_copy`: the same model in float32, where this one is not."""
    dtype = next(model.parameters()).dtype
    ids = torch.randint(CONFIG.vocab_size, (batch, BLOCK))
    state, t = random_state(model, batch, context), torch.linspace(0.25, 1, batch)
    check = same
    if float32_copy is not None:
        k, v, conv = ({i: x.float() for i, x in part.items()} for part in (state.k, state.v, state.conv))
        check = as_near(float32_copy.denoise(ids, state.replaced(k=k, v=v, conv=conv), t))

    def run(plain: dict[str, Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with operations(plain):
                return model.denoise(ids, state, t)

        return call

    programs = {OURS: run({})}
    if compared:
        programs |= {ORIGINAL: run(pytorch.ORIGINAL), "PyTorch: best operations": run(pytorch.BEST)}
    calls = forward(CONFIG, "denoiser", batch, BLOCK, context, dtype=str(dtype).removeprefix("torch."))
    cost, attention = total(calls), total([call for call in calls if call.op == "attention"])
    shape = f"B {batch}, S {BLOCK}, context {context}"

    def floor(c: Ceilings) -> float:
        """Weights at the speed of memory, then attention at 60 % of the peak: neither hides behind the other."""
        return cost.weights / c.read / 1e9 + attention.flops / (0.6 * c.matrix(dtype)) / 1e9

    sizes = dict(batch=batch, block=BLOCK, context=context)
    return Case("denoiser step", shape, dtype, programs, check, cost, goals, floor, sizes)


def prefill(dtype: torch.dtype, tokens: int, goals: Goals) -> Case:
    model = random_model(dtype, "context")
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))
    last = CONFIG.layers("*")[-1]

    def keys_of_last(model: tt.TwoTowerModel) -> Tensor:
        """Logits are of one position: the keys of the last attention layer, [1, tokens, heads · dim], say more."""
        return model.prefill(ids).k[last][:, :tokens].flatten(2)

    check = same if dtype == torch.float32 else as_near(keys_of_last(widened(model)))

    def run(plain: dict[str, Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with operations(plain):
                return keys_of_last(model)

        return call

    cost = total(forward(CONFIG, "context", 1, tokens, 0, dtype=str(dtype).removeprefix("torch.")))
    programs = {OURS: run({}), ORIGINAL: run(pytorch.ORIGINAL), "PyTorch: best operations": run(pytorch.BEST)}
    sizes = dict(batch=1, length=tokens)
    return Case("prefill", f"{tokens} tokens", dtype, programs, check, cost, goals, sizes=sizes)


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    """The model's sizes are its own; batches and contexts may be chosen.

    Raises:
        NotImplementedError: other shapes, or a device that is no CPU.
    """
    if device != "cpu":
        raise NotImplementedError("measured on a CPU; bench/gpu_model.py measures the released size on a GPU")
    if shapes != RELEASED:
        raise NotImplementedError("this model's sizes are its own, whatever the shapes")
    torch.manual_seed(0)
    model = random_model(torch.bfloat16, "denoiser")
    float32_copy = widened(model)
    if batches or contexts:
        for batch in batches or (1,):
            for context in contexts or (8192,):
                yield step(model, batch, context, float32_copy=float32_copy)
        return
    yield step(float32_copy, 1, 8192)
    yield step(model, 1, 8192, (6, 2, 1 / 1.6), float32_copy=float32_copy)
    del float32_copy
    yield step(model, 4, 8192, compared=False)
    for context in (1024, 8192, 32768, 131072):
        yield step(model, 1, context, compared=False)
    del model
    # PyTorch's bfloat16 products take minutes where the processor has none.
    yield prefill(torch.float32 if pytorch.widen() else torch.bfloat16, 4096, (3, 1.2, None))

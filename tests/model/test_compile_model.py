"""The model under `torch.compile` and `torch.export`: every call whole, and one graph for all sizes and all times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map

import twotower_kernels as tt
from tests.model.test_surroundings import SURROUNDINGS
from twotower_kernels import ContextState, RemaskPolicy, TwoTowerModel
from twotower_kernels.bench.checks.random_models import models, random_ids

# Rows, tokens of a block and of the context. No two sizes are the same, nor one of the model's (of which 2 and 3 are
# numbers of heads and of columns): sizes that are equal when a graph is made are taken to be equal always. The products
# of float32 are on both sides of where another program computes them.
SIZES = ((6, 5, 9), (7, 10, 11), (8, 40, 100))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def small() -> TwoTowerModel:
    return models("M*E-", torch.float32).ours


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def read(state: ContextState) -> list[Tensor]:
    """What a state says, without the room that its storage has to spare."""
    ids = random_ids(state.batch_size, 4)
    return [state.lengths, state.logits, small().denoise(ids, state, 0.5)]


def extended(model: TwoTowerModel, ids: Tensor, lengths: Tensor) -> ContextState:
    """Storage that moves, and storage that is appended to."""
    return model.commit(ids, model.prefill(ids, lengths))


# --- one graph ------------------------------------------------------------------------------------------------------


def test_one_graph_serves_all_times() -> None:
    model = small()
    ids, state = random_ids(2, 4), model.prefill(random_ids(2, 6))
    compiled = torch.compile(model.denoise, fullgraph=True, backend="aot_eager")
    for i in range(20):
        assert_same(compiled(ids, state, i / 20), model.denoise(ids, state, i / 20))
    assert graphs() == 2  # one for the first time, when the compiler takes it to be constant


@pytest.mark.parametrize("policy", [RemaskPolicy.twotower(), RemaskPolicy.posterior()])
def test_one_graph_serves_all_steps(policy: RemaskPolicy) -> None:
    """A whole step of a block, from the time that the model is told to the tokens that stay."""
    model, mask = small(), 3
    state = model.prefill(random_ids(2, 6))

    def step(tokens: Tensor, masked: Tensor, i: int, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
        logits = model.denoise(tokens, state, policy.model_time(masked, tokens.shape[1], i, 6))
        numbers: dict[str, Any] = dict(step=i, num_steps=6, seed=i, gate_bound=threshold, temperature=temperature)
        result = tt.remask(logits, tokens, mask_token_id=mask, policy=policy, **numbers)
        return result.tokens, result.num_masked

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine = theirs = torch.full((2, 7), mask), torch.tensor([7, 7])
    for i in range(6):
        numbers = i, 0.5 + i / 20, 0.25 + i / 10
        mine, theirs = compiled(*mine, *numbers), step(*theirs, *numbers)
        assert_same(mine, theirs)
    assert graphs() == 2


CALLS: dict[str, Callable[..., Tensor]] = {
    "a number for t": lambda model, ids, state: model.denoise(ids, state, 0.5),
    "a tensor for t": lambda model, ids, state: model.denoise(ids, state, torch.arange(len(ids)) / 8),
    "selected rows": lambda model, ids, state: model.denoise(ids[:4], state.select([3, 1, 1, 0])),
    "a state's logits": lambda model, ids, state: state.logits,
    "forward_ar": lambda model, ids, state: model.forward_ar(ids),
}


@pytest.mark.parametrize(
    ("call", "backend", "dynamic"),
    [*((call, "eager", True) for call in CALLS), ("a number for t", "eager", None)],
)
def test_one_graph_serves_all_sizes(call: str, backend: str, dynamic: bool | None) -> None:
    """Two, if the compiler must first see that they vary."""
    model = small()
    compiled = torch.compile(CALLS[call], fullgraph=True, backend=backend, dynamic=dynamic)
    for batch, block, context in SIZES:
        ids, state = random_ids(batch, block), model.prefill(random_ids(batch, context))
        assert_same(compiled(model, ids, state), CALLS[call](model, ids, state))
    assert graphs() == (1 if dynamic else 2)


def test_a_context_is_made_and_extended() -> None:
    compiled = torch.compile(extended, fullgraph=True, backend="eager", dynamic=True)
    for batch, block, _ in SIZES:
        ids, lengths = random_ids(batch, block), torch.arange(batch).clamp(min=1, max=block)
        assert_same(read(compiled(small(), ids, lengths)), read(extended(small(), ids, lengths)))
    assert graphs() == 1


def test_a_compiled_commit_consumes_its_argument() -> None:
    """Two graphs: one appends in place, one moves the storage first."""
    model = small()
    compiled = torch.compile(model.commit, fullgraph=True, backend="eager", dynamic=True)
    mine, theirs = (model.prefill(random_ids(6, 9)) for _ in range(2))
    for block in (5, 7, 10, 100, 8):
        ids, before = random_ids(6, block), mine
        mine, theirs = compiled(ids, mine), model.commit(ids, theirs)
        assert_same(read(mine), read(theirs))
        with pytest.raises(RuntimeError, match="consumed by commit"):
            before.lengths  # noqa: B018
    assert graphs() == 2


@pytest.mark.parametrize("surrounding", ["gradients", "inference mode", "autocast"])
def test_a_compiled_call_does_not_heed_what_surrounds_it(surrounding: str) -> None:
    model = small()
    ids, state = random_ids(2, 20), model.prefill(random_ids(2, 6))
    compiled = torch.compile(model.denoise, fullgraph=True, backend="eager")
    expected = model.denoise(ids, state, 0.5)
    with SURROUNDINGS[surrounding]():
        assert_same(compiled(ids, state, 0.5), expected)
    assert_same(compiled(ids, state, 0.5), expected)


# --- programs -------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A denoising step as a program of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, ids: Tensor, t: Tensor, parts: dict[str, Any]) -> Tensor:
        return self.model.denoise(ids, ContextState(**parts, head=None, index=None, longest=0), t)


class Context(nn.Module):
    """The context tower: logits, and what a block leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, ids: Tensor, lengths: Tensor) -> list[Any]:
        state = self.model.commit(ids, self.model.prefill(ids, lengths))
        return [self.model.forward_ar(ids), state.lengths, state.conv, state.ssm, state.last_hidden]


def denoiser_inputs(batch: int, block: int, context: int) -> tuple[Any, ...]:
    state = small().prefill(random_ids(batch, context))
    parts = {name: getattr(state, name) for name in ("lengths", "k", "v", "conv", "ssm", "last_hidden")}
    return random_ids(batch, block), torch.rand(batch), parts


def context_inputs(batch: int, block: int, context: int) -> tuple[Any, ...]:
    return random_ids(batch, block), torch.arange(batch).clamp(max=block)


@pytest.mark.parametrize(("module", "inputs"), [(Denoiser, denoiser_inputs), (Context, context_inputs)])
def test_an_exported_program_takes_all_sizes(module: type[nn.Module], inputs: Callable[..., tuple[Any, ...]]) -> None:
    program, given = module(), inputs(*SIZES[0])
    sizes = tree_map(lambda tensor: dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO), given)
    exported = torch.export.export(program, given, dynamic_shapes=sizes, strict=False).module()
    for size in SIZES:
        given = inputs(*size)
        assert_same(exported(*given), program(*given))

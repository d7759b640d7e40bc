"""Inference in whatever surrounds it: the caller's autocast, his gradients, his inference mode, and changes of these
between two calls. Results are the same to the bit, and ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import twotower_kernels as tt
from twotower_kernels import ContextState, TwoTowerModel
from twotower_kernels.bench.checks.random_models import models, random_ids
from twotower_kernels.model import state as state_module


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """What `torch.autocast("cuda")` turns on, on machines without one too."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast of a GPU": autocast_of_a_gpu,
}
LENGTHS = [20, 9]


def small(dtype: torch.dtype = torch.float32) -> TwoTowerModel:
    return models("M*E-", dtype).ours


def contents(state: ContextState) -> list[Tensor]:
    return [state.lengths, state.last_hidden, *state.conv.values(), *state.ssm.values()]


def answers(model: TwoTowerModel) -> list[Tensor]:
    """Of every public call, on more rows than the CPU's kernels for few rows take."""
    ids, block = random_ids(2, 20), random_ids(2, 17, seed=1)
    state = model.prefill(ids, LENGTHS)
    logits = [model.forward_ar(ids), state.logits, model.denoise(block, state), model.denoise(block, state, 0.5)]
    few = state.select([1])
    logits += [model.denoise(block[:1], few, torch.tensor([0.25])), few.fork(2).logits]
    state = model.commit(block, state, [17, 3])
    state = model.commit(block[:, :1], state)
    text = [
        new
        for mode in ("mask_diffusion", "mock_ar", "ar")
        for new in model.generate(ids, mode=mode, max_new_tokens=9, block_size=4, temperature=1.0).new_tokens
    ]
    return [*logits, *contents(state), *contents(few), state.logits, *text]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_ordinary(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        assert not tensor.is_inference() and not tensor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_every_answer_is_the_same(surrounding: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    expected = answers(model)
    with SURROUNDINGS[surrounding]():
        got = answers(model)
    assert_same(got, expected)
    assert_ordinary(got)


def test_two_surroundings_at_once() -> None:
    model = small()
    expected = answers(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), autocast_of_a_gpu():
        assert_same(answers(model), expected)
        assert (
            torch.is_autocast_enabled("cpu") and torch.is_autocast_enabled("cuda") and torch.is_inference_mode_enabled()
        )


def test_parameters_that_want_gradients_change_nothing() -> None:
    model = small()
    expected = answers(model)
    model.requires_grad_(True)
    try:
        got = answers(model)
    finally:
        model.requires_grad_(False)
    assert_same(got, expected)
    assert_ordinary(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_logits_can_be_written_and_learned_from(surrounding: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    with SURROUNDINGS[surrounding]():
        state = model.prefill(random_ids(2, 20), LENGTHS)
        block = random_ids(2, 4)
        made = [model.denoise(block, state, 0.5), model.forward_ar(block), state.logits]
    for logits in made:
        logits[..., 3] = -torch.inf
        logits[0].fill_(1.0)
        weight = torch.ones(logits.shape[-1], requires_grad=True)
        (logits.nan_to_num() * weight).sum().backward()
        torch.testing.assert_close(weight.grad, logits.nan_to_num().flatten(0, -2).sum(0))


def test_a_context_can_be_learned_from() -> None:
    """As a constant: of its keys and values, and of the states of Mamba-2, a backward pass keeps what it needs."""
    with torch.inference_mode():
        state = small().prefill(random_ids(2, 6))
    k, v = state.k[1], state.v[1]
    q = torch.randn(2, 3, 2 * k.shape[2], k.shape[3], requires_grad=True)
    out: Any = tt.context_attention(q, k, v, context_lens=state.lengths)
    out.square().sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0
    for tensor in contents(state):
        weight = torch.ones((), requires_grad=True)
        (tensor * weight).sum().backward()
        tensor.zero_()


def test_logits_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head's product wrote is what the caller gets."""
    model, made = small(), []
    product = state_module.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        made.append(product(x, weight))
        return made[-1]

    monkeypatch.setattr(state_module, "linear", watched)
    state = model.prefill(random_ids(1, 5))
    for call in (lambda: model.denoise(random_ids(1, 4), state, 0.5), lambda: model.forward_ar(random_ids(1, 4))):
        assert call().data_ptr() == made[-1].data_ptr()
    assert state.logits.data_ptr() == made[-1].data_ptr()


@pytest.mark.parametrize("first", SURROUNDINGS)
def test_a_state_moves_between_surroundings(first: str) -> None:
    model, ids = small(), [random_ids(2, 5, seed=seed) for seed in range(4)]

    def steps(into: Callable[[int], AbstractContextManager[Any]]) -> list[Tensor]:
        """Prefill, selection, and commits that append in place and that move the storage, each in its surrounding."""
        with into(0):
            state = model.prefill(ids[0], [5, 2])
        with into(1):
            state = model.commit(ids[1], state)
        with into(0):
            state = model.commit(ids[2], state.select([1, 0]), [3, 4])
        with into(1):
            state = model.commit(random_ids(2, 100), state)
        with into(0):
            return [model.denoise(ids[3], state, 0.5), state.logits, *contents(state)]

    expected = steps(lambda n: nullcontext())
    for second in SURROUNDINGS.values():
        got = steps(lambda n: (SURROUNDINGS[first], second)[n]())  # noqa: B023
        assert_same(got, expected)
        assert_ordinary(got)


def test_arguments_made_in_inference_mode_serve_outside() -> None:
    model = small()
    with torch.inference_mode():
        ids, lengths, t, rows = random_ids(2, 5), torch.tensor([5, 2]), torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
    state = model.prefill(ids, lengths).select(rows)
    got = [model.denoise(ids, state, t), *contents(model.commit(ids, state, lengths))]
    assert_ordinary(got)
    again = model.prefill(random_ids(2, 5), [5, 2]).select([1, 0])
    assert torch.equal(got[0], model.denoise(random_ids(2, 5), again, torch.tensor([0.5, 0.25])))


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "ar"])
def test_a_stream_goes_on_in_another_surrounding(mode: str, surrounding: str) -> None:
    """Begun outside and continued inside, the reverse, and changing with every event."""
    model = small()
    options: dict[str, Any] = dict(mode=mode, max_new_tokens=7, block_size=4, temperature=1.0, eos_token_id=2)
    prompts = [[5, 6, 7], [8]]
    expected = model.generate(prompts, **options)
    for inside in ([True, False], [False, True]):
        with SURROUNDINGS[surrounding]() if inside[0] else nullcontext():
            stream = model.stream(prompts, **options)
        events, going = [], True
        while going:
            with SURROUNDINGS[surrounding]() if inside[len(events) % 2] else nullcontext():
                event = next(stream, None)
            going = event is not None
            events += [event] if event is not None else []
        with SURROUNDINGS[surrounding]():
            result = stream.result()
        assert_same(result.sequences, expected.sequences)
        assert_ordinary([*result.sequences, *result.new_tokens])
        for event in events:
            assert_ordinary([leaf for leaf in tree_leaves(list(vars(event).values())) if isinstance(leaf, Tensor)])


def test_an_observer_keeps_his_own_surrounding() -> None:
    seen = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        small().generate(
            [[5]],
            max_new_tokens=2,
            block_size=2,
            on_step=lambda event: seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))),
        )
    assert seen and all(pair == (True, True) for pair in seen)


def test_a_model_made_in_inference_mode_can_be_loaded_outside() -> None:
    with torch.inference_mode():
        model = TwoTowerModel(small().config)
    model.load_state_dict(small().state_dict())
    assert_same(answers(model), answers(small()))

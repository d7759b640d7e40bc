"""The package's model: parity with the recorded tensors, agreement with the specification layer by layer, and calls."""

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import GOLDEN
from twotower_kernels import ContextState, TwoTowerModel
from twotower_kernels.bench.checks import recordings
from twotower_kernels.bench.checks.agreement import assert_agreement
from twotower_kernels.bench.checks.random_models import models, random_ids, with_wide_residual
from twotower_kernels.model.cache import KVCache, MambaCache
from twotower_kernels.reference.generate import generate
from twotower_kernels.reference.layers import Layer
from twotower_kernels.testing.budget import assert_within_budget

BFLOAT16 = recordings.BFLOAT16


# --- the recordings --------------------------------------------------------------------------------------------------


@cache
def outputs(name: str) -> dict[str, Tensor]:
    model = TwoTowerModel.from_pretrained(GOLDEN / name)
    return recordings.outputs_of(model, recordings.recorded(name))


@pytest.mark.parametrize(("name", "key"), recordings.recorded_float32())
def test_recorded_float32(name: str, key: str) -> None:
    recordings.assert_recorded_float32(outputs(name)[key], recordings.expected(name, key))


@pytest.mark.parametrize("key", recordings.output_keys(BFLOAT16))
def test_recorded_bfloat16(key: str) -> None:
    recordings.assert_recorded_bfloat16(outputs(BFLOAT16)[key], recordings.expected(BFLOAT16, key))


def test_every_recorded_output_is_checked() -> None:
    for name in (*recordings.FLOAT32, BFLOAT16):
        assert set(recordings.output_keys(name)) == set(outputs(name))


# --- the specification, layer by layer -------------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 0, 3])


def mixed(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What either program's mixer makes of x [3, 5, H] in a commit from these states."""
    theirs, dtype = isinstance(layer, Layer), x.dtype
    if layer.letter == "M":
        conv, ssm = states[0].to(dtype), states[1].to(torch.promote_types(dtype, torch.float32))
        if theirs:
            return layer.mixer(x, conv, ssm, LENGTHS)
        y, state = layer.mixer(x, MambaCache(conv, ssm, block_lens=LENGTHS, return_state=True))
        return (y, *state)
    if layer.letter == "*":
        k, v, seen = states[0].to(dtype), states[1].to(dtype), torch.tensor([7, 0, 4])
        if theirs:
            return (layer.mixer(x, k, v, seen, None, LENGTHS, True)[0],)
        return layer.mixer(x, KVCache(k, v, seen, block_lens=LENGTHS, causal=True))[:1]
    return (layer.mixer(x),) if theirs else layer.mixer(x)[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("letter", "M*E-")
def test_each_mixer_is_within_the_budget(letter: str, dtype: torch.dtype) -> None:
    """From the same activations, so that no router decides otherwise than the one it is compared with."""
    m = models(letter, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 32, generator=generator).to(dtype)
    shapes = {"M": [(3, 112, 3), (3, 4, 12, 16)], "*": [(3, 7, 2, 16)] * 2}.get(letter, [])
    states = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    for side in ("context_tower", "denoiser_tower"):
        ours, naive, exact = (getattr(model, side).layers[0] for model in m)
        results = mixed(ours, x, states), mixed(naive, x, states), mixed(exact, x.double(), states)
        for n, (got, plain, truth) in enumerate(zip(*results, strict=True)):
            assert_within_budget(got, plain, truth, what=f"{letter} {side} {n}")


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "MEM*E-", "MEM*EM*E-"])
def test_agreement_in_float32(pattern: str) -> None:
    assert_agreement(models(pattern, torch.float32))


def test_agreement_with_other_options() -> None:
    options: dict[str, Any] = dict(n_shared_experts=0, use_conv_bias=False, norm_topk_prob=False)
    options |= dict(num_key_value_heads=4, n_groups=1, n_group=1, topk_group=1, time_step_limit=(0.05, 1.0))
    assert_agreement(models("M*E-M", torch.float32, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_residual", [False, True])
def test_agreement_in_half_precision(dtype: torch.dtype, wide_residual: bool) -> None:
    """Without experts: behind narrow activations one may flip at a rounding boundary, in either program."""
    m = models("M*-M-*", dtype)
    assert_agreement(with_wide_residual(m) if wide_residual else m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_time_is_embedded_to_the_bit(dtype: torch.dtype) -> None:
    """What enters the linear layers, whose own sums have another order."""
    m, t = models("-", dtype), torch.linspace(0, 1, 65, dtype=torch.float64)
    entered: list[Tensor] = []
    for embedder in (m.ours.t_embedder, m.naive.t_embedder):
        with embedder.mlp[0].register_forward_pre_hook(lambda _, inputs: entered.append(*inputs)):
            embedder(t)
    assert torch.equal(*entered) and entered[0].dtype == dtype
    ours, naive, exact = m.ours.t_embedder(t), m.naive.t_embedder(t), m.exact.t_embedder.mlp(entered[0].double())
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
    else:
        assert_within_budget(ours, naive, exact)


def test_a_number_is_a_time_for_every_row() -> None:
    model = models("M*E-", torch.float64).ours
    state, block = model.prefill(random_ids(2, 5)), random_ids(2, 3)
    rows = torch.full((2,), 0.3, dtype=torch.float64)
    for t in (0.3, rows[0]):
        assert torch.equal(model.denoise(block, state, t), model.denoise(block, state, rows))
    assert not torch.equal(model.denoise(block, state, 0.4), model.denoise(block, state, rows))


def test_int32_ids_are_as_good() -> None:
    model, ids = models("M*E-", torch.float32).ours, random_ids(2, 5)
    assert torch.equal(model.forward_ar(ids.int()), model.forward_ar(ids))
    state = model.prefill(ids.int(), torch.tensor([5, 2], dtype=torch.int32))
    assert torch.equal(model.denoise(ids.int(), state), model.denoise(ids, model.prefill(ids, [5, 2])))


def test_nothing_carries_a_gradient() -> None:
    model = models("M*E-", torch.float32).ours
    assert not any(p.requires_grad for p in model.parameters())
    state = model.prefill(random_ids(1, 3))
    assert not any(x.requires_grad for x in (state.logits, model.denoise(random_ids(1, 3), state, 0.5)))


# --- one tower of the two --------------------------------------------------------------------------------------------


def test_towers_apart_are_towers_together() -> None:
    """A context tower's states serve a denoiser that was loaded by itself."""
    path, ids = GOLDEN / "tiny", random_ids(2, 6)
    both = TwoTowerModel.from_pretrained(path)
    context = TwoTowerModel.from_pretrained(path, towers="context")
    denoiser = TwoTowerModel.from_pretrained(path, towers="denoiser")
    names = [set(model.state_dict()) for model in (context, denoiser, both)]
    assert names[0] | names[1] == names[2] and not names[0] & names[1]
    assert torch.equal(context.forward_ar(ids), both.forward_ar(ids))
    assert torch.equal(denoiser.denoise(ids, context.prefill(ids), 0.5), both.denoise(ids, both.prefill(ids), 0.5))
    assert torch.equal(denoiser.denoise(ids, denoiser.empty_state(2)), both.denoise(ids, both.empty_state(2)))
    with pytest.raises(RuntimeError, match=r"expected a model with the denoiser tower, got .* towers='context'"):
        context.denoise(ids, context.prefill(ids))
    for call in (denoiser.forward_ar, denoiser.prefill, lambda ids: denoiser.commit(ids, denoiser.empty_state(2))):
        with pytest.raises(RuntimeError, match="expected a model with the context tower"):
            call(ids)
    with pytest.raises(RuntimeError, match="got one with the denoiser alone"):
        _ = denoiser.empty_state(1).logits


# --- calls that are refused ------------------------------------------------------------------------------------------

Call = Any
ONES = torch.ones(2, 4, dtype=torch.long)
BAD_CALLS: dict[str, tuple[Call, str]] = {
    "token too large": (lambda m, s: m.forward_ar(torch.tensor([[1, 61]])), "input_ids: token 61 at row 0, position 1"),
    "negative token": (lambda m, s: m.prefill(torch.tensor([[-1]])), "token -1 at row 0, position 0"),
    "float ids": (lambda m, s: m.prefill(torch.ones(1, 2)), r"expected integers \[B, S\], got torch\.float32"),
    "ids of rank 1": (lambda m, s: m.denoise(ONES[0], s), r"block_ids: expected .* got torch\.int64 \[4\]"),
    "ids elsewhere": (lambda m, s: m.denoise(ONES.to("meta"), s), "block_ids: expected device cpu, got meta"),
    "one row too few": (lambda m, s: m.denoise(ONES[:1], s), "expected 2 rows as the state has, got 1"),
    "one row too many": (lambda m, s: m.commit(torch.ones(3, 1).long(), s), "expected 2 rows as the state has, got 3"),
    "time above one": (lambda m, s: m.denoise(ONES, s, 1.5), r"t: expected a number in \[0, 1\], got 1\.5"),
    "time not a number": (lambda m, s: m.denoise(ONES, s, float("nan")), "t: .* got nan"),
    "times below zero": (lambda m, s: m.denoise(ONES, s, torch.tensor([0.5, -0.5])), r"in \[0, 1\], got \[0.5, -0.5\]"),
    "times NaN": (lambda m, s: m.denoise(ONES, s, torch.tensor([0.5, torch.nan])), r"got \[0\.5, nan\]"),
    "times for three rows": (lambda m, s: m.denoise(ONES, s, torch.zeros(3)), r"t: .* one or \[2\].* \[3\]"),
    "integer times": (lambda m, s: m.denoise(ONES, s, torch.zeros(2).int()), r"t: expected floating .* torch\.int32"),
    "lengths too long": (lambda m, s: m.commit(ONES, s, torch.tensor([5, 1])), r"0\.\.4, got \[5, 1\]"),
    "negative lengths": (lambda m, s: m.prefill(ONES, torch.tensor([-1, 1])), r"0\.\.4, got \[-1, 1\]"),
    "lengths for three rows": (lambda m, s: m.commit(ONES, s, [1, 2, 3]), r"lengths: expected \[2\] integers"),
    "float lengths": (lambda m, s: m.commit(ONES, s, torch.ones(2)), r"lengths: .* got torch\.float32 \[2\]"),
    "logits of nothing": (lambda m, s: m.empty_state(2).logits, r"at least one token in every row, got lengths \[0, 0"),
    "a negative batch": (lambda m, s: m.empty_state(-1), "batch: expected 0 or more rows, got -1"),
    "no copy": (lambda m, s: s.fork(0), "at least 1 copy, got 0"),
    "rows of rank 2": (lambda m, s: s.select([[0]]), r"rows: expected \[N\] indices .* got shape \[1, 1\]"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_call_is_explained_and_changes_nothing(what: str) -> None:
    call, message = BAD_CALLS[what]
    model = models("M*E-", torch.float32).ours
    state = model.prefill(random_ids(2, 3))
    before = model.denoise(ONES, state)
    with pytest.raises(ValueError, match=message):
        call(model, state)
    assert torch.equal(model.denoise(ONES, state), before)


def test_bad_rows_and_models_are_explained() -> None:
    config = models("-", torch.float32).ours.config
    state = TwoTowerModel(config).empty_state(2)
    with pytest.raises(TypeError, match=r"rows: expected integers or booleans, got torch\.float32"):
        state.select(torch.ones(2))
    with pytest.raises(IndexError):
        state.select([2])
    with pytest.raises(AttributeError, match="has no attribute 'logit'"):
        _ = state.logit
    with pytest.raises(ValueError, match=r"towers: expected one of .*, got 'one'"):
        TwoTowerModel(config, towers="one")
    with pytest.raises(TypeError, match=r"dtype: expected float64.*, got torch\.int8"):
        TwoTowerModel(config, dtype=torch.int8)


# --- compilation and generation --------------------------------------------------------------------------------------


def test_the_denoiser_compiles_as_one_graph() -> None:
    """Whatever the context's length, its storage or its rows; and says the same as it does eagerly."""
    torch._dynamo.reset()
    model = models("M*E-", torch.float32).ours
    compiled = torch.compile(model.denoise, fullgraph=True, backend="aot_eager")
    short, long = model.prefill(random_ids(2, 5)), model.prefill(random_ids(2, 200), [200, 7])
    block, t = random_ids(2, 4, seed=1), torch.tensor([0.25, 1.0])
    calls: list[tuple[ContextState, Tensor | None]] = [(short, t), (long, t), (long.select([1, 1]), t), (short, None)]
    for state, time in calls:
        torch.testing.assert_close(
            compiled(block, state, time), model.denoise(block, state, time), rtol=1e-5, atol=1e-5
        )


def test_generation_has_the_specifications_signature() -> None:
    """Defaults included."""
    wanted = {name: p.default for name, p in inspect.signature(generate).parameters.items()}
    assert {name: p.default for name, p in inspect.signature(TwoTowerModel.generate).parameters.items()} == wanted
    del wanted["on_step"]
    assert {name: p.default for name, p in inspect.signature(TwoTowerModel.stream).parameters.items()} == wanted

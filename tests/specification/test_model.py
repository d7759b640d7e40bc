"""The reference model: parity with the recorded tensors, and the properties of its state."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.paths import GOLDEN
from twotower_kernels.bench.checks.recordings import (
    BFLOAT16,
    FLOAT32,
    assert_recorded_bfloat16,
    assert_recorded_float32,
    cached,
    expected,
    output_keys,
    outputs_of,
    recorded_float32,
)
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference.model import ContextState, TwoTower


@cache
def recorded(name: str) -> tuple[TwoTower, dict[str, Tensor]]:
    return TwoTower.from_pretrained(GOLDEN / name).requires_grad_(False), load_file(GOLDEN / name / "io.safetensors")


@cache
def in_float64(name: str = "tiny") -> TwoTower:
    return TwoTower.from_pretrained(GOLDEN / name, dtype=torch.float64).requires_grad_(False)


@cache
def outputs(name: str) -> dict[str, Tensor]:
    return outputs_of(*recorded(name))


@pytest.mark.parametrize(("name", "key"), recorded_float32())
def test_recorded_float32(name: str, key: str) -> None:
    assert_recorded_float32(outputs(name)[key], expected(name, key))


@pytest.mark.parametrize("key", output_keys(BFLOAT16))
def test_recorded_bfloat16(key: str) -> None:
    assert_recorded_bfloat16(outputs(BFLOAT16)[key], expected(BFLOAT16, key))


def test_every_recorded_output_is_checked() -> None:
    for name in (*FLOAT32, BFLOAT16):
        assert set(output_keys(name)) == set(outputs(name))


@pytest.mark.parametrize("name", FLOAT32)
def test_float64_is_closer_than_the_recording(name: str) -> None:
    """The recording differs from exact arithmetic by float32 rounding, and so does the reference, by about as much."""
    model, io = in_float64(name), recorded(name)[1]
    state = model.prefill(io["prefill.input_ids"])
    exact = model.denoise(io["denoise.block_ids"], state, io["denoise.t"].double())
    assert exact.dtype == torch.float64
    recorded_error = (io["denoise.logits"] - exact).abs().max()
    ours = (outputs(name)["denoise.logits"] - exact).abs().max()
    assert ours < 2 * recorded_error + 1e-5


# --- the state -------------------------------------------------------------------------------------------------------


def random_ids(shape: tuple[int, ...], seed: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def same_rows(a: ContextState, rows: list[int], b: ContextState) -> None:
    """State `b` holds the given rows of `a`, as far as their lengths reach."""
    assert a.lengths[rows].tolist() == b.lengths.tolist()
    for i in a.conv:
        close(a.conv[i][rows], b.conv[i])
        close(a.ssm[i][rows], b.ssm[i])
    for i in a.k:
        for n, (row, length) in enumerate(zip(rows, b.lengths.tolist(), strict=True)):
            close(a.k[i][row, :length], b.k[i][n, :length])
            close(a.v[i][row, :length], b.v[i][n, :length])
    close(a.last_hidden[rows], b.last_hidden)


@settings(max_examples=15)
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_prefill_in_pieces_is_prefill_in_one(pieces: list[int], seed: int) -> None:
    model, ids = in_float64(), random_ids((2, sum(pieces)), seed)
    state, start = model.empty_state(2), 0
    for piece in pieces:
        state = model.commit(ids[:, start : start + piece], state)
        start += piece
    same_rows(model.prefill(ids), [0, 1], state)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 11), min_size=1, max_size=4), more=st.integers(0, 7), seed=st.integers(0, 99))
def test_a_ragged_batch_is_each_row_alone(lengths: list[int], more: int, seed: int) -> None:
    """Prefill, commit and denoise, whatever stands in the padding."""
    model, batch = in_float64(), len(lengths)
    ids, block = random_ids((batch, max(lengths)), seed), random_ids((batch, 7), seed + 1)
    second = torch.tensor([(more + b) % 8 for b in range(batch)])
    state = model.commit(block, model.prefill(ids, torch.tensor(lengths)), second)
    t = torch.linspace(0, 1, batch, dtype=torch.float64)
    logits = model.denoise(block, state, t)
    for b in range(batch):
        alone = model.commit(block[b : b + 1, : second[b]], model.prefill(ids[b : b + 1, : lengths[b]]))
        same_rows(state, [b], alone)
        close(logits[b : b + 1], model.denoise(block[b : b + 1], alone, t[b : b + 1]))


@settings(max_examples=10)
@given(length=st.integers(1, 20), seed=st.integers(0, 99))
def test_forward_is_causal_and_agrees_with_the_state(length: int, seed: int) -> None:
    model, ids = in_float64(), random_ids((1, 20), seed)
    logits = model.forward_ar(ids)
    close(model.forward_ar(ids[:, :length]), logits[:, :length])
    close(model.prefill(ids[:, :length]).logits, logits[:, length - 1])


def test_denoiser_without_time_is_a_context_tower() -> None:
    """With equal weights, t = None and a block of one token, it gives the context tower's next-token logits."""
    model = TwoTower.from_pretrained(GOLDEN / "tiny", dtype=torch.float64)
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.load_state_dict(model.context_lm_head.state_dict())
    ids = random_ids((2, 9), 5)
    with torch.no_grad():
        close(model.denoise(ids[:, -1:], model.prefill(ids[:, :-1]))[:, 0], model.prefill(ids).logits)


def test_denoising_and_committing_change_no_state() -> None:
    model = in_float64()
    state = model.prefill(random_ids((2, 6), 0))
    before = {key: value.clone() for key, value in cached(state, "state").items()}
    model.denoise(random_ids((2, 4), 1), state, 0.5)
    model.commit(random_ids((2, 4), 2), state)
    after = cached(state, "state")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_fork_and_select() -> None:
    model = in_float64()
    state = model.prefill(random_ids((3, 6), 0), torch.tensor([6, 2, 4]))
    same_rows(state, [0, 0, 1, 1, 2, 2], state.fork(2))
    same_rows(state, [2, 0], state.select([2, 0]))
    same_rows(state, [1], state.select(torch.tensor([False, True, False])))
    assert state.select([]).batch_size == 0
    with pytest.raises(ValueError, match="at least 1 copy, got 0"):
        state.fork(0)


def test_mixed_order_of_modulation_matters() -> None:
    """Guards the parity tests: swapping the two orders, or the time's rounding, is far outside the tolerance."""
    model, io = recorded("tiny")
    state = model.prefill(io["prefill.input_ids"])
    wrong_t = model.denoise(io["denoise.block_ids"], state, io["denoise.t"] * 0.98)
    assert (wrong_t - io["denoise.logits"]).abs().max() > 1e-2


def test_time_is_rounded_as_the_model_is() -> None:
    """In bfloat16 t = 0.6875 becomes 1000·t = 688, so 0.6875 and 0.688 are the same time."""
    embedder = recorded(BFLOAT16)[0].t_embedder
    assert torch.equal(embedder(torch.tensor([0.6875])), embedder(torch.tensor([0.688])))
    exact = in_float64().t_embedder
    assert not torch.equal(exact(torch.tensor([0.6875]).double()), exact(torch.tensor([0.688]).double()))


def test_residual_in_float32_is_honoured() -> None:
    """A bfloat16 model with a float32 residual stream is closer to float64 than one without."""
    config = recorded(BFLOAT16)[0].config
    ids = random_ids((2, 12), 3)
    errors = []
    for wide in (False, True):
        model = TwoTower.from_pretrained(GOLDEN / BFLOAT16)
        model.config = dataclasses.replace(config, residual_in_fp32=wide)
        exact = TwoTower.from_pretrained(GOLDEN / BFLOAT16, dtype=torch.float64)
        with torch.no_grad():
            errors.append((model.forward_ar(ids).double() - exact.forward_ar(ids)).norm())
    assert errors[1] < errors[0]


def test_sensitive_parameters_are_never_narrowed(tmp_path: Path) -> None:
    narrow = TwoTower.from_pretrained(GOLDEN / "tiny", dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        kept = name.endswith(("gate.weight", "correction_bias", "A_log", "mixer.D", "dt_bias"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_a_backbone_checkpoint_seeds_both_towers(tmp_path: Path) -> None:
    model, io = recorded("tiny")
    weights = {
        name.replace("context_tower.", "backbone.").replace("context_lm_head", "lm_head"): p.clone()
        for name, p in model.state_dict().items()
        if name.startswith("context_")
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "tiny" / "config.json").read_text())
    seeded = TwoTower.from_pretrained(tmp_path).requires_grad_(False)
    assert torch.equal(seeded.forward_ar(io["prefill.input_ids"]), outputs("tiny")["forward_ar.logits"])
    towers = seeded.context_tower.state_dict(), seeded.denoiser_tower.state_dict()
    assert all(torch.equal(towers[0][key], towers[1][key]) for key in towers[0])
    parameters = list(seeded.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


BAD_CALLS = {
    "token too large": (lambda m, s: m.forward_ar(torch.tensor([[1, 256]])), "token 256 at row 0, position 1"),
    "negative token": (lambda m, s: m.prefill(torch.tensor([[-1]])), "token -1"),
    "float ids": (lambda m, s: m.prefill(torch.ones(1, 2)), "expected integers"),
    "one row too few": (lambda m, s: m.denoise(torch.ones(1, 4, dtype=torch.long), s), "expected 2 rows"),
    "time above one": (
        lambda m, s: m.denoise(torch.ones(2, 4, dtype=torch.long), s, 1.5),
        "in \\[0, 1\\], got .*1\\.5",
    ),
    "time not a number": (lambda m, s: m.denoise(torch.ones(2, 4, dtype=torch.long), s, float("nan")), "got .*nan"),
    "lengths too long": (
        lambda m, s: m.commit(torch.ones(2, 4, dtype=torch.long), s, torch.tensor([5, 1])),
        "0\\.\\.4, got \\[5, 1\\]",
    ),
    "logits of nothing": (lambda m, s: m.empty_state(2).logits, "at least one token"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_call_is_explained(what: str) -> None:
    call, message = BAD_CALLS[what]
    model = in_float64()
    with pytest.raises(ValueError, match=message):
        call(model, model.prefill(torch.ones(2, 3, dtype=torch.long)))


def test_the_config_reads_infinity() -> None:
    assert TwoTowerConfig.from_file(GOLDEN / "tiny" / "config.json").time_step_limit == (0.0, float("inf"))

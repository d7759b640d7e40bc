"""A tower per device, of which second_device.py is one: the same text to the bit, and nothing sent twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_capture import Recorder
from tests.model.random_models import models, random_ids
from tests.model.second_device import DEVICE, SecondDevice, apart, second_device
from tests.model.small_model import MASK, package_model, save_small_model
from tests.model.test_generate_package import values_of
from twotower_kernels import TwoTowerConfig, TwoTowerModel
from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.model.generate import MODES, generate, stream
from twotower_kernels.model.loading import tower_of

ROWS = [[5], [6, 7, 8], [9, 10]]


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    with second_device() as entered:
        yield entered


def exact() -> TwoTowerModel:
    return models("M*E-M*", torch.float64).ours


# --- the same text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{}, {"eos_token_id": 19}, {"temperature": 1.2, "top_k": 9, "seed": 5}],
    ids=["greedy", "rows end", "sampled"],
)
@pytest.mark.parametrize("rows", [ROWS, [[5, MASK, 7], [6, 7, 8], [MASK, 10, MASK]]], ids=["prompts", "masks"])
def test_two_devices_write_what_one_writes(rows: list[list[int]], mode: str, options: dict[str, Any]) -> None:
    """A ragged batch, event for event; blocks, calls and reasons too."""
    options = {"mode": mode, "max_new_tokens": 14, "block_size": 4, **options}
    one = package_model()
    wanted = stream(one, rows, **options)
    events = [values_of(event) for event in wanted]
    with second_device():
        got = stream(apart(copy.deepcopy(one)), rows, **options)
        assert [values_of(event) for event in got] == events
        mine, theirs = got.result(), wanted.result()
        assert [t.tolist() for t in mine.sequences] == [t.tolist() for t in theirs.sequences]
        assert (mine.nfe, mine.finish_reason) == (theirs.nfe, theirs.finish_reason)
        assert {t.device for t in mine.new_tokens} == {torch.device("cpu") if mode in ("ar", "speculative") else DEVICE}


def test_the_denoiser_sees_the_same_context(device: SecondDevice) -> None:
    """To the bit, through ragged commits, growing storage, forks and selections; ids and times from either device."""
    one = exact()
    two = apart(copy.deepcopy(one))
    ids, block, t = random_ids(3, 9), random_ids(3, 4, seed=1), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    a, b = one.prefill(ids, [9, 0, 4]), two.prefill(ids.to(DEVICE), [9, 0, 4])
    for step in range(3):
        for give in (Tensor.clone, lambda tensor: tensor.to(DEVICE)):
            assert torch.equal(two.denoise(give(block), b, give(t)).to("cpu"), one.denoise(block, a, t))
        some = torch.tensor([True, False, True])
        for rows in (some, some.to(DEVICE), torch.tensor([2, 0]), [0, 0, 2]):
            x, y = a.select(rows.to("cpu") if isinstance(rows, Tensor) else rows), b.select(rows)
            few = random_ids(x.batch_size, 4)
            assert torch.equal(two.denoise(few, y, 0.3).to("cpu"), one.denoise(few, x, 0.3))
        x, y = one.commit(random_ids(6, 5), a.fork(2)), two.commit(random_ids(6, 5), b.fork(2))
        assert torch.equal(two.denoise(random_ids(6, 2), y).to("cpu"), one.denoise(random_ids(6, 2), x))
        lengths = [4, 1 + step, 0]
        a, b = one.commit(block, a, lengths), two.commit(block, b, torch.tensor(lengths).to(DEVICE))
        assert torch.equal(a.logits, b.logits)
        long = random_ids(3, 80, seed=step)  # needs new storage
        a, b = one.commit(long, a), two.commit(long, b)


def test_a_recorded_step_reads_the_mirror(device: SecondDevice) -> None:
    two = apart(exact())
    state = two.prefill(random_ids(2, 9))
    captured = CapturedModel(two, Recorder())
    for seed in range(2):
        ids = random_ids(2, 4, seed=seed).to(DEVICE)
        t = torch.rand(2, dtype=torch.float64).to(DEVICE)
        assert torch.equal(captured.denoise(ids, state, t).to("cpu"), two.denoise(ids, state, t).to("cpu"))
        device.copied.clear()
        captured.denoise(ids, state, t)
        assert device.bytes == 0
        state = two.commit(ids, state)
    assert len(captured._calls) == 1


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [8, 1000])
def test_a_commit_sends_what_is_new(context: int, device: SecondDevice) -> None:
    """The block's keys and values, the Mamba-2 states and the last output: the same whatever the context's length."""
    two = apart(exact())
    state = two.prefill(random_ids(2, context))
    states = sum(part[0].nbytes for part in (*state.conv.values(), *state.ssm.values()))
    token = sum(part[0, 0].nbytes for part in (*state.k.values(), *state.v.values()))
    row = states + state.last_hidden[0].nbytes
    for size in (1, 4, 300):  # the last one moves the storage of the short context
        device.copied.clear()
        state = two.commit(random_ids(2, size, seed=size), state)
        assert device.bytes == 2 * (size * token + row)


def test_a_step_sends_nothing_of_the_context(device: SecondDevice) -> None:
    two = apart(exact())
    state = two.prefill(random_ids(2, 1000))
    ids, t = random_ids(2, 4), torch.rand(2, dtype=torch.float64)
    there = ids.to(DEVICE), t.to(DEVICE)
    device.copied.clear()
    two.denoise(there[0], state, there[1])
    assert device.bytes == 0
    two.denoise(ids, state, t)
    assert device.bytes == ids.nbytes + t.nbytes


def test_one_device_keeps_one_context(device: SecondDevice) -> None:
    one = exact()
    state = one.commit(random_ids(2, 4), one.prefill(random_ids(2, 9), [9, 3]).fork(1))
    one.denoise(random_ids(2, 4), state.select([1, 0]), 0.5)
    assert state.mirror is None and state.for_denoiser is state
    assert device.bytes == 0


def test_a_tensor_on_the_wrong_device_would_be_noticed(device: SecondDevice) -> None:
    """The second device is worth its name: it adds no numbers of both."""
    here, there = torch.ones(2), torch.ones(2).to(DEVICE)
    with pytest.raises(AssertionError, match="tensors on two devices"):
        here + there
    assert (there + there.to("cpu").to(DEVICE)).tolist() == [2, 2]
    assert device.bytes == 3 * here.nbytes + here.nbytes


# --- where weights go -------------------------------------------------------------------------------------------------


def devices_of(model: TwoTowerModel) -> dict[str, str]:
    """Of each tower's weights, which must agree."""
    found: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(tower_of(name), set()).add(parameter.device.type)
    return {tower: device for tower, (device,) in found.items()}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"denoiser_device": "meta"}, {"context": "cpu", "denoiser": "meta"}),
        ({"device": "meta", "denoiser_device": "cpu"}, {"context": "meta", "denoiser": "cpu"}),
        ({"context_device": "meta"}, {"context": "meta", "denoiser": "cpu"}),
        ({"device": "meta", "context_device": "cpu", "denoiser_device": "cpu"}, {"context": "cpu", "denoiser": "cpu"}),
        ({"towers": "context", "device": "meta", "context_device": "cpu"}, {"context": "cpu"}),
        ({"towers": "denoiser", "denoiser_device": "cpu", "device": "meta"}, {"denoiser": "cpu"}),
    ],
)
def test_each_tower_goes_to_its_device(options: dict[str, Any], wanted: dict[str, str], tmp_path: Path) -> None:
    folder = save_small_model(tmp_path)
    loaded = TwoTowerModel.from_pretrained(folder, **options)
    config = TwoTowerConfig.from_file(folder / "config.json")
    weights = package_model().state_dict()
    for model in (loaded, TwoTowerModel(config, **options)):
        assert devices_of(model) == wanted
        assert model.device.type == wanted.get("context", wanted.get("denoiser"))
        assert model.denoiser_device.type == wanted.get("denoiser", wanted.get("context"))
    here = {name: tensor for name, tensor in loaded.state_dict().items() if not tensor.is_meta}
    assert here and all(torch.equal(tensor, weights[name]) for name, tensor in here.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "^device: expected a device of this machine, got 'nowhere'"),
        ({"context_device": "cuda:97"}, "^context_device: expected a device of this machine, got 'cuda:97' \\("),
        ({"denoiser_device": torch.device("cuda", 97)}, "^denoiser_device: expected a device of .* got 'cuda:97'"),
        (
            {"towers": "context", "denoiser_device": "cpu"},
            "denoiser_device: expected None for towers='context', got 'c",
        ),
        (
            {"towers": "denoiser", "context_device": "cpu"},
            "context_device: expected None for towers='denoiser', got 'c",
        ),
    ],
)
def test_wrong_devices_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        TwoTowerModel(TwoTowerConfig.from_file(folder / "config.json"), **options)
    with pytest.raises(ValueError, match=message):
        TwoTowerModel.from_pretrained(folder, **options)


def test_ids_of_a_third_device_are_refused() -> None:
    model = TwoTowerModel(exact().config, denoiser_device="meta")
    far = torch.empty(1, 2, dtype=torch.int64, device="meta")
    assert model.denoise(far, model.empty_state(1)).device == DEVICE
    with pytest.raises(ValueError, match="input_ids: expected device cpu, got meta"):
        package_model().prefill(far)
    assert generate(package_model(), ROWS, max_new_tokens=1).sequences[0].device.type == "cpu"

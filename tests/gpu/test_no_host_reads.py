"""A step, a commit and a remasking read nothing back from the device: they run on tensors that have no values, where
asking for one is an error."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import twotower_kernels as tt
from twotower_kernels import RemaskPolicy, TwoTowerConfig, TwoTowerModel
from twotower_kernels.bench.checks.random_models import SIZES
from twotower_kernels.model import two_tower as model

PRESETS = [name for name in vars(RemaskPolicy) if inspect.ismethod(getattr(RemaskPolicy, name))]


@pytest.fixture(autouse=True)
def without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here tensors are a device's: on a CPU the model looks at ids and lengths for a better message."""
    monkeypatch.setattr(model, "readable", lambda tensor: False)
    with FakeTensorMode():
        yield


def test_a_value_cannot_be_read() -> None:
    with pytest.raises(DataDependentOutputException):
        bool(torch.ones(2).sum() > 0)


def test_steps_and_commits() -> None:
    """While the storage has room: before it moves, which is rare, the longest length is asked for."""
    towers = TwoTowerModel(TwoTowerConfig(**SIZES, hybrid_override_pattern="MEM*E-"), dtype=torch.bfloat16)
    ids, lengths = torch.randint(5, (2, 9)), torch.tensor([1, 4])
    state = towers.commit(ids, towers.empty_state(2)._moved(0, 32))
    state = towers.commit(ids[:, :4], state, lengths)
    for some in (state, state.select(torch.tensor([1, 0, 0])), state.fork(2)):
        block = torch.randint(5, (some.batch_size, 4))
        assert towers.denoise(block, some, torch.rand(some.batch_size)).shape == (some.batch_size, 4, 61)
    with pytest.raises(DataDependentOutputException):
        towers.commit(torch.randint(5, (2, 200)), state)


@pytest.mark.parametrize("name", PRESETS)
def test_remasking(name: str) -> None:
    policy = getattr(RemaskPolicy, name)()
    rows = dict(temperature=torch.rand(2), top_k=torch.tensor([0, 4]), top_p=torch.rand(2), seed=torch.tensor([1, 2]))
    result = tt.remask(
        torch.randn(2, 4, 61),
        torch.randint(5, (2, 4)),
        mask_token_id=3,
        policy=policy,
        step=torch.tensor([0, 1]),
        num_steps=torch.tensor([4, 4]),
        valid_lens=torch.tensor([4, 2]),
        **rows,
    )
    assert result.tokens.shape == (2, 4) and result.done.shape == (2,)
    assert policy.model_time(result.num_masked, 4, 0, 4).shape == (2,)

"""The recorded denoiser step: which tensors a replay reads. The recording itself is a stand-in that calls again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.random_models import models, random_ids
from twotower_kernels.capture import CapturedDenoiser


class Recorder:
    """As a graph does, it runs the call once and from then on writes to the same tensor from the same ones."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        output = call()

        def replay() -> None:
            output.copy_(call())

        return replay, output


def test_a_replay_says_what_the_model_says() -> None:
    """Over steps, blocks, dropped rows and storage that grows; recorded anew only for other shapes or storage."""
    model = models("M*E-", torch.float32).ours
    record = Recorder()
    captured = CapturedDenoiser(model, record)
    with torch.inference_mode():
        state = model.prefill(random_ids(3, 20), [20, 3, 11])
        expected = 0
        for block in range(3):
            expected += block == 0  # there is room to spare for all three
            for step in range(2):
                ids, t = random_ids(3, 4, seed=10 * block + step), torch.rand(3)
                assert torch.equal(captured(ids, state, t), model.denoise(ids, state, t))
                assert record.recordings == expected
            state = model.commit(random_ids(3, 4, seed=block), state)
        some = state.select([2, 0])
        ids, t = random_ids(2, 4), torch.rand(2)
        assert torch.equal(captured(ids, some, t), model.denoise(ids, some, t))
        other = state.select([0, 1])
        assert torch.equal(captured(ids, other, t), model.denoise(ids, other, t))
        assert record.recordings == expected + 1
        assert torch.equal(captured(ids, other), model.denoise(ids, other))
        assert record.recordings == expected + 2
        state = model.commit(random_ids(3, 200), state)  # moves to larger storage
        ids, t = random_ids(3, 4), torch.rand(3)
        assert torch.equal(captured(ids, state, t), model.denoise(ids, state, t))
        assert record.recordings == expected + 3
        assert len(captured._steps) == 1


def test_keys_and_values_are_not_copied() -> None:
    model = models("M*E-", torch.float32).ours
    captured = CapturedDenoiser(model, Recorder())
    with torch.inference_mode():
        state = model.prefill(random_ids(2, 9))
        captured(random_ids(2, 4), state, torch.rand(2))
        (step,) = captured._steps.values()
        assert all(step._state.k[i] is k for i, k in state.k.items())
        assert all(step._state.v[i] is v for i, v in state.v.items())

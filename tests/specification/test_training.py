"""Training: the all-blocks pass is the inference denoiser, the corruption and the losses are the recipe's."""

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.paths import GOLDEN
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.training import (
    ar_loss,
    block_states,
    corrupt,
    denoise_all_blocks,
    denoiser_loss,
    masked_loss,
    seed_denoiser,
)

MASK = 3


@cache
def exact_model(name: str = "tiny") -> TwoTower:
    return TwoTower.from_pretrained(GOLDEN / name, dtype=torch.float64)


def random_ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(4, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    blocks=st.integers(1, 4),
    size=st.sampled_from([1, 2, 3, 5, 16]),
    timed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_training_block_b_is_inference_with_the_context_cut_at_b(
    batch: int, blocks: int, size: int, timed: bool, seed: int
) -> None:
    model, ids = exact_model(), random_ids(batch, blocks * size, seed)
    noisy, t = corrupt(ids, mask_token_id=MASK, generator=torch.Generator().manual_seed(seed))
    time = t.double() if timed else None
    with torch.no_grad():
        trained = denoise_all_blocks(model, noisy, ids, time, block_size=size)
        for b in range(blocks):
            block = noisy[:, b * size : (b + 1) * size]
            inferred = model.denoise(block, model.prefill(ids[:, : b * size]), time)
            torch.testing.assert_close(trained[:, b * size : (b + 1) * size], inferred, rtol=1e-9, atol=1e-9)


def test_grouped_router_trains_as_it_infers() -> None:
    model, ids = exact_model("grouped_router"), random_ids(2, 24, 0)
    with torch.no_grad():
        trained = denoise_all_blocks(model, ids, ids, 0.5, block_size=8)
        inferred = model.denoise(ids[:, 16:], model.prefill(ids[:, :16]), 0.5)
    torch.testing.assert_close(trained[:, 16:], inferred, rtol=1e-9, atol=1e-9)


def test_a_block_sees_no_clean_token_of_its_own_or_later_blocks() -> None:
    model, ids = exact_model(), random_ids(1, 12, 0)
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 7) % 256
    with torch.no_grad():
        a, b = (denoise_all_blocks(model, ids, clean, 0.5, block_size=4) for clean in (ids, other))
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, 8:], b[:, 8:])


def test_the_context_is_frozen() -> None:
    model = TwoTower.from_pretrained(GOLDEN / "tiny")
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    denoiser_loss(model, random_ids(2, 32, 0), block_size=8, generator=generator).backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not any(name.startswith("context_") for name in graded)
    for part in ("denoiser_tower.embeddings", "lm_head", "t_embedder.mlp.0", "t_block.1", "scale_shift_tables.0"):
        assert any(name.startswith(part) for name in graded), part
    for layer in range(len(model.config.hybrid_override_pattern)):
        assert any(name.startswith(f"denoiser_tower.layers.{layer}.") for name in graded), layer


def test_ar_loss_is_next_token_cross_entropy_and_trains_the_context_tower() -> None:
    model, ids = TwoTower.from_pretrained(GOLDEN / "tiny", dtype=torch.float64), random_ids(2, 9, 1)
    loss = ar_loss(model, ids)
    log_p = model.forward_ar(ids).log_softmax(-1)
    by_hand = -sum(log_p[b, i, ids[b, i + 1]] for b in range(2) for i in range(8)) / 16
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    graded = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {"context_tower", "context_lm_head"}
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ar_loss(model, ids[:, :1])


def _at(parameter: Tensor, value: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    parameter.copy_(value)
    return loss()


def test_gradients_are_right() -> None:
    """The whole denoising loss against finite differences along random directions, in float64.

    Without routed experts, whose weights are float32 by definition: too coarse for differences.
    """
    config = dataclasses.replace(exact_model().config, hybrid_override_pattern="M*-M", intermediate_size=24)
    torch.manual_seed(0)
    model, ids = TwoTower(config).double(), random_ids(1, 8, 2)
    noisy = ids.clone()
    noisy[:, [1, 2, 5, 7]] = MASK

    def loss() -> Tensor:
        logits = denoise_all_blocks(model, noisy, ids, 0.5, block_size=4)
        return masked_loss(logits, noisy, ids, mask_token_id=MASK)

    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("context_")]
    gradients = torch.autograd.grad(loss(), [p for _, p in trained])
    generator, step = torch.Generator().manual_seed(0), 1e-5
    with torch.no_grad():
        for (name, parameter), gradient in zip(trained, gradients, strict=True):
            start = parameter.clone()
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            above, below = (_at(parameter, start + sign * step * direction, loss) for sign in (1, -1))
            parameter.copy_(start)
            numeric = (above - below) / (2 * step)
            torch.testing.assert_close(
                numeric, (gradient * direction).sum(), rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_corruption_is_the_recipes() -> None:
    ids = random_ids(400, 250, 0)
    noisy, t = corrupt(ids, mask_token_id=MASK, generator=torch.Generator().manual_seed(0))
    assert ((noisy == ids) | (noisy == MASK)).all()
    assert t.min() >= 1e-3 and t.max() <= 1
    assert abs(t.mean() - 0.5005) < 0.05
    # A row's masked fraction is binomial around its t: five standard deviations hold for every one of 400 rows.
    fraction = (noisy == MASK).double().mean(1)
    assert ((fraction - t).abs() < 5 * (t * (1 - t) / 250).sqrt() + 1e-3).all()


def test_masked_loss_counts_masked_positions_only() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([[1, 2, 4, 5, 6], [6, 5, 4, 2, 1]])
    noisy = torch.tensor([[1, MASK, 4, MASK, 6], [6, 5, 4, 2, MASK]])
    loss = masked_loss(logits, noisy, ids, mask_token_id=MASK)
    by_hand = F.cross_entropy(torch.stack([logits[0, 1], logits[0, 3], logits[1, 4]]), torch.tensor([2, 5, 1]))
    torch.testing.assert_close(loss, by_hand)
    none = masked_loss(logits, ids, ids, mask_token_id=MASK)
    assert none == 0
    none.backward()
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_states_are_those_at_block_ends() -> None:
    model, ids = exact_model(), random_ids(2, 12, 3)
    with torch.no_grad():
        state = block_states(model, ids, 4)
        cut = model.prefill(ids[:, :8])
    assert state.lengths.tolist() == [0, 4, 8, 0, 4, 8]
    for i in cut.conv:
        torch.testing.assert_close(state.ssm[i][[2, 5]], cut.ssm[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.conv[i][[2, 5]], cut.conv[i], rtol=1e-10, atol=1e-10)
        assert (state.ssm[i][[0, 3]] == 0).all()


def test_seeding_starts_the_denoiser_as_the_context_tower() -> None:
    model = TwoTower.from_pretrained(GOLDEN / "tiny")
    seed_denoiser(model)
    towers = model.context_tower.state_dict(), model.denoiser_tower.state_dict()
    assert all(torch.equal(towers[0][key], towers[1][key]) for key in towers[0])
    assert torch.equal(model.lm_head.weight, model.context_lm_head.weight)
    assert model.lm_head.weight.data_ptr() != model.context_lm_head.weight.data_ptr()


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of block_size 4, got 10"):
        block_states(exact_model(), random_ids(1, 10, 0), 4)
    with pytest.raises(ValueError, match="expected the shape of ids"):
        denoise_all_blocks(exact_model(), random_ids(1, 8, 0), random_ids(1, 4, 0), None, block_size=4)

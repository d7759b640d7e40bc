"""Logits as callers have them: one row without its batch, shifted by a position, and filters that are None."""

from typing import Any

import pytest
import torch

import twotower_kernels as tt
from twotower_kernels.reference import remask as specification
from twotower_kernels.reference.remask import make_inputs
from twotower_kernels.testing.cases.remask import MASK
from twotower_kernels.testing.drawing import DTYPES

PROGRAMS = {"specification": specification.remask, "package": tt.remask}
P = tt.RemaskPolicy
CASE = dict(batch=2, block=6, vocab=70, step=1, num_steps=3, temperature=0.9, masked=0.8, seed=3)


@pytest.fixture(params=PROGRAMS)
def remask(request: pytest.FixtureRequest) -> Any:
    return PROGRAMS[request.param]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


# --- shift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("given_before", [False, True])
def test_shifted_logits_are_those_of_the_position_before(
    remask: Any, given_before: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """To the bit what the rows are if they are moved by hand; the last one is not read."""
    inputs = make_inputs("remask", CASE | options | {"policy": P.dream("entropy")}, dtype=dtype)
    logits = inputs.pop("logits")
    before = torch.randn(2, 70).mul(3).to(dtype) if given_before else logits[:, 0]
    want = remask(torch.cat([before[:, None], logits[:, :-1]], 1), **inputs)
    logits[:, -1] = torch.nan
    got = remask(logits, **inputs, shift=1, shift_logits=before if given_before else None)
    assert same(got, want) and want.transfer_mask.any()


def test_one_position_that_is_shifted(remask: Any) -> None:
    z, before = torch.tensor([[[0.0, 5.0, 0.0, 0.0]]]), torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    tokens = torch.tensor([[MASK]])
    assert remask(z, tokens, mask_token_id=MASK, shift=1).tokens.tolist() == [[1]]
    assert remask(z, tokens, mask_token_id=MASK, shift=1, shift_logits=before).tokens.tolist() == [[2]]
    empty = remask(z[:, :0], tokens[:, :0], mask_token_id=MASK, shift=1, shift_logits=before)
    assert empty.tokens.shape == (1, 0) and empty.done.all()


def test_strided_logits_and_those_before_them(remask: Any) -> None:
    inputs = make_inputs("remask", CASE)
    logits, before = inputs.pop("logits"), torch.randn(2, 70)
    want = remask(logits, **inputs, shift=1, shift_logits=before)
    turned, strided = logits.transpose(0, 2).contiguous().transpose(0, 2), before.t().contiguous().t()
    for z, first in ((turned, before), (logits, strided), (turned, strided), (logits, before[:1].expand(2, -1))):
        got = remask(z, **inputs, shift=1, shift_logits=first)
        assert same([x[0] for x in got], [x[0] for x in want])  # the second row's first logits are others in the last
    assert not logits.isnan().any()


def test_the_compiled_step_is_shifted() -> None:
    inputs = make_inputs("remask", CASE)
    before = torch.randn(2, 70)

    def step(shift: int, first: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return tuple(tt.remask(**inputs, shift=shift, shift_logits=first))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for arguments in ((0, None), (1, None), (1, before)):
        assert same(compiled(*arguments), step(*arguments))


# --- one row --------------------------------------------------------------------------------------------------------


def test_one_row_is_a_batch_of_one(remask: Any) -> None:
    inputs = make_inputs("remask", CASE | {"batch": 1, "policy": P.llada2(0.5, edit_threshold=0.9)})
    inputs |= {"editable": torch.rand(1, 6) < 0.9, "rank_noise": torch.rand(1, 6), "valid_lens": torch.tensor([5])}
    inputs |= {"candidates": torch.full((1, 6), -1), "shift": 1, "shift_logits": torch.randn(1, 70)}
    inputs |= {"gate_bound": torch.tensor([0.6]), "seed": torch.tensor([7])}
    want = remask(**inputs)
    rows = ("logits", "tokens", "editable", "rank_noise", "candidates", "shift_logits")
    alone = inputs | {name: inputs[name][0] for name in rows}
    got = remask(**alone)
    assert same(got, [x[0] for x in want])
    assert got.tokens.shape == got.entropy.shape == (6,) and got.num_masked.shape == got.done.shape == ()
    assert same(remask(**alone | {"valid_lens": torch.tensor(5), "seed": torch.tensor(7)}), got)
    with pytest.raises(ValueError, match="valid_lens: expected shape"):
        remask(**alone | {"valid_lens": torch.tensor([5, 5])})
    with pytest.raises(ValueError, match="gate_bound: expected a number or shape"):
        remask(**alone | {"gate_bound": torch.tensor([0.6, 0.6])})


# --- no filter ------------------------------------------------------------------------------------------------------


def test_none_is_no_filter(remask: Any) -> None:
    inputs = make_inputs("remask", CASE | {"policy": P.dream()})
    want = remask(**inputs)
    assert same(remask(**inputs, top_k=None, top_p=None), want)
    assert not same(remask(**inputs, top_k=1), want)
    filtered = remask(**inputs, top_p=0.7)
    assert same(remask(**inputs, top_k=None, top_p=0.7), filtered)

"""Tensors that lie in the same memory: what is written in place is right, or refused before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.ops import overlap

LENS = torch.tensor([4, 1])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the test of overlap ----------------------------------------------------------------------------------------------


@st.composite
def views(draw: Any) -> tuple[Tensor, Tensor]:
    """Two views of one storage, with any strides, of elements of 4 or 8 bytes."""
    storage = torch.zeros(200)

    def view() -> Tensor:
        base = storage.view(draw(st.sampled_from([torch.float32, torch.float64])))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        strides = [draw(st.integers(0, 7)) for _ in shape]
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
        return base.as_strided(shape, strides, draw(st.integers(0, min(20, len(base) - 1 - last))))

    return view(), view()


def places(x: Tensor) -> list[int]:
    """The addresses of all elements."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (x.data_ptr() + offsets.flatten() * x.itemsize).tolist()


@settings(max_examples=300)
@given(pair=views())
def test_the_test_of_overlap_is_exact(pair: tuple[Tensor, Tensor]) -> None:
    bytes_of = [{p + i for p in places(x) for i in range(x.itemsize)} for x in pair]
    assert overlap.meet(*pair) == bool(bytes_of[0] & bytes_of[1])
    for x in pair:
        try:
            overlap.check_places("x", x)
        except ValueError:
            continue
        assert len(set(places(x))) == x.numel()


@settings(max_examples=100)
@given(order=st.permutations(range(4)), step=st.integers(1, 3), start=st.integers(0, 2))
def test_slices_and_permutations_have_places_of_their_own(order: list[int], step: int, start: int) -> None:
    x = torch.zeros(6, 5, 1, 8).permute(order)[start::step, :, start:, ::step]
    overlap.check_places("x", x)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k_context", "v_context"])
@pytest.mark.parametrize(
    "storage",
    [
        *(torch.ones(shape).expand(2, 8, 2, 4) for shape in ((1, 8, 2, 4), (2, 1, 2, 4), (2, 8, 1, 4))),
        torch.ones(99).as_strided((2, 8, 2, 4), (32, 4, 2, 1)),
    ],
)
def test_storage_whose_elements_share_a_place_is_refused(name: str, storage: Tensor) -> None:
    inputs = {"k_context": torch.ones(2, 8, 2, 4), "v_context": torch.ones(2, 8, 2, 4), name: storage}
    k = randn(2, 3, 2, 4)
    with pytest.raises(ValueError, match=f"{name}: expected memory in which no two elements share a place"):
        tt.append_kv(**inputs, k=k, v=k, context_lens=LENS)
    assert all(bool((x == 1).all()) for x in inputs.values())


@pytest.mark.parametrize("op", ["block_attention", "context_attention"])
@pytest.mark.parametrize("axis", range(4))
def test_an_out_whose_elements_share_a_place_is_refused(op: str, axis: int) -> None:
    q, k = randn(2, 3, 4, 8), randn(2, 3, 2, 8)
    out = torch.ones_like(q).narrow(axis, 0, 1).expand(q.shape)
    with pytest.raises(ValueError, match="out: expected memory in which no two elements share a place"):
        getattr(tt, op)(q, k, k, out=out)
    assert bool((out == 1).all())


def test_targets_that_overlap_each_other_are_refused() -> None:
    storage, k = torch.ones(2, 8, 4, 4), randn(2, 3, 2, 4)
    for k_context, v_context in (
        (storage[:, :, :2], storage[:, :, :2]),
        (storage[:, :, :2], storage[:, :, 1:3]),
        (storage[:, :, ::2], storage[:, :, 1:3]),
    ):
        with pytest.raises(ValueError, match="k_context, v_context: expected memory of its own for each"):
            tt.append_kv(k_context, v_context, k, k, LENS)
    q, both = randn(1, 2, 2, 1), torch.ones(1, 2, 2, 1)
    into = torch.ops.twotower.block_attention_out
    with pytest.raises(ValueError, match="out, lse: expected memory of its own for each"):
        into(q, q, q, *[None] * 8, 0, None, None, 0.0, both, both[..., 0])
    assert bool((storage == 1).all()) and bool((both == 1).all())


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(8))
def test_a_context_may_be_appended_from_itself(first: int) -> None:
    k_context, v_context = randn(2, 12, 2, 4), randn(2, 12, 2, 4, seed=1)
    expected = k_context.clone(), v_context.clone()
    part = slice(first, first + 4)
    tt.append_kv(*expected, k_context[:, part].clone(), v_context[:, part].clone(), LENS)
    tt.append_kv(k_context, v_context, k_context[:, part], v_context[:, part], LENS)
    assert torch.equal(k_context, expected[0]) and torch.equal(v_context, expected[1])


def test_rows_may_be_appended_to_each_other_and_lengths_lie_in_the_context() -> None:
    context, k = randn(2, 12, 2, 4), randn(2, 3, 2, 4)
    context[1, 11, 1].view(torch.int64).copy_(LENS)
    expected = context.clone(), context.clone()
    lens = context[1, 11, 1].view(torch.int64)
    tt.append_kv(*expected, context.flip(0)[:, :3].clone(), k, LENS)
    values = context.clone()
    tt.append_kv(context, values, context.as_strided((2, 3, 2, 4), (0, 8, 4, 1)), k, lens)
    assert torch.equal(context[1, 1:4], context[0, :3]) and torch.equal(values[0, 4:7], k[0])
    assert torch.equal(expected[1], values)


@pytest.mark.parametrize("op", ["block_attention", "context_attention"])
@pytest.mark.parametrize("of", ["q", "k", "v", "context"])
@pytest.mark.parametrize("laid_out", ["same", "transposed", "shifted"])
def test_an_out_may_lie_in_what_is_read(op: str, of: str, laid_out: str) -> None:
    room = {name: randn(2, 9, 2, 8, seed=i) for i, name in enumerate(("q", "k", "v", "context"))}
    inputs = {"q": room["q"][:, :8], "k": room["k"][:, :8], "v": room["v"][:, :8]}
    inputs |= {"k_context": room["context"][:, :8], "v_context": randn(2, 8, 2, 8, seed=9)}
    if op == "context_attention":
        inputs = {"q": inputs["q"], "k_context": inputs["k_context"], "v_context": inputs["v"]}
    expected = getattr(tt, op)(**inputs)
    out = room[of][:, 1:] if laid_out == "shifted" else room[of][:, :8]
    if laid_out == "transposed":
        out = out.transpose(1, 3)  # the last dimension is strided, too
    getattr(tt, op)(**inputs, out=out)
    assert torch.equal(out, expected)


# --- honest uses ------------------------------------------------------------------------------------------------------


def pieces(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_context, v_context [2, 8, 2, 4], k, v [2, 3, 2, 4]."""
    k, v = randn(2, 3, 2, 4), randn(2, 3, 2, 4, seed=1)
    match name:
        case "one fused projection":
            *_, k, v = (x.unflatten(-1, (-1, 4)) for x in randn(2, 3, 32).split([16, 8, 8], dim=-1))
            return torch.zeros(2, 8, 2, 4), torch.zeros(2, 8, 2, 4), k, v
        case "one cache":
            return *torch.zeros(2, 2, 8, 2, 4), k, v
        case "interleaved halves":
            return *torch.zeros(2, 8, 2, 8).split(4, dim=-1), k, v
        case "interleaved heads":
            return *torch.zeros(2, 8, 4, 4).split(2, dim=2), k, v
        case "heads before tokens":
            return *torch.zeros(2, 2, 2, 8, 4).transpose(2, 3), k, v
        case "another layer's cache":
            layers = randn(3, 2, 2, 8, 2, 4)
            return *layers[1], *layers[0][:, :, 2:5]
        case _:  # all in one tensor, [B, S, x | k | v]
            whole = randn(2, 8, 2, 16)
            return whole[..., :4], whole[..., 4:8], whole[:, 2:5, :, 8:12], whole[:, 2:5, :, 12:]


@pytest.mark.parametrize(
    "name",
    [
        *("one fused projection", "one cache", "interleaved halves", "interleaved heads", "heads before tokens"),
        *("another layer's cache", "all in one"),
    ],
)
def test_views_of_one_tensor_are_taken_as_they_are(name: str) -> None:
    arguments = pieces(name)
    taken = overlap.apart(["k_context", "v_context", "k", "v"], [0, 1], arguments)
    assert all(x is given for x, given in zip(taken, arguments, strict=True)), "copied"
    expected = [x.clone(memory_format=torch.contiguous_format) for x in arguments]
    tt.append_kv(*expected, LENS)
    tt.append_kv(*arguments, LENS)
    assert all(torch.equal(*pair) for pair in zip(arguments, expected, strict=True))

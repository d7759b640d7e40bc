"""Integers of every dtype, wherever an op takes a tensor of them: the result of int64, or a refusal that is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.direct_calls import INTEGERS
from twotower_kernels.reference import attention, mamba2

PAGES = {"context": 12, "context_lens": [7, 0], "block_lens": [3, 2], "block": 3, "page": 4, "context_index": [1, 0]}
REMASK_WHOLE = ("step", "num_steps", "top_k", "seed", "offset", "initial_num_masked")
REMASK_REAL = ("temperature", "gate_bound")


def attend(op: str, name: str, convert: Callable[[Tensor], Tensor]) -> Any:
    inputs = attention.make_inputs(op, PAGES)
    inputs["block_table"] = inputs["block_table"].clamp(min=0)  # no -1, which unsigned integers lack
    inputs[name] = convert(inputs[name])
    if op != "append_kv":
        return getattr(tt, op)(**inputs, return_lse=True)
    tt.append_kv(**inputs)
    return inputs["k_context"], inputs["v_context"]


def scan(name: str, convert: Callable[[Tensor], Tensor]) -> Any:
    inputs = mamba2.make_inputs("mamba2_scan", "shared_state") | {"seq_lens": torch.tensor([0, 3, 16, 7, 1])}
    return tt.mamba2_scan(**inputs | {name: convert(inputs[name])}, return_states=True)


def plan(name: str, convert: Callable[[Tensor], Tensor]) -> Any:
    return tt.moe_plan(convert(torch.tensor([[0, 3], [3, 1]])), 4)


def experts(name: str, convert: Callable[[Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    x, up, down = torch.ones(2, 3), torch.randn(4, 5, 3), torch.randn(4, 3, 5)
    return tt.moe_experts(x, up, down, torch.ones(2, 2), convert(torch.tensor([[0, 3], [3, 1]])))


def remask(name: str, convert: Callable[[Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    logits, tokens, ones = torch.randn(2, 4, 9), torch.full((2, 4), 1), torch.tensor([1, 2])
    arguments: dict[str, Any] = {"temperature": 1.0, "valid_lens": ones + 2, "candidates": torch.full((2, 4), 5)}
    arguments |= {"suppress_ids": ones + 1, "confidence_suppress_ids": ones + 3}
    arguments |= {n: ones for n in (*REMASK_WHOLE, *REMASK_REAL)} | {"num_steps": ones + 2}
    return tt.remask(logits, tokens, mask_token_id=1, **arguments | {name: convert(arguments[name])})


TAKEN: list[Any] = [
    *(
        pytest.param(lambda n, c, op=op: attend(op, n, c), name, id=f"{op}-{name}")
        for op in ("block_attention", "context_attention", "append_kv")
        for name in ("context_lens", "context_index", "block_table", "block_lens")
    ),
    *(pytest.param(scan, name, id=f"scan-{name}") for name in ("state_index", "seq_lens")),
    *(pytest.param(op, "experts", id=op.__name__) for op in (plan, experts)),
    *(
        pytest.param(remask, name, id=f"remask-{name}")
        for name in (*REMASK_WHOLE, *REMASK_REAL, "valid_lens", "candidates", "suppress_ids", "confidence_suppress_ids")
    ),
]


@pytest.mark.parametrize(("call", "name"), TAKEN)
def test_every_integer_dtype_gives_the_result_of_int64(call: Any, name: str) -> None:
    expected = call(name, lambda x: x)
    for dtype in INTEGERS:
        got = call(name, lambda x, dtype=dtype: x.to(dtype))
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True)
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in pairs), dtype


@pytest.mark.parametrize(("call", "name"), TAKEN)
def test_what_is_no_integer_is_refused_by_its_name(call: Any, name: str) -> None:
    for dtype in (torch.bool, torch.complex64, torch.float32):
        if dtype == torch.float32 and name in REMASK_REAL:
            continue
        with pytest.raises(TypeError, match=f"^{name}: expected .*, got {re.escape(str(dtype))}"):
            call(name, lambda x, dtype=dtype: x.to(dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if dtype not in (torch.int32, torch.int64)])
def test_tokens_come_back_in_their_dtype_and_narrow_ones_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"tokens: expected torch.int64 or torch.int32, got {dtype}"):
        tt.remask(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=dtype), mask_token_id=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_beyond_a_dtype_do_not_break_it(dtype: torch.dtype) -> None:
    """The highest offset is beyond int32, in which no tensor can hold a wrong one but a negative."""
    logits, tokens = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"offset: expected values in \[0, 4.29497e\+09\], got -1"):
        tt.remask(logits, tokens, mask_token_id=0, offset=torch.tensor([0, -1], dtype=dtype))


def test_lengths_of_numpy_are_integers_and_bool_is_none() -> None:
    import numpy as np

    q = torch.randn(1, 4, 2, 8)
    assert torch.equal(tt.block_attention(q, q, q, block_lens=np.int64(3)), tt.block_attention(q, q, q, block_lens=3))
    for wrong in (True, np.True_, 3.0):
        with pytest.raises(TypeError, match="block_lens: expected an integer or an integer tensor"):
            tt.block_attention(q, q, q, block_lens=wrong)

"""On a CPU a short scan whose states are returned has the bits of its tokens in scans of one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, instruction_set
from twotower_kernels.reference import mamba2
from twotower_kernels.testing.drawing import DTYPES

scan: Any = tt.mamba2_scan  # what it returns depends on its options


@settings(max_examples=40)
@given(
    length=st.integers(0, 64),
    beyond=st.integers(0, 40),
    rows=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    threads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 99),
)
def test_at_most_64_tokens_at_once_are_those_tokens_one_by_one(
    length: int,
    beyond: int,
    rows: int,
    dims: tuple[int, int],
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    """To the bit: results and states. Each row's own length counts, whatever lies beyond it and in other rows."""
    case = dict(b=rows, l=length + beyond, heads=4, head_dim=dims[0], state=dims[1], groups=2, seeded=True)
    inputs = mamba2.make_inputs("mamba2_scan", case, dtype=dtype, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    inputs["seq_lens"] = lengths = torch.randint(0, length + 1, (rows,), generator=draw)
    before = torch.get_num_threads()
    try:
        with instruction_set(isa):
            torch.set_num_threads(threads[0])
            y, conv, ssm = scan(**inputs, return_states=True)
            torch.set_num_threads(threads[1])
            states = inputs["conv_state"], inputs["ssm_state"]
            for t in range(length):
                one = inputs | dict(xbc=inputs["xbc"][:, t : t + 1], dt=inputs["dt"][:, t : t + 1])
                one |= dict(conv_state=states[0], ssm_state=states[1], seq_lens=(lengths > t).long())
                token, *states = scan(**one, return_states=True)
                assert torch.equal(token[:, 0], y[:, t])
    finally:
        torch.set_num_threads(before)
    if length:
        assert torch.equal(states[0], conv) and torch.equal(states[1], ssm)
    assert not y[:, length:].any()

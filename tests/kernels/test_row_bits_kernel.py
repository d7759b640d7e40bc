"""On a CPU a row's bits are its own in every operation: alone, at any place in any batch, on any number of threads.

`linear`, attention and the scan, whose sums are split among threads, have properties of their own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, instruction_set
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.properties import assert_row_invariant

HIDDEN, INNER, EXPERTS = 330, 150, 8  # sums longer than a block of any kernel
Draw = Callable[..., Tensor]
Op = Callable[[dict[str, Tensor]], Any]


def gate(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    weight = draw(EXPERTS, HIDDEN)
    return {"x": draw(rows, HIDDEN)}, lambda r: tt.moe_gate(r["x"], weight)


def route(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    bias = draw(EXPERTS).float()
    options: dict[str, Any] = dict(top_k=3, n_group=4, topk_group=2)
    return {"logits": draw(rows, EXPERTS).double()}, lambda r: tt.moe_route(r["logits"], bias, **options)


def experts(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    up, down = draw(EXPERTS, INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)
    shared = {"shared_up": draw(INNER, HIDDEN), "shared_down": draw(HIDDEN, INNER)}
    weights, chosen = tt.moe_route(draw(rows, EXPERTS).double(), top_k=3)
    given = {"x": draw(rows, HIDDEN), "weights": weights, "chosen": chosen}
    return given, lambda r: tt.moe_experts(r["x"], up, down, r["weights"], r["chosen"], **shared)


def gated_norm(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    weight = draw(HIDDEN)
    given = {"y": draw(rows, 2, HIDDEN), "z": draw(rows, 2, HIDDEN)}
    return given, lambda r: tt.gated_rms_norm(r["y"], r["z"], weight, n_groups=2, eps=1e-5)


def norm(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    weight = draw(HIDDEN)
    return {"x": draw(rows, HIDDEN)}, lambda r: tt.rms_norm(r["x"], weight, eps=1e-5)


def residual(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    weight = draw(HIDDEN)
    given = {name: draw(rows, 2, HIDDEN) for name in ("residual", "y")}
    given |= {name: draw(rows, HIDDEN) for name in ("gate", "shift", "scale")}
    return given, lambda r: tt.gated_residual_adaln_norm(**r, weight=weight, eps=1e-5)


def remask(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    given = {"logits": 4 * draw(rows, 3, 500), "tokens": torch.full((rows, 3), 3), "seed": torch.arange(rows)}
    options: dict[str, Any] = dict(mask_token_id=3, policy=tt.RemaskPolicy.twotower(0.5), temperature=0.7, top_p=0.9)
    return given, lambda r: tt.remask(r["logits"], r["tokens"], seed=r["seed"], num_steps=4, **options)


def merge(draw: Draw, rows: int) -> tuple[dict[str, Tensor], Op]:
    given = {f"out_{side}": draw(rows, 5, 40) for side in "ab"}
    wide = torch.promote_types(given["out_a"].dtype, torch.float32)
    given |= {f"lse_{side}": draw(rows, 5).to(wide) for side in "ab"}
    return given, lambda r: tt.merge_attention(r["out_a"], r["lse_a"], r["out_b"], r["lse_b"])


@pytest.mark.parametrize("make", [gate, route, experts, gated_norm, norm, residual, remask, merge])
@settings(max_examples=12)
@given(
    rows=st.one_of(st.integers(2, 20), st.integers(60, 140)),
    first=st.integers(0, 139),
    count=st.integers(1, 40),
    threads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 99),
)
def test_rows_are_the_same_in_any_batch(
    make: Callable[[Draw, int], tuple[dict[str, Tensor], Op]],
    rows: int,
    first: int,
    count: int,
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def on(count: int, op: Op) -> Callable[..., Any]:
        def call(**given: Tensor) -> Any:
            torch.set_num_threads(count)
            return op(given)

        return call

    before = torch.get_num_threads()
    try:
        with instruction_set(isa):
            given, op = make(draw, rows)
            together, alone = (on(count, op) for count in threads)
            part = slice(first % rows, first % rows + count)
            assert_row_invariant(together, given, rows=given.keys(), part=part, alone=alone)
    finally:
        torch.set_num_threads(before)

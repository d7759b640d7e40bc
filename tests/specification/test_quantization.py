"""reference/quantization.py against the definition, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower_kernels.reference import quantization

GROUPS = {"int8": [16, 64, 0], "int4": [16, 32, 128], "fp8": [0, -1], "nvfp4": [16], "mxfp4": [32]}
E4M3 = [m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
CODES = {
    "int8": [float(i) for i in range(-128, 128)],
    "int4": [float(i) for i in range(-8, 8)],
    "fp8": [*E4M3, *(-x for x in E4M3)],
    "nvfp4": [*(x := [0, 0.5, 1, 1.5, 2, 3, 4, 6]), *(-y for y in x)],
    "mxfp4": [*(x := [0, 0.5, 1, 1.5, 2, 3, 4, 6]), *(-y for y in x)],
}


def weights(rows: int, columns: int, seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    if kind == "wide":  # groups of very different sizes, some of nothing but zeros
        w = w * torch.exp2(torch.randint(-20, 20, (2, rows, columns), generator=generator).double())
        w[torch.rand(2, rows, columns, generator=generator) < 0.5] = 0
    if kind == "ties":
        w = (w * 4).round() / 2
    return w


@settings(max_examples=60)
@given(
    format=st.sampled_from(quantization.FORMATS),
    rows=st.integers(1, 3),
    kind=st.sampled_from(["normal", "wide", "ties"]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_every_number_is_the_nearest_code(format, rows, kind, seed, data):  # type: ignore[no-untyped-def]
    group = data.draw(st.sampled_from(GROUPS[format]))
    w = weights(rows, 128, seed, kind)
    group = group or 128
    packed = quantization.quantize(w, format, group)
    steps = quantization.steps(format, packed.scales, packed.global_scale)
    step = steps.expand(2, rows, 1) if group == -1 else steps
    step = step.repeat_interleave(128 // step.shape[-1], -1)
    got = quantization.dequantize(packed)
    codes = torch.tensor(sorted(set(CODES[format])), dtype=torch.float64)
    best = (codes * step[..., None] - w[..., None]).abs().amin(-1)  # the error of the best code
    assert ((got - w).abs() <= best + 1e-12 * step).all()


@pytest.mark.parametrize("format", quantization.FORMATS)
def test_the_largest_number_sets_the_scale(format: str) -> None:
    w = torch.zeros(1, 128, dtype=torch.float64)
    w[0, 5], w[0, 40] = 448.0, -1.0  # a power of 2 times 7
    group = {"int8": 128, "fp8": 128, "nvfp4": 16}.get(format, 32)
    packed = quantization.quantize(w, format, group)
    largest = quantization.dequantize(packed)[0, 5].item()
    expected = {"int8": 448 * 127 / 127.5, "int4": 7 * torch.tensor(448 / 7.5).bfloat16().item()}
    expected |= {"fp8": 448.0, "nvfp4": 448.0, "mxfp4": 384.0}  # 448 = 7 * 64, and 6 * 64 is the last of e2m1
    assert math.isclose(largest, expected[format], rel_tol=1e-6)
    assert quantization.dequantize(packed)[0, 64:].count_nonzero() == 0


def test_halves_go_to_even_codes() -> None:
    w = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, 0.25, 6.5] + [0.0] * 24], dtype=torch.float64)
    codes = quantization.dequantize(quantization.quantize(w, "int4", 32))[0, :8]
    assert codes.tolist() == [7.0, 0.0, 2.0, 2.0, 0.0, -2.0, 0.0, 6.0]
    w = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] + [0.0] * 24], dtype=torch.float64)
    codes = quantization.dequantize(quantization.quantize(w, "mxfp4", 32))[0, :8]
    assert codes.tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_the_even_column_lies_low() -> None:
    w = torch.tensor([[1.0, 7.5] + [0.0] * 30], dtype=torch.float64)
    assert quantization.quantize(w, "int4", 32).data[0, :2].tolist() == [9 | 15 << 4, 8 | 8 << 4]
    w[0, 1] = -6.0
    assert quantization.quantize(w, "mxfp4", 32).data[0, :2].tolist() == [2 | 15 << 4, 0]

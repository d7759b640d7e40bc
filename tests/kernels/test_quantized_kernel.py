"""Quantized weights: `tt.quantize` against reference/quantization.py, and products with what it makes, on every
instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, awkward, instruction_set
from tests.kernels.op_arguments import arguments, overload
from twotower_kernels.quantization import FORMATS
from twotower_kernels.reference import quantization as reference
from twotower_kernels.testing.budget import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GROUPS: dict[str, list[int | None]] = {
    "int8": [None, 16, 32, 64, 128],
    "int4": [None, 16, 64, 128],
    "fp8": [None, -1],
    "nvfp4": [None],
    "mxfp4": [None],
}
formats = st.sampled_from(FORMATS)


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def columns(format: str, group: int | None, groups: int) -> int:
    """Any number of columns where that may be, else a multiple of a group."""
    if format in ("int8", "fp8") and group in (None, -1):
        return groups * 7
    return groups * (group or {"int4": 32, "nvfp4": 16, "mxfp4": 32}[format])


# --- what is packed ---------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    format=formats,
    lead=st.lists(st.integers(0, 3), max_size=2),
    rows=st.integers(0, 5),
    groups=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0, 8, 40]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_weight(format, lead, rows, groups, dtype, spread, seed, data):  # type: ignore[no-untyped-def]
    """The codes are the specification's, but where float32 rounds the quotient to the middle of two."""
    group = data.draw(st.sampled_from(GROUPS[format]))
    k = columns(format, group, groups)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-spread // 2, spread // 2 + 1, (*lead, rows, k), generator=generator).double())
    w = (weight(*lead, rows, k, seed=seed).double() * sizes).clamp(-6e4, 6e4).to(dtype)
    made = tt.quantize(w, format, group_size=group)
    assert made.shape == w.shape and made.format == format
    assert (
        made.group_size == (k if group is None and format in ("int8", "fp8") else (group or made.group_size)) or not k
    )
    if w.numel() == 0:
        return
    expected = reference.quantize(w, format, made.group_size)
    assert torch.equal(made.scales.float(), expected.scales.float())
    steps = reference.steps(format, expected.scales, expected.global_scale)
    if group != -1:
        steps = steps.repeat_interleave(made.group_size, -1)
    got = reference.dequantize(reference.Packed(format, made.group_size, made.data, made.scales, made.global_scale))
    truth, exact = reference.dequantize(expected), w.double()
    assert ((got - exact).abs() <= (truth - exact).abs() + 1e-6 * exact.abs() + 1e-30).all()
    assert (got == truth).float().mean() > 0.95 or w.numel() < 40
    torch.testing.assert_close(made.dequantize(torch.float64), got, rtol=1e-7, atol=0)
    assert torch.equal(made.dequantize(torch.bfloat16), made.dequantize().bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_it_lives_in_a_module_and_in_a_file(format: str, tmp_path: Any) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tt.quantize(weight(3, 64), format)

    layer, other = Layer(), Layer()
    other.weight.data.zero_()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    before = [x.dtype for x in layer.weight.buffers()]
    layer.to(torch.float64).bfloat16()
    assert [x.dtype for x in layer.weight.buffers()] == before
    assert torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    assert layer.weight.nbytes == sum(x.nbytes for x in layer.state_dict().values())
    made = layer.weight
    again = tt.QuantizedTensor(format, made.data, made.scales, made.global_scale)
    assert again.shape == (3, 64) and again.group_size == made.group_size


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(format="int3"), "format: expected one of"),
        (dict(weight=torch.ones(64)), r"weight: expected \[\.\.\., R, K\]"),
        (dict(weight=torch.full((2, 64), torch.inf)), "weight: expected finite numbers"),
        (dict(weight=torch.full((2, 64), torch.nan)), "weight: expected finite numbers"),
        (dict(weight=torch.ones(2, 48)), "group_size: expected a divisor of the 48 columns, got 32"),
        (dict(group_size=7), "group_size: expected None or one of"),
        (dict(group_size=-1), "group_size: expected None or one of"),
        (dict(format="nvfp4", group_size=32), "group_size: expected None or one of"),
    ],
)
def test_what_cannot_be_quantized_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tt.quantize(**(dict(weight=torch.ones(2, 64), format="int4") | change))
    with pytest.raises(TypeError, match="weight: expected float64"):
        tt.quantize(torch.ones(2, 64, dtype=torch.int8))


@pytest.mark.parametrize(
    ("format", "data", "scales", "whole", "said"),
    [
        ("int4", torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 1).bfloat16(), None, "data: expected torch.uint8"),
        ("int4", torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), None, "scales: expected torch.bfloat16"),
        ("int4", torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 3).bfloat16(), None, "groups of 32 or"),
        ("int8", torch.zeros(2, 96, dtype=torch.int8), torch.ones(2, 2), None, "groups of 96 or"),
        ("int8", torch.zeros(2, 16, dtype=torch.int8), torch.ones(1, 1), None, "scales: expected"),
        ("nvfp4", torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 2).to(torch.float8_e4m3fn), None, "a tensor"),
        ("mxfp4", torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1).byte(), torch.ones(()), "None for mxfp4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    format: str, data: Tensor, scales: Tensor, whole: Tensor | None, said: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        tt.QuantizedTensor(format, data, scales, whole)


# --- products ---------------------------------------------------------------------------------------------------------


def assert_linear(x: Tensor, w: tt.QuantizedTensor, bias: Tensor | None, layout: int = 0) -> Tensor:
    """Against float64, beside PyTorch with the weight in float32."""
    wide = w.dequantize(torch.float64)
    exact = x.double() @ wide.T + (0 if bias is None else bias.double())
    summed = torch.promote_types(x.dtype, torch.float32)
    naive = (x.to(summed) @ wide.to(summed).T + (0 if bias is None else bias.to(summed))).to(x.dtype)
    got = tt.linear(awkward(x, layout), w, bias)
    assert got.dtype == x.dtype
    if x.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_within_budget(got, naive, exact)
    return got


@settings(max_examples=120)
@given(
    format=formats,
    lead=st.lists(st.integers(0, 3), max_size=2) | st.sampled_from([[5], [7], [21], [41]]),
    groups=st.integers(0, 12),
    r=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_linear(format, lead, groups, r, bias, dtype, isa, layout, seed, data):  # type: ignore[no-untyped-def]
    group = data.draw(st.sampled_from(GROUPS[format]))
    k = columns(format, group, groups)
    w = tt.quantize(weight(r, k, seed=seed), format, group_size=group)
    with instruction_set(isa):
        assert_linear(weight(*lead, k, seed=seed + 1, dtype=dtype), w, weight(r, dtype=dtype) if bias else None, layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_code(format: str, isa: str) -> None:
    """All codes of a format, subnormal ones and NaN among them, times one."""
    every = torch.arange(256, dtype=torch.uint8)
    data = every[:, None].expand(256, 32).contiguous()  # of 4 bits, both columns of a byte
    if format in ("int8", "fp8"):
        data = data.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)
    groups = {"nvfp4": 4, "mxfp4": 2, "int4": 2}.get(format, 1)
    scale = torch.full((256, groups), 127, dtype=torch.uint8) if format == "mxfp4" else torch.ones(256, groups)
    scale = scale.to({"int4": torch.bfloat16, "nvfp4": torch.float8_e4m3fn}.get(format, scale.dtype))
    w = tt.QuantizedTensor(format, data, scale, torch.ones(()) if format == "nvfp4" else None)
    wide = w.dequantize(torch.float64)
    one = torch.eye(wide.shape[1])[[0, 1, 31]]
    with instruction_set(isa):
        for dtype in (torch.float32, torch.bfloat16):
            got = tt.linear(one.to(dtype), w)
            torch.testing.assert_close(got.double(), wide[:, [0, 1, 31]].T, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int4", 32), ("nvfp4", 16), ("fp8", -1)])
def test_released_widths_and_a_rows_bits(format: str, group: int | None, isa: str) -> None:
    """2688 and 1856 columns; a row alone is the row in a batch, on any number of threads."""
    for k in (2688, 1856):
        w, x = tt.quantize(weight(33, k), format, group_size=group), weight(23, k, dtype=torch.bfloat16)
        with instruction_set(isa):
            got = assert_linear(x, w, None)
            for row in (0, 7, 22):
                assert torch.equal(tt.linear(x[row], w), got[row])
            torch.set_num_threads(3)
            try:
                assert torch.equal(tt.linear(x, w), got)
            finally:
                torch.set_num_threads(1)


def composed(
    x: Tensor, up: tt.QuantizedTensor, down: tt.QuantizedTensor, weights: Tensor, experts: Tensor, gated: bool
) -> Tensor:
    """The mixture, an expert and a token at a time, of products that are tested above."""
    total = torch.zeros(x.shape)
    for e in range(up.shape[0]):
        parts = [
            tt.QuantizedTensor(m.format, m.data[e], m.scales[e], None if m.global_scale is None else m.global_scale[e])
            for m in (up, down)
        ]
        for n, k in (experts == e).nonzero().tolist():
            u = tt.linear(x[n], parts[0])
            if gated:
                gate, value = u.chunk(2)
                h = (gate.float() / (1 + torch.exp(-gate.float()))).to(x.dtype) * value
            else:
                h = torch.relu(u).square()
            total[n] += weights[n, k] * tt.linear(h, parts[1]).float()
    return total.to(x.dtype)


@settings(max_examples=60)
@given(
    format=formats,
    n=st.integers(0, 24),
    gated=st.booleans(),
    shared=st.sampled_from([None, "", *FORMATS]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 2**31),
)
def test_experts(format, n, gated, shared, dtype, isa, seed):  # type: ignore[no-untyped-def]
    e, h, i, j = 5, 96, 64, 32
    up, down = weight(e, 2 * i if gated else i, h, seed=seed) / 10, weight(e, h, i, seed=seed + 1) / 8
    up, down = (tt.quantize(m, format) for m in (up, down))
    x = weight(n, h, seed=seed + 2, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(n, e + 1, generator=generator).argsort(1)[:, :2] - 1  # -1: nobody's
    weights = torch.rand(n, 2, generator=generator)
    options: dict[str, Any] = dict(activation="silu_gated" if gated else "relu2")
    plain: dict[str, Any] = {}
    if shared is not None:
        matrices = weight(2 * j if gated else j, h, seed=3) / 10, weight(h, j, seed=4) / 6
        pair = [m.to(dtype) if shared == "" else tt.quantize(m, shared) for m in matrices]
        options |= dict(shared_up=pair[0], shared_down=pair[1])
        plain = {"shared": pair}
    with instruction_set(isa):
        got = tt.moe_experts(x, up, down, weights, experts, **options)
        expected = composed(x, up, down, weights, experts, gated)
        if plain:
            one = [m if isinstance(m, Tensor) else m.dequantize().to(dtype) for m in plain["shared"]]
            if all(not isinstance(m, Tensor) for m in plain["shared"]):
                u = tt.linear(x, plain["shared"][0])
            else:
                u = tt.linear(x, one[0])
            if gated:
                gate, value = u.chunk(2, 1)
                hidden = (gate.float() / (1 + torch.exp(-gate.float()))).to(dtype) * value
            else:
                hidden = torch.relu(u).square()
            last = plain["shared"][1] if not isinstance(plain["shared"][1], Tensor) else one[1]
            expected = (expected.float() + tt.linear(hidden, last).float()).to(dtype)
    # Orders of addition differ, and an activation may round to its neighbour.
    size = expected.float().abs().amax().item() if n else 0
    steps = {torch.float64: 2**-20, torch.float32: 2**-20, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    assert (got.float() - expected.float()).abs().le(steps * size).all()


def test_a_token_does_not_depend_on_the_others() -> None:
    up, down = (tt.quantize(weight(4, *shape), "int4") for shape in ((64, 96), (96, 64)))
    x, experts, weights = weight(30, 96, dtype=torch.bfloat16), torch.arange(60).view(30, 2) % 4, weight(30, 2)
    for isa in ISAS:
        with instruction_set(isa):
            got = tt.moe_experts(x, up, down, weights, experts)
            for n in (0, 13, 29):
                alone = tt.moe_experts(x[n : n + 1], up, down, weights[n : n + 1], experts[n : n + 1])
                assert torch.equal(alone[0], got[n])


def test_what_does_not_fit_is_refused() -> None:
    up, down = tt.quantize(weight(4, 64, 96), "int4"), tt.quantize(weight(4, 96, 64), "int8")
    x, choice = weight(3, 96), (torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int32))
    for change, said in [
        (dict(w_down=down), "w_down: expected int4 as w_up, got int8"),
        (dict(w_down=down.dequantize()), "w_down: expected int4 as w_up, got not quantized"),
        (dict(x=x[:, :64]), r"w_up: expected \[E, I, 64\], got \[4, 64, 96\]"),
        (dict(shared_up=up), "shared_up and shared_down: expected both or neither"),
        (dict(up_bias=torch.ones(4, 63)), r"up_bias: expected \[4, 64\]"),
    ]:
        given = dict(x=x, w_up=up, w_down=tt.quantize(weight(4, 96, 64), "int4"), weights=choice[0], experts=choice[1])
        with pytest.raises(ValueError, match=said):
            tt.moe_experts(**(given | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight: expected \[R, 96\] for x \[3, 96\], got \[4, 64\]"):
        tt.linear(x, tt.quantize(weight(4, 64), "int4"))
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32 as x"):
        tt.linear(x, tt.quantize(weight(4, 96), "int4"), torch.ones(4).bfloat16())


@pytest.mark.parametrize("name", ["quantized_linear", "quantized_experts"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(overload(name), tuple(arguments(name)))


def test_a_compiled_function_takes_them() -> None:
    w = tt.quantize(weight(8, 64), "int4")
    compiled = torch.compile(lambda x: tt.linear(x, w) + 1, fullgraph=True, backend="aot_eager")
    x = weight(3, 64)
    assert torch.equal(compiled(x), tt.linear(x, w) + 1)

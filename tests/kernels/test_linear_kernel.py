"""The linear kernel against reference/linear.py on every instruction set, dtype and layout, and a row's bits, which
depend on nothing but the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set
from twotower_kernels.model.layers import Linear
from twotower_kernels.reference import linear as reference
from twotower_kernels.testing.cases import linear as cases
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward

FEW_DTYPES = (torch.float32, torch.bfloat16)


def make_inputs(
    rows: tuple[int, ...], k: int, r: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    return reference.make_inputs("linear", dict(rows=rows, k=k, r=r, bias=bias), dtype=dtype, seed=seed)


def assert_as_specified(inputs: dict[str, Tensor | None], layout: int = 0) -> None:
    assert_op_within_budget(tt.linear, reference.linear, inputs, layout=layout)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the numbers ------------------------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(
    sizes=cases.sizes(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, dtype, isa, layout, seed):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        assert_as_specified(make_inputs(**sizes, dtype=dtype, seed=seed), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype, isa: str) -> None:
    """More than are packed at a time."""
    with instruction_set(isa):
        assert_as_specified(make_inputs((1030,), 140, 70, bias=True, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "k", "r"), [(1040, 4100, 10), (150, 1100, 300)])
def test_long_rows(rows: int, k: int, r: int, isa: str) -> None:
    """More numbers, or more of the weight's rows, than are multiplied at a time; and more rows than are packed."""
    with instruction_set(isa):
        assert_as_specified(make_inputs((rows,), k, r, bias=True, dtype=torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_column(dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs((9,), 150, 80, dtype=dtype)
    x, weight = inputs["x"], inputs["weight"]
    assert x is not None and weight is not None
    with instruction_set(isa):
        clean = tt.linear(x, weight)
        x[3, 5], weight[70, 149] = torch.nan, torch.inf
        got = tt.linear(x, weight)
    assert got[3].isnan().all() and not got[:, 70].isfinite().any()
    got[3], got[:, 70] = clean[3], clean[:, 70]
    assert torch.equal(got, clean)


# --- a row's bits -----------------------------------------------------------------------------------------------------


def same(got: Tensor, expected: Tensor) -> bool:
    """To the bit, the sign of zero included."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    return torch.equal(got.view(whole), expected.view(whole))


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 70) | st.sampled_from([256, 1025]),
    k=st.integers(1, 300),
    r=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    number=st.integers(1, 3),
    scale=st.sampled_from([1.0, 1e-18, 1e-30]),
    data=st.data(),
)
def test_a_rows_bits(count, k, r, dtype, isa, layout, number, scale, data):  # type: ignore[no-untyped-def]
    """Alone on one thread; among others, anywhere, on several, from any layout. Products may underflow."""
    inputs = make_inputs((count,), k, r, bias=True, dtype=dtype, seed=count)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert x is not None and weight is not None and bias is not None
    x, bias = (x.double() * scale).to(dtype), (bias.double() * scale**2).to(dtype)
    row = data.draw(st.integers(0, count - 1))
    begin = data.draw(st.integers(0, row))
    end = data.draw(st.integers(row + 1, count))
    with instruction_set(isa):
        with threads(1):
            alone = tt.linear(x[row], weight, bias)
        with threads(number):
            together = tt.linear(awkward(x[begin:end], layout), awkward(weight, layout), awkward(bias, layout))
            batch = tt.linear(x[begin:end].expand(2, end - begin, k), weight, bias)
    assert same(together[row - begin], alone)
    assert same(batch[0, row - begin], alone) and same(batch[1, row - begin], alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_gives_the_same_bits(dtype: torch.dtype, isa: str) -> None:
    """Tiles of every height, the last of a chunk among them; whole and partial vectors of the weight's rows."""
    inputs = make_inputs((300,), 330, 77, bias=True, dtype=dtype)
    x, rest = inputs.pop("x"), list(inputs.values())
    assert x is not None
    with instruction_set(isa):
        together = tt.linear(x, *rest)
        for rows in (*range(1, 24), 40, 63, 64, 65, 128, 257):
            assert same(tt.linear(x[:rows], *rest), together[:rows])
        for row in range(0, 300, 7):
            assert same(tt.linear(x[row : row + 1], *rest), together[row : row + 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FEW_DTYPES)
def test_blocks_of_k_change_no_bit(dtype: torch.dtype, isa: str) -> None:
    """Few rows are summed in one go, many block by block, on several threads."""
    inputs = make_inputs((560,), 1100, 140, bias=True, dtype=dtype)
    x, rest = inputs.pop("x"), list(inputs.values())
    assert x is not None
    with instruction_set(isa), threads(2):
        together = tt.linear(x, *rest)
        for rows in (1, 16, 33, 64, 65, 97, 200, 528):
            assert same(tt.linear(x[:rows], *rest), together[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_columns_bits(dtype: torch.dtype, isa: str) -> None:
    """The same for the weight's rows, which a vocabulary or a layer may be split by."""
    inputs = make_inputs((20,), 200, 150, bias=True, dtype=dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert x is not None and weight is not None and bias is not None
    with instruction_set(isa):
        whole = tt.linear(x, weight, bias)
        for part in (slice(0, 64), slice(1, 66), slice(149, 150), slice(30, 150)):
            assert same(tt.linear(x, weight[part], bias[part]), whole[:, part].contiguous())


@pytest.mark.parametrize("dtype", FEW_DTYPES)
def test_layers_of_every_batch(dtype: torch.dtype) -> None:
    """What the model calls, beyond the numbers of rows at which it once handed over to another program."""
    layer = Linear(96, 160, bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(160, 96))
    x = torch.randn(8, 16, 96).to(dtype)
    together = layer(x)
    for batch in range(8):
        assert same(layer(x[batch : batch + 1]), together[batch : batch + 1])


# --- what it is to PyTorch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [0, 3])
@pytest.mark.parametrize("gradient", [False, True])
def test_registration(layout: int, bias: bool, gradient: bool) -> None:
    inputs = make_inputs((2, 3), 17, 11, bias=bias, dtype=torch.float32 if gradient else torch.bfloat16)
    arguments = [
        value if value is None else awkward(value, layout).requires_grad_(gradient) for value in inputs.values()
    ]
    torch.library.opcheck(torch.ops.twotower.linear.default, tuple(arguments))


@pytest.mark.parametrize(("rows", "k", "r"), [((), 7, 4), ((0,), 7, 4), ((5,), 7, 4), ((2, 3), 1, 1), ((2,), 7, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(rows: tuple[int, ...], k: int, r: int, bias: bool) -> None:
    made = make_inputs(rows, k, r, bias=bias, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in made.values() if x is not None]
    assert torch.autograd.gradcheck(tt.linear, inputs)
    assert torch.autograd.gradgradcheck(tt.linear, inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients_are_those_of_pytorch(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 30), 40, 20, bias=True, dtype=dtype)
    grad = torch.randn(2, 30, 20).to(dtype)

    def gradients(function: Callable[..., Tensor], **inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(leaves[0].dtype))

    assert_op_within_budget(
        lambda **inputs: gradients(tt.linear, **inputs), lambda **inputs: gradients(F.linear, **inputs), inputs
    )


def test_a_gradient_changes_no_bit_of_the_result() -> None:
    x, weight, bias = make_inputs((90,), 70, 30, bias=True).values()
    assert x is not None and weight is not None
    assert same(tt.linear(x, weight.clone().requires_grad_(), bias).detach(), tt.linear(x, weight, bias))


def test_a_backward_under_autocast_keeps_its_precision() -> None:
    x, weight, _ = make_inputs((9,), 70, 30).values()
    assert x is not None and weight is not None
    leaf = weight.clone().requires_grad_()
    total = tt.linear(x, leaf).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(total, leaf)
        assert tt.linear(x, weight).dtype == torch.bfloat16
    (expected,) = torch.autograd.grad(tt.linear(x, leaf).square().sum(), leaf)
    assert same(got, expected)


def test_the_layer_compiles_into_one_graph() -> None:
    layer = Linear(12, 7, bias=True).requires_grad_(False)
    for parameter, value in zip(layer.parameters(), (torch.randn(7, 12), torch.randn(7)), strict=True):
        parameter.copy_(value)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 100):
        x = torch.randn(2, rows, 12)
        assert torch.equal(compiled(x), layer(x))


def test_errors_are_named_on_every_device() -> None:
    for device in ("cpu", "meta"):
        x, weight = torch.ones(2, 8, device=device), torch.ones(4, 8, device=device)
        assert tt.linear(x, weight).shape == (2, 4)
        with pytest.raises(ValueError, match=r"weight: expected \[R, 8\] for x \[2, 8\], got \[4, 7\]"):
            tt.linear(x, weight[:, :7])
        with pytest.raises(ValueError, match=r"bias: expected \[4\], got \[3\]"):
            tt.linear(x, weight, weight[:3, 0])
        with pytest.raises(TypeError, match=r"weight: expected torch\.float32 as x, got torch\.float16"):
            tt.linear(x, weight.half())
        with pytest.raises(TypeError, match="x: expected float64, float32, bfloat16 or float16"):
            tt.linear(x.int(), weight.int())
    with pytest.raises(ValueError, match="weight: expected device cpu, got meta"):
        tt.linear(torch.ones(2, 8), weight)

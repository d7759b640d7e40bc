"""The linear layers' kernel against F.linear on every instruction set, dtype and layout, and where it is used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.kernel_checks import DTYPES, EVERY_ISA, ISAS, assert_op_within_budget, awkward, instruction_set
from twotower_kernels.model.layers import Linear
from twotower_kernels.ops import linear as linear_module
from twotower_kernels.ops.linear import MOST_ROWS, MOST_ROWS_WIDENED, linear


def make_inputs(
    shape: tuple[int, ...], n: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    k = shape[-1]
    return dict(x=normal(*shape), weight=normal(n, k) / max(k, 1) ** 0.5, bias=normal(n) if bias else None)


def assert_as_specified(inputs: dict[str, Tensor | None], layout: int = 0) -> None:
    assert_op_within_budget(
        lambda x, weight, bias: torch.ops.twotower.linear(x, weight, bias), F.linear, inputs, layout=layout
    )


@settings(max_examples=120)
@given(
    lead=st.lists(st.integers(0, 3), max_size=2) | st.sampled_from([[5], [7], [21], [40], [65]]),
    k=st.integers(0, 70) | st.sampled_from([255, 256, 257, 515]),
    n=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(lead, k, n, bias, dtype, isa, layout, seed):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        assert_as_specified(make_inputs((*lead, k), n, bias=bias, dtype=dtype, seed=seed), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_bit_for_bit_the_same(dtype: torch.dtype, isa: str) -> None:
    """Whatever the other rows are: up to 45 rows are blocked in every way there is."""
    inputs = make_inputs((45, 1100), 37, bias=True, dtype=dtype)
    x, rest = inputs.pop("x"), inputs.values()
    assert x is not None
    with instruction_set(isa):
        together = torch.ops.twotower.linear(x, *rest)
        for rows in (*range(1, 24), 40):
            assert torch.equal(torch.ops.twotower.linear(x[:rows], *rest), together[:rows])
        for row in range(45):
            assert torch.equal(torch.ops.twotower.linear(x[row : row + 1], *rest), together[row : row + 1])


def test_threads_change_no_bit() -> None:
    inputs = make_inputs((33, 500), 700, bias=True, dtype=torch.bfloat16)
    alone = torch.ops.twotower.linear(*inputs.values())
    torch.set_num_threads(3)
    try:
        assert torch.equal(torch.ops.twotower.linear(*inputs.values()), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_row(isa: str) -> None:
    inputs = make_inputs((9, 70), 20, dtype=torch.bfloat16)
    x = inputs["x"]
    assert x is not None
    with instruction_set(isa):
        clean = torch.ops.twotower.linear(*inputs.values())
        x[3, 5] = torch.nan
        got = torch.ops.twotower.linear(*inputs.values())
    assert got[3].isnan().all()
    got[3] = clean[3]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [0, 3])
def test_registration(layout: int, bias: bool) -> None:
    inputs = make_inputs((2, 3, 17), 11, bias=bias, dtype=torch.bfloat16)
    arguments = [value if value is None else awkward(value, layout) for value in inputs.values()]
    torch.library.opcheck(torch.ops.twotower.linear.default, tuple(arguments))
    torch.library.opcheck(torch.ops.twotower.linear.traced, tuple(arguments))


def used(*arguments: Tensor | None) -> bool:
    """Whether `linear` calls the kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(*arguments)  # type: ignore[arg-type]
    return any(event.key == "twotower::linear" for event in profile.key_averages())


def test_where_the_kernel_is_used() -> None:
    """One dtype without gradients, in float32 few rows; everything else is F.linear's."""
    with torch.no_grad():
        for dtype, most in MOST_ROWS.items():
            x, weight, bias = make_inputs((most, 8), 4, bias=True, dtype=dtype).values()
            assert x is not None and weight is not None
            assert used(x, weight, bias) and used(x[None], weight)
            assert used(torch.cat([x, x[:1]]), weight, bias) == (dtype != torch.float32)
        x, weight, bias = make_inputs((3, 8), 4, bias=True, dtype=torch.float64).values()
        assert not used(x, weight, bias)
    x, weight = torch.ones(2, 8), torch.ones(4, 8, requires_grad=True)
    assert not used(x, weight)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 8), 2.0))


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_the_librarys(dtype: torch.dtype, multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights widened piece by piece, or not, as the processor needs it."""
    monkeypatch.setattr(linear_module, "_multiplies", lambda dtype: multiplies)
    monkeypatch.setattr(linear_module, "PIECE", 5)
    for bias in (False, True):
        assert_as_specified(make_inputs((MOST_ROWS_WIDENED + 1, 20), 13, bias=bias, dtype=dtype))


def test_the_layer_compiles_into_one_graph() -> None:
    layer = Linear(12, 7, bias=True).requires_grad_(False)
    for parameter, value in zip(layer.parameters(), (torch.randn(7, 12), torch.randn(7)), strict=True):
        parameter.copy_(value)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 100):
        x = torch.randn(2, rows, 12)
        assert torch.equal(compiled(x), layer(x))


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[N, 8\] for x \[2, 8\], got \[4, 7\]"):
        linear(torch.ones(2, 8), torch.ones(4, 7))

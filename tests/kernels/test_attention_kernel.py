"""The attention kernels: against the specification on every instruction set, dtype and layout; registration."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set
from tests.paths import ROOT
from twotower_kernels.reference import attention
from twotower_kernels.testing.budget import assert_within_budget, widened
from twotower_kernels.testing.cases import attention as cases
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward

ATTENDING = ("block_attention", "context_attention")
EVERY = (*ATTENDING, "block_causal_attention")


def small(op: str) -> list[str]:
    return [case for case in (attention.CASES | attention.COMPOSED)[op] if not case.startswith("released")]


def pair(op: str) -> tuple[Any, Any]:
    """The kernel and the specification of an op, with the log-sum-exp where it is an option."""
    ours, theirs = getattr(tt, op), getattr(attention, op)
    return tuple(partial(f, return_lse=True) if op in EVERY else f for f in (ours, theirs))


def assert_agrees(op: str, inputs: dict[str, Any], layout: int = 0) -> None:
    ours, theirs = pair(op)
    assert_op_within_budget(ours, theirs, inputs, layout=layout)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def appended(op: Any, inputs: dict[str, Any], layout: int) -> tuple[Tensor, Tensor]:
    """The storage after append_kv, which must change nothing else."""
    given = {
        k: awkward(v.clone(), layout if k in ("k_context", "v_context") else 0) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    assert op(**given) is None
    for name in inputs.keys() - {"k_context", "v_context"}:
        assert torch.equal(given[name].nan_to_num(), inputs[name].nan_to_num())
    return given["k_context"], given["v_context"]


def assert_same_storage(inputs: dict[str, Any], layout: int = 0) -> None:
    ours, theirs = (appended(module.append_kv, inputs, layout) for module in (tt, attention))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# --- against the specification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case"), [(op, c) for op in (*EVERY, "merge_attention") for c in small(op)])
def test_every_case_on_every_instruction_set(op: str, case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            assert_agrees(op, attention.make_inputs(op, case, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", small("append_kv"))
def test_every_append_on_every_instruction_set(case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            assert_same_storage(attention.make_inputs("append_kv", case, dtype=dtype))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("op", ATTENDING)
def test_released_shape(op: str, count: int) -> None:
    with threads(count):
        assert_agrees(op, attention.make_inputs(op, "released_4k", dtype=torch.bfloat16))


@settings(max_examples=80, deadline=None)
@given(
    sizes=cases.sizes(),
    causal=st.booleans(),
    op=st.sampled_from(ATTENDING),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    count=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([1.0, 1.0, 1e-3, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, causal, op, dtype, isa, layout, count, size, seed):  # type: ignore[no-untyped-def]
    inputs = attention.make_inputs(op, sizes | {"causal": causal}, dtype=dtype, seed=seed)
    inputs["q"] = inputs["q"] * size
    with instruction_set(isa), threads(count):
        assert_agrees(op, inputs, layout)


@settings(max_examples=40, deadline=None)
@given(
    sizes=cases.sizes(),
    block_size=st.sampled_from([1, 2, 7, 32, 200]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    count=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**31),
)
def test_any_sequence_of_blocks(sizes, block_size, dtype, isa, layout, count, seed):  # type: ignore[no-untyped-def]
    sizes = {n: x for n, x in sizes.items() if not n.startswith(("context", "page", "window"))}
    inputs = attention.make_inputs("block_causal_attention", sizes | {"block_size": block_size}, dtype=dtype, seed=seed)
    with instruction_set(isa), threads(count):
        assert_agrees("block_causal_attention", inputs, layout)


@settings(max_examples=40, deadline=None)
@given(sizes=cases.appends(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(EVERY_ISA), layout=st.integers(0, 2))
def test_any_append(sizes, dtype, isa, layout):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        assert_same_storage(attention.make_inputs("append_kv", sizes, dtype=dtype), layout)


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.sampled_from(DTYPES).flatmap(cases.sides),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
)
def test_any_merge(inputs, isa, layout):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        assert_agrees("merge_attention", inputs, layout)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits_do_not_overflow(size: float, isa: str) -> None:
    inputs = attention.make_inputs("block_attention", {"context": 70, "block": 9})
    inputs["q"] = inputs["q"] * size
    with instruction_set(isa), threads(2):
        assert_agrees("block_attention", inputs)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_a_length_is_looked_at(poison: float, isa: str) -> None:
    sizes = {"batch": 3, "context": 66, "page": 6, "context_lens": [66, 0, 13], "block_lens": [5, 2, 0], "window": 60}
    inputs = attention.make_inputs("block_attention", sizes)
    inputs |= {k: v.nan_to_num(poison) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    table = inputs["block_table"]
    inputs["block_table"] = torch.where(table < 0, torch.iinfo(table.dtype).max, table)
    with instruction_set(isa):
        out, lse = tt.block_attention(**inputs, return_lse=True)
    clean = attention.make_inputs("block_attention", sizes)
    expected, expected_lse = attention.block_attention(**clean, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_nan_in_a_query_stays_in_its_row_and_in_a_key_in_its_head() -> None:
    inputs = attention.make_inputs("block_attention", {"context": 70, "causal": True})
    clean = tt.block_attention(**inputs)
    inputs["q"][1, 3, 2, 0] = torch.nan
    got = tt.block_attention(**inputs)
    assert got[1, 3, 2].isnan().all()
    got[1, 3, 2] = clean[1, 3, 2]
    assert torch.equal(got, clean)
    inputs["k_context"][0, 5, 1, 0] = torch.nan
    got = tt.block_attention(**inputs)
    assert got[0, :, 2:].isnan().all() and torch.equal(got[0, :, :2], clean[0, :, :2])


def test_parts_of_a_context_agree_with_the_whole() -> None:
    """However many threads, hence parts, there are."""
    inputs = attention.make_inputs("block_attention", {"batch": 1, "kv_heads": 1, "context": 1000}, dtype=torch.float64)
    whole = tt.block_attention(**inputs, return_lse=True)
    for count in (2, 3, 8):
        with threads(count):
            for got, expected in zip(tt.block_attention(**inputs, return_lse=True), whole, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_block_attention_is_the_merge_of_its_halves() -> None:
    inputs = attention.make_inputs("block_attention", "ragged", dtype=torch.float64)
    own = {name: inputs[name] for name in ("q", "k", "v", "block_lens")}
    past = {name: x for name, x in inputs.items() if name not in ("k", "v")}
    sides = (*tt.context_attention(**past, return_lse=True), *tt.block_attention(**own, return_lse=True))
    for got, expected in zip(tt.merge_attention(*sides), tt.block_attention(**inputs, return_lse=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_out_is_written_in_place_whatever_its_strides(op: str, layout: int) -> None:
    inputs = attention.make_inputs(op, "ragged")
    expected, expected_lse = getattr(tt, op)(**inputs, return_lse=True)
    out = awkward(torch.full_like(expected, 7.0), layout)
    result, lse = getattr(tt, op)(**inputs, return_lse=True, out=out)
    assert result is out and torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert getattr(tt, op)(**inputs, out=out) is out


def test_lengths_may_be_scalars_or_tensors_of_either_integer_type() -> None:
    inputs = attention.make_inputs("block_attention", {"context": 6, "block": 4})
    expected = tt.block_attention(**inputs, context_lens=torch.tensor([5, 5]), block_lens=torch.tensor([3, 3]))
    for context, block in ((5, 3), (torch.tensor(5), torch.tensor(3, dtype=torch.int32))):
        assert torch.equal(tt.block_attention(**inputs, context_lens=context, block_lens=block), expected)


# --- gradients and registration --------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "grouped": {"context": 4, "context_lens": [4, 2]},
    "causal": {"causal": True, "context": 3},
    "softcap": {"softcap": 1.5, "scale": 0.8, "context": 3, "causal": True},
    "ragged": {"context": 3, "context_lens": [0, 3], "block_lens": [2, 0]},
    "window": {"context": 5, "context_lens": [5, 1], "window": 2},
    "paged": {"context": 4, "page": 2, "context_lens": [1, 4], "window": 2},
    "folded": {"batch": 3, "context": 4, "context_rows": 1, "context_index": [0, 0, 0], "context_lens": [0, 2, 4]},
    "sinks": {"context": 3, "context_lens": [0, 3], "block_lens": [2, 0], "sinks": True, "softcap": 1.5},
    "left_padded": {"context": 4, "context_lens": [4, 2], "context_starts": [1, 2], "causal": True, "window": 3},
    "narrow_values": {"context": 4, "value_dim": 2, "context_rows": 1, "causal": True},
    "alone": {},
}


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients(op: str, case: str) -> None:
    sizes = {"block": 3, "heads": 2, "kv_heads": 1, "head_dim": 3} | DIFFERENTIABLE[case]
    if op == "context_attention":
        sizes = {"context": 4} | sizes
    inputs = attention.make_inputs(op, sizes, dtype=torch.float64)
    names = [name for name in ("q", "k", "v", "sinks") if name in inputs]
    leaves = tuple(inputs.pop(name).nan_to_num(0.5).requires_grad_() for name in names)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = getattr(tt, op)(**dict(zip(names, tensors, strict=True)), **inputs, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_of_a_sequence_of_blocks() -> None:
    sizes = {"block": 7, "heads": 2, "kv_heads": 1, "head_dim": 3, "value_dim": 2, "block_lens": [7, 4], "sinks": True}
    inputs = attention.make_inputs("block_causal_attention", sizes, dtype=torch.float64)
    lens = inputs.pop("seq_lens")
    leaves = [x.nan_to_num(0.5).requires_grad_() for x in inputs.values()]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(inputs, tensors, strict=True))
        out, lse = tt.block_causal_attention(**given, block_size=3, seq_lens=lens, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["k_context", "v_context"])
@pytest.mark.parametrize("op", ATTENDING)
def test_a_context_that_requires_grad_stops_backward_alone(op: str, name: str) -> None:
    inputs = attention.make_inputs(op, "tiny")
    expected = getattr(tt, op)(**inputs)
    inputs[name].requires_grad_()
    out = getattr(tt, op)(**inputs)
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match=f"twotower::{op} is not differentiable in {name}"):
        out.sum().backward()


@pytest.mark.parametrize("marks", [(-torch.inf, -torch.inf), (torch.inf, -torch.inf), (torch.inf, torch.inf)])
def test_gradients_of_a_merge(marks: tuple[float, float]) -> None:
    inputs = attention.make_inputs("merge_attention", dict(batch=3, block=1, empty_a=[0, 1], empty_b=[1]))
    leaves = [x.double().nan_to_num(0.5) for x in inputs.values()]
    nothing = [inputs[name].isneginf() for name in ("lse_a", "lse_b")]
    for x in leaves:
        x.requires_grad_()

    def function(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        lse_a, lse_b = (x.masked_fill(n, mark) for x, n, mark in zip((lse_a, lse_b), nothing, marks, strict=True))
        out, lse = tt.merge_attention(out_a, lse_a, out_b, lse_b)
        return out, lse.masked_fill(lse.isneginf(), 0)

    leaves[1].data.masked_fill_(nothing[0], 0.0), leaves[3].data.masked_fill_(nothing[1], 0.0)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gradients_stay_within_the_budget(dtype: torch.dtype) -> None:
    sizes = {"context": 40, "context_lens": [40, 0], "block_lens": [5, 3], "causal": True}
    inputs = attention.make_inputs("block_attention", sizes, dtype=dtype)

    def gradients(op: Any, inputs: dict[str, Any]) -> list[Tensor]:
        leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
        out, lse = op(*leaves, **{k: v for k, v in inputs.items() if k not in "qkv"}, return_lse=True)
        return list(torch.autograd.grad(out.double().sin().sum() + lse[lse.isfinite()].double().sin().sum(), leaves))

    results = gradients(tt.block_attention, inputs), gradients(attention.block_attention, inputs)
    for got, naive, exact in zip(*results, gradients(attention.block_attention, widened(inputs)), strict=True):
        assert_within_budget(got, naive, exact)


@pytest.mark.parametrize(
    ("case", "layout", "gradient"),
    [
        ("no_context", 0, True),
        ("ragged", 2, False),
        ("paged_window", 2, True),
        ("sinks", 2, True),
        ("wide_values", 0, False),
    ],
)
def test_registration_of_attention(case: str, layout: int, gradient: bool) -> None:
    inputs = attention.make_inputs("block_attention", case)
    given = {k: awkward(v, layout) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    q, k, v = (given[name].nan_to_num().requires_grad_(gradient) for name in "qkv")
    names = ("k_context", "v_context", "context_lens", "context_starts", "context_index", "block_table", "block_lens")
    context = [given.get(name) for name in (*names, "sinks")]
    options = int(given.get("causal", False)), given.get("window"), 0.5, given.get("softcap", 0.0)
    results = v.new_empty(*q.shape[:3], v.shape[3]).detach(), q.new_empty(q.shape[:3]).detach()
    ops = torch.ops.twotower
    torch.library.opcheck(ops.block_attention.default, (q, k, v, *context, *options))
    if context[0] is not None:
        torch.library.opcheck(ops.context_attention.default, (q, *context, *options))
    if not gradient:
        torch.library.opcheck(ops.block_attention_out.default, (q, k, v, *context, *options, *results))
        grads = torch.randn(results[0].shape), torch.randn(q.shape[:3])
        arguments = (*grads, q, k, v, *context, *options)
        torch.library.opcheck(ops.attention_backward.default, arguments)
        if context[0] is not None:
            torch.library.opcheck(ops.context_attention_out.default, (q, *context, *options, *results))


@pytest.mark.parametrize("layout", [0, 2])
def test_registration_of_merge_and_append(layout: int) -> None:
    merge = [awkward(x, layout) for x in attention.make_inputs("merge_attention", "tiny").values()]
    leaves = tuple(x.detach().requires_grad_(layout == 2) for x in merge)
    torch.library.opcheck(torch.ops.twotower.merge_attention.default, leaves)
    inputs = {k: awkward(x, layout) for k, x in attention.make_inputs("append_kv", "paged").items()}
    names = ("k_context", "v_context", "k", "v", "context_lens", "context_index", "block_table", "block_lens")
    torch.library.opcheck(
        torch.ops.twotower.append_kv.default,
        tuple(x.nan_to_num() if x is not None and x.is_floating_point() else x for x in map(inputs.get, names)),
    )


def test_the_ops_compile_without_a_break() -> None:
    inputs = attention.make_inputs("block_attention", "ragged")
    append = attention.make_inputs("append_kv", "tiny")

    def step(inputs: dict[str, Any], append: dict[str, Any]) -> Tensor:
        tt.append_kv(**append)
        return tt.block_attention(**inputs) + tt.block_attention(**inputs | {"context_lens": 2})

    expected = step(inputs, {k: x.clone() for k, x in append.items()})
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(inputs, append)
    assert torch.equal(got, expected)


def test_the_page_on_attention_runs() -> None:
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 9
    exec("\n".join(blocks), {})

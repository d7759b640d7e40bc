"""Attention over a block and its context, merging, and appending."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops import attention as ops
from twotower_kernels.reference import attention
from twotower_kernels.testing import drawing
from twotower_kernels.testing.budget import assert_equal, assert_same_kind
from twotower_kernels.testing.cases.op import Arguments, Inputs, Judge, Op, empty
from twotower_kernels.testing.needs import strategies as st

ATTENDING = ("block_attention", "context_attention", "block_causal_attention")


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that cross tiles of keys and pieces of query rows, and those that do not fill one."""
    batch, kv_heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    block, context = draw(st.sampled_from([0, 1, 2, 5, 19, 97, 130])), draw(st.sampled_from([0, 1, 2, 9, 96, 97, 200]))
    page = draw(drawing.pages())
    context = context if page is None else context // page * page
    rows, shared = draw(st.integers(1, 3)), draw(st.booleans())
    one = rows == 1 and draw(st.booleans())  # without an index
    return {
        "batch": batch,
        "block": block,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3, 5, 16])),
        "head_dim": draw(st.sampled_from([1, 2, 6, 8, 17, 64])),
        "context": context,
        "context_rows": rows if shared or one else batch,
        "context_index": [draw(st.integers(0, rows - 1)) for _ in range(batch)] if shared and not one else None,
        "context_lens": draw(drawing.lengths(batch, context)),
        "context_starts": draw(drawing.lengths(batch, context)),
        "block_lens": draw(drawing.lengths(batch, block)),
        "page": page,
        "transposed": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 0, 1, 7, 70])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "value_dim": draw(st.sampled_from([None, None, 1, 6, 80])),
        "sinks": draw(st.booleans()),
    }


def _without(sizes: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """Sizes as far as the kernel takes their arguments, all it must be given included."""
    batch, context, block = sizes["batch"], sizes["context"], sizes["block"]
    fitted = dict(sizes)
    if not {"k_context", "v_context"} <= arguments.taken:
        fitted |= dict(context=None, page=None, context_lens=None, context_starts=None, context_index=None, window=None)
    lens = {"context_lens": (context, None), "context_starts": (0, None), "block_lens": (block, None)}
    for name, (whole, none) in lens.items():
        if name not in arguments.taken and not (name == "block_lens" and "seq_lens" in arguments.taken):
            fitted[name] = none
        elif fitted[name] is None and name in arguments.demanded and fitted["context"] is not None:
            fitted[name] = [whole] * batch
    if "context_index" not in arguments.taken and fitted["context_index"] is not None:
        fitted |= dict(context_index=None, context_rows=batch)
    elif fitted["context_index"] is None and "context_index" in arguments.demanded and fitted["context"] is not None:
        fitted |= dict(context_index=list(range(batch)), context_rows=batch)
    if "block_table" not in arguments.taken:
        fitted["page"] = None
    elif fitted["page"] is None and "block_table" in arguments.demanded and fitted["context"] is not None:
        fitted |= dict(page=1)
    for name, none in (("window", None), ("softcap", 0.0), ("sinks", False)):
        if name not in arguments.taken:
            fitted[name] = none
    fitted["sinks"] = fitted["sinks"] or "sinks" in arguments.demanded
    if fitted["window"] is None and "window" in arguments.demanded:
        fitted["window"] = 7
    return fitted


@st.composite
def _attending(draw: st.DrawFn, op: str, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    given = draw(sizes())
    if op == "block_attention" and not {"k_context", "v_context"} & arguments.demanded and draw(st.booleans()):
        without = Arguments(arguments.taken - {"k_context", "v_context"}, arguments.demanded)
    else:
        without = arguments
    given = _without(given, without)
    if op == "block_causal_attention":
        given = {name: x for name, x in given.items() if not name.startswith(("context", "page", "window"))}
        given["block_size"] = draw(st.sampled_from([1, 2, 7, 32, 200]))
    elif "causal" in arguments.taken:
        given["causal"] = draw(st.booleans())
    inputs = attention.make_inputs(op, given, dtype=dtype, seed=draw(drawing.seeds()))
    inputs["q"] = inputs["q"] * draw(drawing.magnitudes())
    if "scale" in arguments.taken:
        inputs["scale"] = draw(st.sampled_from([None, 0.3]))
    if "return_lse" in arguments.taken:
        inputs["return_lse"] = draw(st.sampled_from([True, True, False]))
    return arguments.kept(inputs)


def _rows(inputs: Inputs) -> list[str]:
    """Every argument with a row per batch row, unless rows share a context."""
    names = ("q", "k", "v", "context_lens", "context_starts", "context_index", "block_lens", "seq_lens")
    given = [name for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].ndim]
    if inputs.get("k_context") is None or inputs.get("context_index") is not None:
        return given
    if inputs.get("block_table") is not None:
        return [*given, "block_table"] if len(inputs["block_table"]) == len(inputs["q"]) else given
    return [*given, "k_context", "v_context"] if len(inputs["k_context"]) == len(inputs["q"]) else given


def _refusable(inputs: Inputs) -> list[str]:
    """Also what is a matter of shapes alone."""
    found = []
    values = inputs["v"] if "v" in inputs else inputs["v_context"]
    if values.shape[-1] != inputs["q"].shape[-1]:
        found.append("values of another head_dim than queries")
    if inputs.get("k_context") is not None and inputs.get("context_index") is None:
        rows = len(inputs["k_context"] if inputs.get("block_table") is None else inputs["block_table"])
        found += ["one context for all rows"] * (rows == 1 and len(inputs["q"]) > 1)
    return found + empty(inputs)


def _attention(name: str) -> Op:
    cases = (attention.CASES | attention.COMPOSED)[name]
    return Op(
        getattr(ops, name), getattr(attention, name), cases, partial(attention.make_inputs, name),
        partial(_attending, name), own=("q", "k", "v"), rows=_rows, refusable=_refusable,
        everything={"return_lse": True},
    )  # fmt: skip


@st.composite
def sides(draw: st.DrawFn, dtype: torch.dtype) -> Inputs:
    """Of `merge_attention`: sides of any spread, some of them empty."""
    empty = draw(st.lists(st.sampled_from([None, -math.inf, math.inf]), min_size=2, max_size=2))
    shape = draw(st.sampled_from([(1,), (0, 3), (2, 3, 4, 5), (2, 7, 33)]))
    spread = draw(st.sampled_from([1.0, 50.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(drawing.seeds()))
    inputs: Inputs = {}
    for side, nothing in zip("ab", empty, strict=True):
        out = torch.randn(shape, generator=generator).to(dtype)
        lse = torch.randn(shape[:-1], generator=generator).to(torch.promote_types(dtype, torch.float32)) * spread
        if nothing:
            out, lse = torch.full_like(out, torch.nan), torch.full_like(lse, nothing)
        inputs |= {f"out_{side}": out, f"lse_{side}": lse}
    return inputs


SIDES = ("out_a", "lse_a", "out_b", "lse_b")


@st.composite
def appends(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of `append_kv`: every row has room for its block."""
    drop = ("window", "softcap", "context_lens", "context_starts", "sinks")
    given = {name: x for name, x in draw(sizes()).items() if name not in drop}
    given |= {"context_rows": given["batch"] + 1, "context_index": list(range(given["batch"], 0, -1))}
    page = given["page"] or 1
    given["context"] += -(-given["block"] // page) * page
    given["context_lens"] = [(given["context"] - given["block"]) // (row + 1) for row in range(given["batch"])]
    return given


@st.composite
def _appending(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    given = draw(appends())
    if not arguments.gives("context_index", draw(st.booleans())):
        given |= {"context_index": None, "context_rows": given["batch"]}
    if "block_table" not in arguments.taken:
        given["page"] = None
    if "block_lens" not in arguments.taken:
        given["block_lens"] = None
    return arguments.kept(attention.make_inputs("append_kv", given, dtype=dtype, seed=draw(drawing.seeds())))


def appended(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The storage that the specification's `append_kv` leaves; what it is given stays as it is."""
    inputs |= {name: inputs[name].clone() for name in ("k_context", "v_context")}
    attention.append_kv(**inputs)
    return inputs["k_context"], inputs["v_context"]


class JudgeStorage(Judge):
    """Copies are exact."""

    def __call__(self, results: Any, row: int | None = None) -> None:
        for got, expected, what in zip(results, self.yardstick.naive, ("k_context", "v_context"), strict=True):
            assert_same_kind(got, expected, what)
            assert_equal(got, expected, what)


OPS = {name: _attention(name) for name in ATTENDING}
OPS["merge_attention"] = Op(
    ops.merge_attention, attention.merge_attention, attention.CASES["merge_attention"],
    partial(attention.make_inputs, "merge_attention"), lambda arguments, dtype: sides(dtype).map(arguments.kept),
    own=SIDES, rows=lambda inputs: SIDES if inputs["lse_a"].ndim else (),
)  # fmt: skip
OPS["append_kv"] = Op(
    ops.append_kv, appended, attention.CASES["append_kv"], partial(attention.make_inputs, "append_kv"), _appending,
    writes=("k_context", "v_context"), judge=JudgeStorage,
)  # fmt: skip

"""Norms, modulation and residuals."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from twotower_kernels.ops import adaln as ops
from twotower_kernels.reference import adaln
from twotower_kernels.testing import drawing
from twotower_kernels.testing.cases.op import Arguments, Inputs, Op, empty
from twotower_kernels.testing.needs import strategies as st

ORDERS = ("plain", *adaln.ORDERS)


def sizes() -> st.SearchStrategy[dict[str, Any]]:
    """Of `make_inputs`: rows longer than a vector, with what remains of one behind it."""
    return st.fixed_dictionaries(
        {
            "b": st.integers(0, 3),
            "s": st.integers(0, 5),
            "h": st.integers(1, 70),
            "order": st.sampled_from(ORDERS),
            "gated": st.booleans(),
            "weighted": st.booleans(),
            "round_first": st.booleans(),
        }
    )


@st.composite
def _inputs(draw: st.DrawFn, op: str, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    given = draw(sizes())
    if not {"shift", "scale"} <= arguments.taken and op != "gated_residual":
        given["order"] = "plain"
    elif {"shift", "scale"} & arguments.demanded and given["order"] == "plain":
        given["order"] = adaln.ORDERS[0]
    if "order" not in arguments.taken and given["order"] == "norm_modulate":
        given["order"] = "modulate_norm"
    given["gated"] = arguments.gives("gate", given["gated"])
    given["weighted"] = arguments.gives("weight", given["weighted"])
    given["round_first"] = given["round_first"] and "round_first" in arguments.taken
    inputs = adaln.make_inputs(op, given, dtype=dtype, seed=draw(drawing.seeds()))
    first = "x" if "x" in inputs else "residual"
    inputs[first] = inputs[first] * draw(drawing.magnitudes())
    if "eps" in inputs:
        inputs["eps"] = draw(st.sampled_from([1e-5, 1e-6, 0.1]))
    return arguments.kept(inputs)


def _rows(inputs: Inputs) -> list[str]:
    """Those with a batch dimension, if there is one."""
    given = [name for name in ("x", "residual", "y", "gate", "shift", "scale") if inputs.get(name) is not None]
    return given if all(inputs[name].ndim > 1 for name in given) else []


def _refusable(inputs: Inputs) -> list[str]:
    """Also vectors that are required and may be None."""
    absent = [name for name in ("gate", "shift", "scale") if name in inputs and inputs[name] is None]
    return [f"no {' and '.join(absent)}"] * bool(absent) + empty(inputs)


def _op(name: str) -> Op:
    own = [name for name in ("x", "residual", "y", "gate", "shift", "scale")]
    return Op(
        getattr(ops, name), getattr(adaln, name), adaln.CASES[name], partial(adaln.make_inputs, name),
        partial(_inputs, name), own=own, rows=_rows, refusable=_refusable,
    )  # fmt: skip


OPS = {name: _op(name) for name in ("rms_norm", "adaln_norm", "gated_residual", "gated_residual_adaln_norm")}

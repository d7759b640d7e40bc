"""The linear layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from twotower_kernels.ops.linear import linear as public
from twotower_kernels.reference import linear
from twotower_kernels.testing import drawing
from twotower_kernels.testing.cases.op import Arguments, Inputs, Op
from twotower_kernels.testing.needs import strategies as st


def sizes() -> st.SearchStrategy[dict[str, Any]]:
    """Rows in any shape, few and more than a tile; sums that are empty, short, and of several pieces."""
    lead = st.lists(st.integers(0, 3), max_size=2) | st.sampled_from([[5], [7], [21], [40], [65]])
    return st.fixed_dictionaries(
        {
            "rows": lead.map(tuple),
            "k": drawing.sizes(70, 127, 128, 129, 255, 256, 257, 515),
            "r": drawing.sizes(40, 63, 64, 65, 130),
            "bias": st.booleans(),
        }
    )


@st.composite
def _inputs(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    given = draw(sizes())
    given["bias"] = arguments.gives("bias", given["bias"])
    if draw(st.booleans()):
        given["r"] = given["k"]  # a square weight has another by mistake
    inputs = linear.make_inputs("linear", given, dtype=dtype, seed=draw(drawing.seeds()))
    inputs["x"] = inputs["x"] * draw(drawing.magnitudes())
    if given["bias"] and inputs["x"].numel() and draw(st.booleans()):  # of the first row little is left
        first = inputs["x"].reshape(-1, given["k"])[0].double()
        inputs["bias"] = (-(inputs["weight"].double() @ first)).to(dtype)
    return arguments.kept(inputs)


def _rows(inputs: Inputs) -> list[str]:
    return ["x"] if inputs["x"].ndim > 1 else []


OPS = {
    "linear": Op(
        public, linear.linear, linear.CASES["linear"], partial(linear.make_inputs, "linear"), _inputs,
        own=("x",), rows=_rows,
    )
}  # fmt: skip

"""The selective scan and its gated norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops import mamba2 as ops
from twotower_kernels.reference import mamba2
from twotower_kernels.testing import drawing
from twotower_kernels.testing.cases.op import Arguments, Inputs, Judge, Op, empty
from twotower_kernels.testing.needs import strategies as st

SEEDS = ("none", "conv", "ssm", "both", "shared")  # which states a scan begins with


def sizes() -> st.SearchStrategy[dict[str, Any]]:
    """Of `make_inputs`: any length, a state that fills vectors or does not."""
    drawn = st.fixed_dictionaries(
        {
            "b": st.integers(0, 3),
            "l": st.integers(0, 40),
            "heads": st.integers(1, 2),
            "head_dim": st.integers(1, 9),
            "state": st.integers(1, 35),
            "groups": st.integers(1, 2),
            "seeded": st.just(True),
        }
    )
    return drawn.map(lambda given: given | {"heads": given["heads"] * given["groups"]})


def seeded(
    case: dict[str, Any], width: int, bias: bool, seeds: str, ragged: bool, size: float, dtype: torch.dtype, seed: int
) -> Inputs:
    """Inputs of any taps: with the seeds that `seeds` names, states of this `size`, rows of any length if ragged."""
    b, length = case["b"], case["l"]
    inputs = mamba2.make_inputs("mamba2_scan", case, dtype=dtype, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    channels = inputs["xbc"].shape[2]
    inputs["conv_weight"] = (torch.randn(channels, width, generator=draw) / 2).to(dtype)
    inputs["conv_state"] = torch.randn(b, channels, width - 1, generator=draw).to(dtype)
    inputs["ssm_state"] = inputs["ssm_state"] * min(size, 10.0 if dtype == torch.float16 else size)
    if not bias:
        inputs["conv_bias"] = None
    if seeds in ("none", "conv"):
        inputs["ssm_state"] = None
    if seeds in ("none", "ssm"):
        inputs["conv_state"] = None
    if seeds == "shared" and b:
        inputs["state_index"] = torch.randint(0, b, (b,), generator=draw, dtype=torch.int32)
    if ragged:
        inputs["seq_lens"] = torch.randint(0, length + 1, (b,), generator=draw)
    return inputs


def hidden(inputs: Inputs, value: float = torch.nan) -> Inputs:
    """The same with `value` in every token beyond its row's length."""
    xbc, dt = inputs["xbc"].clone(), inputs["dt"].clone()
    for row, length in enumerate(inputs["seq_lens"].tolist()):
        xbc[row, length:] = value
        dt[row, length:] = value
    return inputs | dict(xbc=xbc, dt=dt)


def silent(inputs: Inputs) -> Inputs:
    """The same with x = 0: a state that only decays, of which no rounding of activations blurs a digit."""
    inner = inputs["dt"].shape[2] * inputs["head_dim"]
    xbc = inputs["xbc"].clone()
    xbc[..., :inner] = 0
    given = inputs | dict(xbc=xbc, conv_bias=None)
    if inputs["conv_state"] is not None:
        conv = inputs["conv_state"].clone()
        conv[:, :inner] = 0
        given["conv_state"] = conv
    return given


def is_silent(inputs: Inputs) -> bool:
    inner = inputs["dt"].shape[2] * inputs["head_dim"]
    parts = [inputs["xbc"][..., :inner], inputs.get("conv_state"), inputs.get("conv_bias")]
    first = [parts[0], *(None if x is None else x[:inner] if x.ndim == 1 else x[:, :inner] for x in parts[1:])]
    return not any(bool(x.nan_to_num().any()) for x in first if x is not None)


@st.composite
def _scan(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    conv, ssm = (name in arguments.taken for name in ("conv_state", "ssm_state"))
    seeds = [
        name
        for name, has in {"none": (), "conv": ("conv_state",), "ssm": ("ssm_state",)}.items()
        if set(has) <= arguments.taken and arguments.demanded & {"conv_state", "ssm_state"} <= set(has)
    ]
    seeds = [] if "state_index" in arguments.demanded else seeds
    if conv and ssm:
        seeds += ["both"] if "state_index" not in arguments.demanded else []
        seeds += ["shared"] if "state_index" in arguments.taken else []
    bias = arguments.gives("conv_bias", draw(st.booleans()))
    ragged = arguments.gives("seq_lens", draw(st.booleans()))
    inputs = seeded(
        draw(sizes()), draw(st.integers(1, 6)), bias, draw(st.sampled_from(seeds)), ragged,
        draw(st.sampled_from([1e-3, 1.0, 1e5])), dtype, draw(drawing.seeds()),
    )  # fmt: skip
    if draw(st.booleans()) and "conv_bias" not in arguments.demanded:
        inputs = silent(inputs)
    if "time_step_limit" in arguments.taken:
        inputs["time_step_limit"] = draw(st.sampled_from([(0.0, float("inf")), (0.01, 0.5)]))
    if ragged:
        inputs = hidden(inputs)
    if "return_states" in arguments.taken and draw(st.sampled_from([True, True, False])):
        inputs["return_states"] = True
    elif "states_every" in arguments.taken and draw(st.booleans()):
        inputs["states_every"] = draw(st.sampled_from([1, 4, 17, 99]))
    return arguments.kept(inputs)


class JudgeScan(Judge):
    """With a wider rounding band of the state: in float32, it is made of activations that were rounded to their dtype,
    unless it is made of none."""

    def __init__(self, reference: Any, inputs: Inputs) -> None:
        super().__init__(reference, inputs)
        dtype = inputs["xbc"].dtype
        coarse = 1.0 if is_silent(inputs) else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        self.state_band = 2 * max(1.0, coarse)

    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        self.yardstick.judge(results, row=row, bands={2: self.state_band}, any_order=self.any_order)


def _scan_rows(inputs: Inputs) -> list[str]:
    shared = inputs.get("state_index") is not None
    names = ("xbc", "dt", "seq_lens", "state_index", *(() if shared else ("conv_state", "ssm_state")))
    return [name for name in names if inputs.get(name) is not None]


def _refusable(inputs: Inputs) -> list[str]:
    """Also no bias, which is a required argument."""
    return ["no conv_bias"] * (inputs["conv_bias"] is None) + empty(inputs)


@st.composite
def norms(draw: st.DrawFn, dtype: torch.dtype) -> Inputs:
    """Of `gated_rms_norm`: leading dimensions of any number."""
    shape, groups = draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(1, 4))
    size, scale = draw(st.integers(1, 40)), draw(st.sampled_from([1e-4, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(drawing.seeds()))
    y, z = (torch.randn(*shape, groups * size, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(groups * size, generator=generator, dtype=torch.float64)
    eps = draw(st.sampled_from([1e-5, 1e-5, 0.1]))
    return dict(y=(y * scale).to(dtype), z=z.to(dtype), weight=weight.to(dtype), n_groups=groups, eps=eps)


OPS = {
    "mamba2_scan": Op(
        ops.mamba2_scan, mamba2.mamba2_scan, mamba2.CASES["mamba2_scan"], partial(mamba2.make_inputs, "mamba2_scan"),
        _scan, own=("xbc", "dt", "conv_state", "ssm_state"), rows=_scan_rows, judge=JudgeScan,
        everything={"return_states": True},
        refusable=_refusable,
    ),
    "gated_rms_norm": Op(
        ops.gated_rms_norm, mamba2.gated_rms_norm, mamba2.CASES["gated_rms_norm"],
        partial(mamba2.make_inputs, "gated_rms_norm"), lambda arguments, dtype: norms(dtype), own=("y", "z"),
        rows=lambda inputs: ("y", "z") if inputs["y"].ndim > 1 else (),
    ),
}  # fmt: skip

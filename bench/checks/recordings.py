"""What was recorded from the original model, and how near a program must come to it.

An installed package has the recordings of the two smaller models; a checkout reads its own, `tests/data/golden`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import twotower_kernels
from twotower_kernels.bench.report.checkout import ROOT

# setup.py copies those of INSTALLED to where the package looks for them.
GOLDEN = Path(twotower_kernels.__file__).parent / "recorded" if ROOT is None else ROOT / "tests" / "data" / "golden"
INSTALLED = ("tiny", "tiny_bf16")
FLOAT32, BFLOAT16 = tuple(name for name in ("tiny", "grouped_router") if ROOT or name in INSTALLED), "tiny_bf16"


@cache
def recorded(name: str) -> dict[str, Tensor]:
    """Inputs and outputs."""
    return load_file(GOLDEN / name / "io.safetensors")


def cached(state: Any, prefix: str) -> dict[str, Tensor]:
    """A state in the recording's layout: k and v heads first, as far as they are filled."""
    filled = int(state.lengths.max())
    tensors = {f"{prefix}.cache.conv.{i}": conv for i, conv in state.conv.items()}
    tensors |= {f"{prefix}.cache.ssm.{i}": ssm for i, ssm in state.ssm.items()}
    tensors |= {f"{prefix}.cache.k.{i}": k[:, :filled].transpose(1, 2) for i, k in state.k.items()}
    return tensors | {f"{prefix}.cache.v.{i}": v[:, :filled].transpose(1, 2) for i, v in state.v.items()}


def outputs_of(model: Any, io: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every recorded output, computed again from the recorded inputs; no state is read after it was committed to."""
    state = model.prefill(io["prefill.input_ids"])
    block, t = io["denoise.block_ids"], io["denoise.t"]
    results = {
        "forward_ar.logits": model.forward_ar(io["prefill.input_ids"]),
        "prefill.logits_last": state.logits[:, None],
        "denoise.logits": model.denoise(block, state, t),
        "denoise.logits_no_time": model.denoise(block, state),
        **cached(state, "prefill"),
    }
    state = model.commit(io["commit.block_ids"], state)
    return results | {"commit.denoise.logits": model.denoise(block, state, t), **cached(state, "commit")}


def expected(name: str, key: str) -> Tensor:
    want = recorded(name)[key]  # of four recorded conv columns the state holds the last three
    return want[..., 1:] if ".conv." in key else want


def output_keys(name: str) -> list[str]:
    inputs = {"prefill.input_ids", "denoise.block_ids", "denoise.t", "commit.block_ids"}
    return sorted(key for key in recorded(name) if key not in inputs and "gen." not in key)


def recorded_float32() -> list[tuple[str, str]]:
    """Every output of the models in float32: the model's name, and the output's."""
    return [(name, key) for name in FLOAT32 for key in output_keys(name)]


def assert_recorded_float32(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-3


def assert_recorded_bfloat16(got: Tensor, want: Tensor) -> None:
    """The recording's own rule: relative error per position, its median under 0.04, at most a quarter over 0.05."""
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1).clamp(min=1e-12)
    assert error.median() < 0.04
    assert (error > 0.05).double().mean() <= 0.25


# (One recording has a decision closer than float32 tells.)
RECORDED_TEXTS = [(name, index) for name in FLOAT32 for index in range(6) if (name, index) != ("tiny", 2)]


def assert_recorded_text(model: Any, name: str, index: int) -> None:
    """A model in float32 writes the original program's tokens, in as many calls."""
    arguments = json.loads((GOLDEN / name / "generations.json").read_text(encoding="utf-8"))[index]
    data, nfe = recorded(name), arguments.pop("nfe", None)
    result = model.generate(data[f"gen.{index}.prompt"].to(model.device), **arguments)
    assert result.sequences[0].tolist() == data[f"gen.{index}.output"][0].tolist()
    if arguments["mode"] == "mask_diffusion":
        assert result.nfe == [nfe]

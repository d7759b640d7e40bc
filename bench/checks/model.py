"""What a model must show: the recordings' tensors and texts, agreement with the specification, the shipped model's
text, and on a GPU the same text through recorded graphs as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels import TwoTowerModel
from twotower_kernels.bench.checks.agreement import assert_agreement
from twotower_kernels.bench.checks.random_models import models, random_ids
from twotower_kernels.bench.checks.recordings import (
    BFLOAT16,
    FLOAT32,
    GOLDEN,
    RECORDED_TEXTS,
    assert_recorded_bfloat16,
    assert_recorded_float32,
    assert_recorded_text,
    expected,
    output_keys,
    outputs_of,
    recorded,
)
from twotower_kernels.model import generate as generation
from twotower_kernels.model.capture import CapturedModel, Recorder
from twotower_kernels.reference import generate as specification
from twotower_kernels.reference.model import TwoTower

AGREEMENTS = [("MEM*E-", torch.float32), ("M*-M-*", torch.bfloat16), ("M*-M-*", torch.float16)]


def check_recorded_tensors(name: str, assert_recorded: Callable[[Tensor, Tensor], None], device: str) -> None:
    model = TwoTowerModel.from_pretrained(GOLDEN / name, device=device)
    outputs = outputs_of(model, {key: tensor.to(device) for key, tensor in recorded(name).items()})
    for key in output_keys(name):
        assert_recorded(outputs[key].cpu(), expected(name, key))


def check_recorded_text(name: str, index: int, device: str) -> None:
    assert_recorded_text(TwoTowerModel.from_pretrained(GOLDEN / name, device=device), name, index)


def check_agreement(pattern: str, dtype: torch.dtype, device: str) -> None:
    m = models(pattern, dtype)
    m.ours.to(device)
    assert_agreement(m, device=device)


def check_text_through_graphs(mode: str, device: str, record: Recorder | None = None) -> None:
    """A ragged batch whose rows end at different times: event for event what the model writes call by call."""
    model = models("MEM*E-", torch.float32).ours.to(device)
    options: dict[str, Any] = dict(mode=mode, max_new_tokens=40, block_size=4, eos_token_id=19, temperature=1.2, seed=5)
    events_of = []
    for through in (True, False):
        with (
            patch.object(generation, "_records", lambda device, through=through: through),
            patch.object(generation, "CapturedModel", partial(CapturedModel, record=record)),
        ):
            events = generation.stream(model, [[5], [6, 7, 8], [9, 10]], **options)
            events_of.append(
                [[x.tolist() if isinstance(x, Tensor) else x for x in vars(event).values()] for event in events]
            )
    assert events_of[0] == events_of[1]


def check_compilation(device: str) -> None:
    """The denoiser compiles as one graph, and says what it says without."""
    model = models("M*E-", torch.float32).ours.to(device)
    state = model.prefill(random_ids(2, 200).to(device), [200, 7])
    block, t = random_ids(2, 4, seed=1).to(device), torch.tensor([0.25, 1.0], device=device)
    compiled = torch.compile(model.denoise, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(block, state, t), model.denoise(block, state, t), rtol=1e-5, atol=1e-5)


# Three beginnings: a row each, so that one batch holds rows of different lengths.
BEGINNINGS = [[1, 40], [1, 40, 41, 42, 300, 301, 302], [1, *range(100, 130)]]


def check_shipped_text(mode: str, device: str) -> None:
    """The shipped model in float32 writes the tokens that the specification does in float64, in as many calls.

    Raises:
        NotImplementedError: a decision is closer than float32 tells: the specification itself, in float32, writes
            others.
    """
    folder, options = tt.demo_path(), dict(mode=mode, max_new_tokens=24)
    plain, exact = (
        specification.generate(TwoTower.from_pretrained(folder, dtype=dtype), BEGINNINGS, **options)
        for dtype in (torch.float32, torch.float64)
    )
    expected = [row.tolist() for row in exact.sequences], exact.nfe
    if ([row.tolist() for row in plain.sequences], plain.nfe) != expected:
        raise NotImplementedError("a decision is closer than float32 tells")
    model = TwoTowerModel.from_pretrained(folder, dtype=torch.float32, device=device)
    got = model.generate(BEGINNINGS, **options)
    assert [row.tolist() for row in got.sequences] == expected[0], "other tokens than the specification's"
    assert got.nfe == expected[1], f"in {got.nfe} calls, expected {expected[1]}"


def of_the_model(device: str, *, graphs: bool = True) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check, by what it says."""
    for name in (*FLOAT32, BFLOAT16):
        rule = assert_recorded_bfloat16 if name == BFLOAT16 else assert_recorded_float32
        yield f"model, recorded tensors of {name}", partial(check_recorded_tensors, name, rule, device)
    for name, index in RECORDED_TEXTS:
        yield f"model, recorded text {index} of {name}", partial(check_recorded_text, name, index, device)
    for pattern, dtype in AGREEMENTS:
        yield f"model, agreement of {pattern} {dtype}", partial(check_agreement, pattern, dtype, device)
    yield "model, compiled", partial(check_compilation, device)
    for mode in generation.MODES:
        yield f"model, {mode} of the shipped one", partial(check_shipped_text, mode, device)
    for mode in generation.MODES if device == "cuda" and graphs else ():
        yield f"model, {mode} through graphs", partial(check_text_through_graphs, mode, device)

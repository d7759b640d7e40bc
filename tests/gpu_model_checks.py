"""What a model must show on a GPU: the recordings' tensors and texts, agreement with the specification, and the same
text through recorded graphs as without. Part of `tests.gpu_checks`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.model.agreement import assert_agreement
from tests.model.random_models import models, random_ids
from tests.model.recordings import (
    BFLOAT16,
    FLOAT32,
    RECORDED_TEXTS,
    assert_recorded_bfloat16,
    assert_recorded_float32,
    assert_recorded_text,
    expected,
    output_keys,
    outputs_of,
    recorded,
)
from tests.paths import GOLDEN
from twotower_kernels import TwoTowerModel
from twotower_kernels.model.capture import CapturedModel, Recorder

generation = importlib.import_module("twotower_kernels.model.generate")  # the package has a function of that name

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
    seen = []
    for through in (True, False):
        with (
            patch.object(generation, "_records", lambda device, through=through: through),
            patch.object(generation, "CapturedModel", partial(CapturedModel, record=record)),
        ):
            events = generation.stream(model, [[5], [6, 7, 8], [9, 10]], **options)
            seen.append(
                [[x.tolist() if isinstance(x, Tensor) else x for x in vars(event).values()] for event in events]
            )
    assert seen[0] == seen[1]


def check_compilation(device: str) -> None:
    """The denoiser compiles as one graph, and says what it says without."""
    model = models("M*E-", torch.float32).ours.to(device)
    state = model.prefill(random_ids(2, 200).to(device), [200, 7])
    block, t = random_ids(2, 4, seed=1).to(device), torch.tensor([0.25, 1.0], device=device)
    compiled = torch.compile(model.denoise, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(block, state, t), model.denoise(block, state, t), rtol=1e-5, atol=1e-5)


def of_the_model(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
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
        yield f"model, {mode} through graphs", partial(check_text_through_graphs, mode, device)

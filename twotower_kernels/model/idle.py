"""Recordings on a CPU that outlive the generation that made them: the next one of the same model goes on with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from twotower_kernels.model.capture import Recordings
from twotower_kernels.model.interface import Towers
from twotower_kernels.model.layers import Embedding
from twotower_kernels.ops.recording import CpuRecordings
from twotower_kernels.quantization import QuantizedTensor

MOST = 64  # recordings that are kept for a generation to come
# Bytes of weights. With more, Python is a few per cent of a step at most, and what recordings keep, the states of every
# batch's rows and the memory between kernels, is no longer small.
SMALL = 1 << 27
_IDLE: WeakKeyDictionary[Towers, list[Recordings]] = WeakKeyDictionary()
_SMALL: WeakKeyDictionary[Towers, bool] = WeakKeyDictionary()


def pays(model: Towers) -> bool:
    """Whether recordings make a model faster, and cost little memory: for a small one."""
    if not isinstance(model, nn.Module):
        return False
    if model not in _SMALL:
        weights = [*model.parameters(), *model.buffers()]
        _SMALL[model] = sum(p.nbytes for p in weights) <= SMALL and not _dequantizes(model)
    return _SMALL[model]


def _dequantizes(model: nn.Module) -> bool:
    """Whether PyTorch computes with quantized weights, which no replay does: of embeddings, and in float64."""
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    parts = (m for m in model.modules() if wide or isinstance(m, Embedding))
    return any(isinstance(child, QuantizedTensor) for part in parts for child in part.children())


@contextmanager
def recordings(model: Towers) -> Iterator[Recordings]:
    """Recordings that nobody else uses meanwhile, be it in another thread or a generation that is not finished.

    Raises:
        RuntimeError: at the end, if a part of the model was replaced meanwhile: it may have been computed with the old.
    """
    idle = _IDLE.setdefault(model, [])
    try:
        mine = idle.pop()
        mine.have_ended()
    except IndexError:
        mine = Recordings(model, CpuRecordings())
    ended = False
    try:
        yield mine
    finally:
        ended = mine.have_ended()
        mine.let_go()
        if len(mine) <= MOST:
            idle.append(mine)
    if ended:
        raise RuntimeError("model: expected the same weights and modules throughout a generation, but one was replaced")

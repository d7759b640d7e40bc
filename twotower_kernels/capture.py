"""A denoiser step recorded once as a CUDA graph and replayed for every step after it.

A step of the released model is some 400 launches, which cost the host more time than the device needs for them. One
graph serves a (batch, block size, storage of keys and values), whatever the rows' lengths: these are read on the
device. Keys and values are read where they lie, so the graph is recorded anew when their storage moves, that is when it
grows. Everything small that a new state brings (lengths, indices, Mamba-2's states) is copied to where the graph reads
it, once per block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower_kernels.state import ContextState

if TYPE_CHECKING:
    from twotower_kernels.model import TwoTowerModel

Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]


def cuda_graph(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Records `call` on a device: a function that replays it, and the tensor that a replay writes."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up by a first call, not recorded
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return graph.replay, output


class CapturedDenoiser:
    """Stands for `model.denoise` on a GPU, with the same arguments and result.

    The logits it returns are overwritten by the next call with the same shapes.

    Args:
        model: a model with a denoiser.
        record: how a call is recorded, `cuda_graph` unless a test says otherwise.
    """

    def __init__(self, model: TwoTowerModel, record: Recorder = cuda_graph) -> None:
        self._model, self._record = model, record
        self._steps: dict[object, _Step] = {}

    def __call__(self, block_ids: Tensor, state: ContextState, t: Tensor | None = None) -> Tensor:
        state = state.for_denoiser
        storage = tuple(tensors[i] for tensors in (state.k, state.v) for i in tensors)
        where = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in storage)
        small = tuple(tensor.shape for tensors in (state.conv, state.ssm) for tensor in tensors.values())
        key = block_ids.shape, block_ids.dtype, t is None, state.index is None, where, small
        step = self._steps.get(key)
        if step is None:
            # Storage that moved does not come back: what was recorded for it is of no use any more.
            self._steps = {k: s for k, s in self._steps.items() if s.where == where}
            step = self._steps[key] = _Step(self._model, self._record, where, block_ids, state, t)
        return step(block_ids, state, t)


class _Step:
    """One recording, and the tensors it reads."""

    def __init__(
        self,
        model: TwoTowerModel,
        record: Recorder,
        where: object,
        block_ids: Tensor,
        state: ContextState,
        t: Tensor | None,
    ) -> None:
        self.where, self._copied = where, state
        self._ids, self._t = block_ids.clone(), None if t is None else t.clone()
        self._state = state.replaced(
            lengths=state.lengths.clone(),
            index=None if state.index is None else state.index.clone(),
            conv={i: tensor.clone() for i, tensor in state.conv.items()},
            ssm={i: tensor.clone() for i, tensor in state.ssm.items()},
        )
        self._replay, self._logits = record(lambda: model.denoise(self._ids, self._state, self._t), block_ids.device)

    def __call__(self, block_ids: Tensor, state: ContextState, t: Tensor | None) -> Tensor:
        self._ids.copy_(block_ids)
        if self._t is not None and t is not None:
            self._t.copy_(t)
        if state is not self._copied:
            mine = self._state
            mine.lengths.copy_(state.lengths)
            if mine.index is not None and state.index is not None:
                mine.index.copy_(state.index)
            for here, there in ((mine.conv, state.conv), (mine.ssm, state.ssm)):
                for i, tensor in here.items():
                    tensor.copy_(there[i])
            self._copied = state
        self._replay()
        return self._logits

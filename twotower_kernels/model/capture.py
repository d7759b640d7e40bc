"""Calls of the model recorded as CUDA graphs, and replayed whenever they come again.

A pass through a tower of the released model is some 300 launches, which cost the host more time than the device needs
for them: a denoising step, a commit, an autoregressive token. One graph serves a (batch, block size, storage of keys
and values), whatever the rows' lengths: these are read on the device. Keys and values are read and written where they
lie, so a graph is recorded anew when their storage moves, that is when it grows. Everything small that a new state
brings (lengths, indices, Mamba-2's states) is copied to where the graph reads it, once per block.

A call runs as it is when it comes for the first time, which compiles kernels and sets libraries up, and is recorded
when it comes again: a shape that comes once is not worth a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from twotower_kernels.model.state import BlockRead, ContextState

if TYPE_CHECKING:
    from twotower_kernels.model.two_tower import TwoTowerModel

T = TypeVar("T")


class Recorder(Protocol):
    """How a call on a device is recorded: a function that replays it, and the tensors that a replay writes."""

    def __call__(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]: ...


def cuda_graph(call: Callable[[], T], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], T]:
    """Records `call`, which has run before, as a CUDA graph, in memory of its own or in that of a pool. What other
    threads ask of the device meanwhile is none of the recording's business."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = call()
    return graph.replay, output


class CudaGraphs:
    """`cuda_graph`, with one pool of memory a device for all that it records.

    A recording may use again what an earlier one needs between its kernels only, so what a replay gives holds until
    any of them is replayed. With memory of their own, the recordings of a batch that shrinks from 16 rows to 1 would
    take that of 16 steps.
    """

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}

    def __call__(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return cuda_graph(call, device, self._pools[device])


class CapturedModel:
    """Stands for `denoise` and `commit` of a model on GPUs, with their arguments (but no ragged blocks) and results.

    The logits that `denoise` returns are overwritten by the next call of `denoise` or `commit`.

    Args:
        model: the model, with the tower that is called.
        record: how a call is recorded; None: by `CudaGraphs` of its own.
    """

    def __init__(self, model: TwoTowerModel, record: Recorder | None = None) -> None:
        self._model, self._record = model, record or CudaGraphs()
        self._calls: dict[_Key, _Recording[Any] | None] = {}  # None: came once

    def denoise(self, block_ids: Tensor, state: ContextState, t: Tensor | None = None) -> Tensor:
        return self._call(self._model.denoise, block_ids, state.for_denoiser, t)

    def commit(self, block_ids: Tensor, state: ContextState) -> ContextState:
        if state.mirror is not None:  # a graph of one device cannot send to another
            return self._model.commit(block_ids, state)
        return self._model.commit_by(self._read_block, block_ids, state)

    def _read_block(self, block_ids: Tensor, state: ContextState, lengths: None) -> BlockRead:
        read = self._call(self._model.read_block, block_ids, state, lengths)
        # Copies, since the next replay overwrites what this one gives.
        conv, ssm = ({i: tensor.clone() for i, tensor in part.items()} for part in (read.conv, read.ssm))
        return BlockRead(conv, ssm, read.last_hidden.clone())

    def _call(self, call: Callable[..., T], block_ids: Tensor, state: ContextState, t: Tensor | None) -> T:
        key = _Key.of(call.__name__, block_ids, state, t)
        if key not in self._calls:
            # Storage that moved does not come back: what was recorded for it is of no use any more.
            self._calls = {k: recording for k, recording in self._calls.items() if k.storage == key.storage}
            self._calls[key] = None
            return call(block_ids, state, t)
        recording = self._calls[key]
        if recording is None:
            recording = self._calls[key] = _Recording(self._record, call, block_ids, state, t)
        return recording(block_ids, state, t)


class _Key(NamedTuple):
    """What a recording holds for."""

    name: str
    ids: object
    timeless: bool  # without t
    own_rows: bool  # without an index
    storage: object
    states: object

    @classmethod
    def of(cls, name: str, ids: Tensor, state: ContextState, t: Tensor | None) -> _Key:
        storage = (tensor for tensors in (state.k, state.v) for tensor in tensors.values())
        return cls(
            name,
            (ids.shape, ids.dtype, ids.device),
            t is None,
            state.index is None,
            tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in storage),
            tuple(tensor.shape for tensors in (state.conv, state.ssm) for tensor in tensors.values()),
        )


class _Recording(Generic[T]):
    """One recording, and the tensors it reads."""

    def __init__(
        self, record: Recorder, call: Callable[..., T], ids: Tensor, state: ContextState, t: Tensor | None
    ) -> None:
        self._copied = state
        self._ids, self._t = ids.clone(), None if t is None else t.clone()
        self._state = state.replaced(
            lengths=state.lengths.clone(),
            index=None if state.index is None else state.index.clone(),
            conv={i: tensor.clone() for i, tensor in state.conv.items()},
            ssm={i: tensor.clone() for i, tensor in state.ssm.items()},
        )
        self._replay, self._result = record(lambda: call(self._ids, self._state, self._t), ids.device)

    def __call__(self, ids: Tensor, state: ContextState, t: Tensor | None) -> T:
        self._ids.copy_(ids)
        if self._t is not None and t is not None:
            self._t.copy_(t)
        if state is not self._copied:
            torch._foreach_copy_(_small(self._state), _small(state))
            self._copied = state
        self._replay()
        return self._result


def _small(state: ContextState) -> list[Tensor]:
    """What of a state is copied for a recording."""
    index = [] if state.index is None else [state.index]
    return [state.lengths, *index, *state.conv.values(), *state.ssm.values()]

"""Calls of the model recorded as CUDA graphs, and replayed whenever they come again.

A pass through a tower of the released model is some 300 launches, which cost the host more time than the device needs
for them: a denoising step, a commit, an autoregressive token. One graph serves a (batch, block size, storage of keys
and values), whatever the rows' lengths: these are read on the device. Keys and values are read and written where they
lie, so a graph is recorded anew when their storage moves, that is when it grows.

Mamba-2's states, 2 MB a layer and row, lie in one set of tensors, too, `_States`: every graph reads them there, and a
commit's graph ends by writing the new ones there, with one copy on the device. So between two calls nothing of a
context is copied, and the host's part of a call does not grow with the number of layers: it sends ids, times, and of a
new state its lengths and index.

A call runs as it is when it comes for the first time, which compiles kernels and sets libraries up, and is recorded
when it comes again: a shape that comes once is not worth a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from twotower_kernels.model.inference import inference
from twotower_kernels.model.interface import Towers
from twotower_kernels.model.state import BlockLook, BlockRead, ContextState, Memory, Scanned, newest
from twotower_kernels.model.verification import Verification

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
    """Stands for `denoise`, `commit`, `verify` and `accept` of a model on GPUs, with their arguments (but no ragged
    blocks) and results.

    The logits that `denoise` and `verify` return are overwritten by the next call of any of these. A verification may
    be accepted until the next one of a block of its shape. States are the caller's as they are the model's own: forks
    and selections stay valid whatever is committed after them.

    Args:
        model: the model, with the tower that is called.
        record: how a call is recorded; None: by `CudaGraphs` of its own.
    """

    def __init__(self, model: Towers, record: Recorder | None = None) -> None:
        self._model, self._record = model, record or CudaGraphs()
        self._calls: dict[_Key, _Recording[Any] | None] = {}  # None: came once
        self._kv_memory: Memory | None = None  # of the keys and values that the recordings are for
        self._states: _States | None = None  # that they read
        self._looks: dict[torch.Size, _Look] = {}  # per shape of a block that is verified

    @inference
    def denoise(self, block_ids: Tensor, state: ContextState, t: Tensor | None = None) -> Tensor:
        state = state.for_denoiser
        recording = self._recording("denoise", self._model.denoise, block_ids, state, t)
        return self._model.denoise(block_ids, state, t) if recording is None else recording(block_ids, state, t)

    @inference
    def commit(self, block_ids: Tensor, state: ContextState) -> ContextState:
        if state.mirror is not None:  # a graph of one device cannot send to another
            return self._model.commit(block_ids, state)
        new = self._model.commit_by(self._read_block, block_ids, state)
        if self._states is not None:
            self._states.note_reader(new)
        return new

    def _read_block(self, block_ids: Tensor, state: ContextState, lengths: None) -> BlockRead:
        recording = self._recording("commit", self._read_in_place, block_ids, state, None)
        if recording is None or self._states is None:
            return self._model.read_block(block_ids, state, lengths)
        self._states.give_up(state)
        last_hidden = recording(block_ids, state, None).clone()  # small, and the next replay overwrites it
        return self._states.lend(last_hidden)

    def _read_in_place(self, block_ids: Tensor, state: ContextState, t: None) -> Tensor:
        """`read_block`, as it is recorded: with the new states written over the old ones."""
        read = self._model.read_block(block_ids, state, None)
        _copy_all(state.conv, read.conv)
        _copy_all(state.ssm, read.ssm)
        return read.last_hidden

    @inference
    def verify(self, block_ids: Tensor, state: ContextState) -> Verification:
        if state.mirror is not None:
            return self._model.verify(block_ids, state)
        return self._model.verify_by(self._look_at_block, block_ids, state)

    def _look_at_block(self, block_ids: Tensor, state: ContextState) -> BlockLook:
        recording = self._recording("verify", self._look_in_place, block_ids, state, None)
        if recording is not None:
            return self._looks[block_ids.shape].shown(recording(block_ids, state, None))
        look = self._model.look_at_block(block_ids, state)
        if block_ids.shape not in self._looks:
            self._looks[block_ids.shape] = _Look(look)
        return look

    def _look_in_place(self, block_ids: Tensor, state: ContextState, t: None) -> Tensor:
        """`look_at_block`, as it is recorded: with what was read of the block put where a recorded `accept` reads."""
        look = self._model.look_at_block(block_ids, state)
        self._looks[block_ids.shape].copy(look)
        return look.logits

    @inference
    def accept(self, verification: Verification, lengths: Tensor) -> ContextState:
        new = self._model.accept_by(self._replay_block, verification, lengths)
        if self._states is not None:
            self._states.note_reader(new)
        return new

    def _replay_block(self, look: BlockLook, state: ContextState, lengths: Tensor) -> BlockRead:
        shape = look.hidden.shape[:2]
        kept = self._looks.get(shape)
        if kept is None or kept.hidden is not look.hidden:  # of a call that was not recorded
            return self._model.replay_block(look, state, lengths)
        if kept.latest is not look:
            raise RuntimeError(f"accept: expected the last verification of a block {list(shape)}, got an earlier one")

        def in_place(lengths: Tensor, state: ContextState, t: None) -> None:
            conv, ssm = self._model.replay_scans(kept.scanned, state, lengths)
            _copy_all(state.conv, conv)
            _copy_all(state.ssm, ssm)

        recording = self._recording(f"accept of {shape[1]}", in_place, lengths, state, None)
        if recording is None or self._states is None:
            return self._model.replay_block(look, state, lengths)
        self._states.give_up(state)
        recording(lengths, state, None)
        return self._states.lend(newest(look.hidden, lengths, state.last_hidden))

    def _recording(
        self, name: str, call: Callable[..., T], ids: Tensor, state: ContextState, t: Tensor | None
    ) -> _Recording[T] | None:
        """The recording of a call of that name, which reads this state; None for one that comes for the first time."""
        if state.kv_memory is not self._kv_memory:
            # Storage that moved does not come back: what was recorded for it is of no use any more.
            self._calls, self._states, self._kv_memory = {}, None, state.kv_memory
        key = _Key.of(name, ids, state, t)
        if key not in self._calls:
            self._calls[key] = None
            return None
        if self._states is None:
            self._states = _States(state)
        self._states.hold(state)
        recording = self._calls[key]
        if recording is None:
            recording = self._calls[key] = _Recording(self._record, call, ids, state, t, self._states)
        return recording


class _Key(NamedTuple):
    """What a recording holds for, beside one storage of keys and values, which settles the number of its rows."""

    name: str
    ids: tuple[torch.Size, torch.dtype, torch.device]
    t: tuple[torch.Size, torch.dtype] | None
    has_index: bool

    @classmethod
    def of(cls, name: str, ids: Tensor, state: ContextState, t: Tensor | None) -> _Key:
        of_t = None if t is None else (t.shape, t.dtype)
        return cls(name, (ids.shape, ids.dtype, ids.device), of_t, state.index is not None)


class _Look:
    """Where recorded verifications of blocks of one shape leave what they have read, and acceptances find it."""

    def __init__(self, like: BlockLook) -> None:
        empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
        self.hidden = empty(like.hidden)
        self.scanned = {i: Scanned(empty(xbc), empty(dt)) for i, (xbc, dt) in like.scanned.items()}
        self.latest: BlockLook | None = None  # of which the numbers here are

    def copy(self, look: BlockLook) -> None:
        self.hidden.copy_(look.hidden)
        for i, (xbc, dt) in look.scanned.items():
            self.scanned[i].xbc.copy_(xbc)
            self.scanned[i].dt.copy_(dt)

    def shown(self, logits: Tensor) -> BlockLook:
        self.latest = BlockLook(logits, self.hidden, self.scanned)
        return self.latest


class _States:
    """The tensors from which recordings read Mamba-2's states, and to which those of a commit write them.

    A state that comes from elsewhere is copied into them once. The state that a recorded commit returns has no tensors
    of its own, but these; so have its forks and selections. Before they are overwritten, who still reads them gets
    copies: in `generate` nobody does, as a commit there consumes the last state that reads them.
    """

    def __init__(self, like: ContextState) -> None:
        self.conv, self.ssm = ({i: torch.empty_like(x) for i, x in part.items()} for part in (like.conv, like.ssm))
        self._held: ReferenceType[Memory] | None = None  # what the numbers here are those of
        self._read_by: ReferenceType[Memory] | None = None  # the memory of the states that read the tensors here
        self._lent: tuple[dict[int, Tensor], ...] = ()  # the `conv` and `ssm` of these states, which share them

    def hold(self, state: ContextState) -> None:
        """Sees to it that the numbers here are this state's."""
        if self._held is not None and self._held() is state.mamba_memory:
            return
        self._move_readers()
        _copy_all(self.conv, state.conv)
        _copy_all(self.ssm, state.ssm)
        self._held = ref(state.mamba_memory)

    def give_up(self, state: ContextState) -> None:
        """Sees to it that no other state reads the tensors here, before a commit of this one overwrites them."""
        if self._read_by is None or self._read_by() is not state.mamba_memory:
            return  # `hold` has moved the others
        if state.reads_alone():
            self._held = self._read_by = ref(state.mamba_memory)
        else:
            self._move_readers()

    def lend(self, last_hidden: Tensor) -> BlockRead:
        """What a commit has left here, for the state that it returns; `note_reader` must be called with that one."""
        self._held = self._read_by = None
        self._lent = dict(self.conv), dict(self.ssm)
        return BlockRead(*self._lent, last_hidden)

    def note_reader(self, state: ContextState) -> None:
        """After each commit: whether the state that it returned reads the tensors here."""
        if self._lent and state.conv is self._lent[0]:
            self._held = self._read_by = ref(state.mamba_memory)

    def _move_readers(self) -> None:
        """Gives copies to the states that read the tensors here, if there are any."""
        if self._read_by is not None and self._read_by() is not None:
            for part in self._lent:
                part.update({i: tensor.clone() for i, tensor in part.items()})
        self._read_by, self._lent = None, ()


class _Recording(Generic[T]):
    """One recording, and the small tensors that it reads."""

    def __init__(
        self,
        record: Recorder,
        call: Callable[..., T],
        ids: Tensor,
        state: ContextState,
        t: Tensor | None,
        states: _States,
    ) -> None:
        self._copied = ref(state)
        self._ids, self._t = ids.clone(), None if t is None else t.clone()
        self._state = state.replaced(
            lengths=state.lengths.clone(),
            index=None if state.index is None else state.index.clone(),
            conv=states.conv,
            ssm=states.ssm,
        )
        self._replay, self._result = record(lambda: call(self._ids, self._state, self._t), ids.device)

    def __call__(self, ids: Tensor, state: ContextState, t: Tensor | None) -> T:
        self._ids.copy_(ids)
        if self._t is not None and t is not None:
            self._t.copy_(t)
        if self._copied() is not state:
            self._state.lengths.copy_(state.lengths)
            if self._state.index is not None and state.index is not None:
                self._state.index.copy_(state.index)
            self._copied = ref(state)
        self._replay()
        return self._result


def _copy_all(to: dict[int, Tensor], source: dict[int, Tensor]) -> None:
    """One copy for tensors of one dtype."""
    if to:
        torch._foreach_copy_(list(to.values()), [source[i] for i in to])

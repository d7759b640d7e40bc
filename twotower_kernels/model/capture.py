"""Calls of the model recorded, as CUDA graphs or as kernels on a CPU, and replayed whenever they come again.

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

On a CPU it is Python that takes longer than small kernels do, and recordings are those of `ops.recording`. They are the
same but in this: they follow keys and values to another storage, and so serve one generation after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from twotower_kernels.model.autoregression import Proposal, Sampling, next_token, propose
from twotower_kernels.model.inference import inference
from twotower_kernels.model.interface import Towers
from twotower_kernels.model.state import BlockLook, BlockRead, ContextState, Memory, Scanned, logits, newest
from twotower_kernels.model.verification import Verification
from twotower_kernels.ops.recording import CpuRecordings, Parts, Replay, may_replay

T = TypeVar("T")
WORTH_AFTER = 3  # a recording on a CPU takes as long as some thirty calls save


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


class Recordings:
    """What is recorded of one model, and what it was recorded with. It does not keep the model alive.

    Args:
        model: the model.
        record: how a call is recorded.
    """

    def __init__(self, model: Towers, record: Recorder | CpuRecordings) -> None:
        self.record = record
        self.follows_storage = isinstance(record, CpuRecordings)
        self.worth_after = WORTH_AFTER if self.follows_storage else 1  # so many calls as they are
        self.kv_memory: Memory | None = None  # of the keys and values that the recordings are for, if they follow none
        self._parts = Parts(model) if self.follows_storage and isinstance(model, nn.Module) else None
        self._watched = self._parts is not None and self._parts.watched()
        self._of_rows: dict[int, _OfRows] = {}  # by the number of storage rows
        self.looks: dict[torch.Size, _Look] = {}  # by the shape of a block that is verified

    def have_ended(self) -> bool:
        """Whether the model has other parts than when this was asked for the last time (`ops.recording.Parts`); then
        what is recorded is given up. It looks at every weight, which takes too long for every call."""
        if self._parts is None or not self._parts.changed():
            return False
        self._of_rows, self.looks, self._watched = {}, {}, self._parts.watched()
        return True

    def are_worth_it(self, calls: int, state: ContextState) -> bool:
        """Whether a call that has come so often is recorded for this state."""
        return calls >= self.worth_after and not (self.follows_storage and _has_no_room(state))

    def may_replay(self) -> bool:
        """Whether nobody wants to see the calls that a replay does not make."""
        return not self.follows_storage or (not self._watched and may_replay())

    def of(self, state: ContextState) -> _OfRows:
        """The recordings that can read this state."""
        if not self.follows_storage and state.kv_memory is not self.kv_memory:
            # Storage that moved does not come back: what was recorded for it is of no use any more.
            self._of_rows, self.kv_memory = {}, state.kv_memory
        rows = len(state.last_hidden)
        if rows not in self._of_rows:
            self._of_rows[rows] = _OfRows()
        return self._of_rows[rows]

    def __len__(self) -> int:
        return sum(len(of_rows.calls) for of_rows in self._of_rows.values())

    def let_go(self) -> None:
        """Of every context that was read or written."""
        for of_rows in self._of_rows.values():
            of_rows.let_go()


class _OfRows:
    """The recordings for states of so many storage rows."""

    def __init__(self) -> None:
        self.calls: dict[_Key, _Recording[Any] | int] = {}  # or how often one came
        self.states: _States | None = None  # that they read

    def let_go(self) -> None:
        if self.states is not None:
            self.states.let_go()
        for recording in self.calls.values():
            if isinstance(recording, _Recording):
                recording.let_go()


class CapturedModel:
    """Stands for `denoise`, `commit`, `verify` and `accept` of a model, with their arguments (but no ragged blocks) and
    results, and for `autoregression.next_token`.

    The logits that `denoise` and `verify` return are overwritten by the next call of any of these. A verification may
    be accepted until the next one of a block of its shape. States are the caller's as they are the model's own: forks
    and selections stay valid whatever is committed after them. One thread at a time.

    Args:
        model: the model, with the tower that is called.
        record: how a call is recorded; None: by `CudaGraphs` of its own.
        recordings: of this model, to go on with; None: new ones.
    """

    def __init__(
        self,
        model: Towers,
        record: Recorder | CpuRecordings | None = None,
        recordings: Recordings | None = None,
    ) -> None:
        self._model = model
        self.recordings = Recordings(model, record or CudaGraphs()) if recordings is None else recordings
        self._states: _States | None = None  # that the last recorded call has read

    @inference
    def denoise(self, block_ids: Tensor, state: ContextState, t: Tensor | None = None) -> Tensor:
        state = state.for_denoiser
        inputs = (block_ids,) if t is None else (block_ids, t)
        recording = self._recording("denoise", self._denoise, inputs, state)
        return self._model.denoise(block_ids, state, t) if recording is None else recording(inputs, state)

    def _denoise(self, state: ContextState, block_ids: Tensor, t: Tensor | None = None) -> Tensor:
        return self._model.denoise_block(block_ids.to(self._model.denoiser_device), state, t)

    @inference
    def commit(self, block_ids: Tensor, state: ContextState) -> ContextState:
        if state.mirror is not None:  # a graph of one device cannot send to another
            return self._model.commit(block_ids, state)
        return self._noted(self._model.commit_by(self._read_block, block_ids, state))

    @inference
    def next_token(
        self, token: Tensor, state: ContextState, seeds: Tensor, position: int, sampling: Sampling
    ) -> tuple[ContextState, Proposal]:
        """`autoregression.next_token`; the next call of this object overwrites all of a proposal but the token."""
        if state.mirror is not None:
            return next_token(self._model, token, state, seeds, position, sampling)
        proposals: list[Proposal] = []

        def read(ids: Tensor, state: ContextState, lengths: None) -> BlockRead:
            inputs = ids, seeds, torch.full_like(seeds, position)
            recording = self._recording("next token", self._read_and_propose, inputs, state, tuple(sampling.items()))
            if recording is None or self._states is None:
                return self._model.read_block(ids, state, lengths)
            self._states.give_up(state)
            last_hidden, proposal = recording(inputs, state)
            proposals.append(proposal._replace(token=proposal.token.clone()))
            return self._states.lend(last_hidden.clone())

        new = self._noted(self._model.commit_by(read, token, state))
        return new, proposals[0] if proposals else propose(new.next_logits()[:, None], seeds, position, sampling)

    def _read_block(self, block_ids: Tensor, state: ContextState, lengths: None) -> BlockRead:
        recording = self._recording("commit", self._read_in_place, (block_ids,), state)
        if recording is None or self._states is None:
            return self._model.read_block(block_ids, state, lengths)
        self._states.give_up(state)
        last_hidden = recording((block_ids,), state).clone()  # small, and the next replay overwrites it
        return self._states.lend(last_hidden)

    def _noted(self, new: ContextState) -> ContextState:
        if self._states is not None:
            self._states.note_reader(new)
        return new

    def _read_in_place(self, state: ContextState, block_ids: Tensor) -> Tensor:
        """`read_block`, as it is recorded: with the new states written over the old ones."""
        read = self._model.read_block(block_ids, state, None)
        _copy_all(state.conv, read.conv)
        _copy_all(state.ssm, read.ssm)
        return read.last_hidden

    def _read_and_propose(
        self, state: ContextState, token: Tensor, seeds: Tensor, position: Tensor, *sampling: tuple[str, Any]
    ) -> tuple[Tensor, Proposal]:
        last_hidden = self._read_in_place(state, token)
        assert state.head is not None  # of a model with the tower that was just run
        return last_hidden, propose(logits(last_hidden, state.head)[:, None], seeds, position, dict(sampling))

    @inference
    def verify(self, block_ids: Tensor, state: ContextState) -> Verification:
        if state.mirror is not None:
            return self._model.verify(block_ids, state)
        return self._model.verify_by(self._look_at_block, block_ids, state)

    def _look_at_block(self, block_ids: Tensor, state: ContextState) -> BlockLook:
        recording = self._recording("verify", self._look_in_place, (block_ids,), state)
        looks = self.recordings.looks
        if recording is not None:
            return looks[block_ids.shape].shown(recording((block_ids,), state))
        look = self._model.look_at_block(block_ids, state)
        if block_ids.shape not in looks:
            looks[block_ids.shape] = _Look(look)
        return look

    def _look_in_place(self, state: ContextState, block_ids: Tensor) -> Tensor:
        """`look_at_block`, as it is recorded: with what was read of the block put where a recorded `accept` reads."""
        look, looks = self._model.look_at_block(block_ids, state), self.recordings.looks
        if block_ids.shape not in looks:  # it was not called before, as a graph's calls are
            looks[block_ids.shape] = _Look(look)
        looks[block_ids.shape].copy(look)
        return look.logits

    @inference
    def accept(self, verification: Verification, lengths: Tensor) -> ContextState:
        return self._noted(self._model.accept_by(self._replay_block, verification, lengths))

    def _replay_block(self, look: BlockLook, state: ContextState, lengths: Tensor) -> BlockRead:
        shape = look.hidden.shape[:2]
        kept = self.recordings.looks.get(shape)
        if kept is None or kept.hidden is not look.hidden:  # of a call that was not recorded
            return self._model.replay_block(look, state, lengths)
        if kept.latest is not look:
            raise RuntimeError(f"accept: expected the last verification of a block {list(shape)}, got an earlier one")

        def in_place(state: ContextState, lengths: Tensor) -> None:
            conv, ssm = self._model.replay_scans(kept.scanned, state, lengths)
            _copy_all(state.conv, conv)
            _copy_all(state.ssm, ssm)

        recording = self._recording(f"accept of {shape[1]}", in_place, (lengths,), state)
        if recording is None or self._states is None:
            return self._model.replay_block(look, state, lengths)
        self._states.give_up(state)
        recording((lengths,), state)
        return self._states.lend(newest(look.hidden, lengths, state.last_hidden))

    def _recording(
        self,
        name: str,
        call: Callable[..., T],
        inputs: tuple[Tensor, ...],
        state: ContextState,
        options: tuple[Any, ...] = (),
    ) -> _Recording[T] | None:
        """The recording of a call of that name, which reads this state; None for one that has not come often enough,
        and where none may be replayed."""
        if not self.recordings.may_replay():
            return None
        of_rows, record = self.recordings.of(state), self.recordings.record
        key = _Key(name, tuple((x.shape, x.dtype, x.device) for x in inputs), _kind(state), options)
        recording = of_rows.calls.get(key, 0)
        if isinstance(recording, int) and not self.recordings.are_worth_it(recording, state):
            of_rows.calls[key] = recording + 1
            return None
        if of_rows.states is None:
            of_rows.states = _States(state)
        self._states = of_rows.states
        self._states.hold(state)
        if isinstance(recording, int):
            recording = of_rows.calls[key] = _Recording(record, call, inputs, state, self._states, options)
        return recording


class _Key(NamedTuple):
    """What a recording holds for, beside the number of storage rows and, on a GPU, one storage of keys and values."""

    name: str
    inputs: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    state: tuple[bool, int]
    options: tuple[Any, ...]


def _kind(state: ContextState) -> tuple[bool, int]:
    """What of a state is part of a recording: whether it has an index, and which head it has."""
    return state.index is not None, id(state.head)


def _has_no_room(state: ContextState) -> bool:
    """Whether its keys and values have no memory yet, so that nobody can say where they lie."""
    return any(k.numel() == 0 for k in state.k.values())


class _Look:
    """Where recorded verifications of blocks of one shape leave what they have read, and acceptances find it."""

    def __init__(self, like: BlockLook) -> None:
        make = partial(torch.empty_like, memory_format=torch.contiguous_format)
        self.hidden = make(like.hidden)
        self.scanned = {i: Scanned(make(xbc), make(dt)) for i, (xbc, dt) in like.scanned.items()}
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

    def let_go(self) -> None:
        """Whatever is held here is nobody's from now on; who still reads it gets a copy."""
        self._move_readers()
        self._held = None

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
        record: Recorder | CpuRecordings,
        call: Callable[..., T],
        inputs: tuple[Tensor, ...],
        state: ContextState,
        states: _States,
        options: tuple[Any, ...],
    ) -> None:
        self._copied: ReferenceType[ContextState] | None = ref(state)
        self._inputs = [tensor.clone() for tensor in inputs]
        self._state = state.replaced(
            lengths=state.lengths.clone(),
            index=None if state.index is None else state.index.clone(),
            conv=states.conv,
            ssm=states.ssm,
        )
        self._kv_memory: Memory | None = state.kv_memory
        of = partial(call, self._state, *self._inputs, *options)
        self.replay: Callable[[], None]
        if isinstance(record, CpuRecordings):
            self.replay, self._result = record(of, [*state.k.values(), *state.v.values()])
        else:
            self.replay, self._result = record(of, inputs[0].device)

    def __call__(self, inputs: tuple[Tensor, ...], state: ContextState) -> T:
        for mine, tensor in zip(self._inputs, inputs, strict=True):
            mine.copy_(tensor)
        if self._copied is None or self._copied() is not state:
            self._state.lengths.copy_(state.lengths)
            if self._state.index is not None and state.index is not None:
                self._state.index.copy_(state.index)
            self._copied = ref(state)
        if isinstance(self.replay, Replay) and self._kv_memory is not state.kv_memory:
            self._state.k, self._state.v, self._kv_memory = state.k, state.v, state.kv_memory
            self.replay.move_storage([*state.k.values(), *state.v.values()])
        self.replay()
        return self._result

    def let_go(self) -> None:
        """Of the state that was read last. Only for a recording that follows storage: it must be told of another."""
        self._state.k, self._state.v, self._kv_memory, self._copied = {}, {}, None, None


def _copy_all(to: dict[int, Tensor], source: dict[int, Tensor]) -> None:
    """One copy for tensors of one dtype."""
    if to:
        torch._foreach_copy_(list(to.values()), [source[i] for i in to])

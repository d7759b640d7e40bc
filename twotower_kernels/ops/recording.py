"""A step on a CPU, recorded: its calls of kernels noted once, and run again by one call into C++ (`csrc/recording.h`).

While a step is recorded nothing is computed. Python runs as ever, and whatever it asks of PyTorch or of our operators
passes by here:

* Our operators' kernels are noted, with pointers to where their tensors lie. Memory for results comes from a pool that
  the recording keeps; what Python has let go of is used again, as it was when the step ran.
* Copies, casts to wider numbers and the rows of an embedding are noted as kernels of ours, too.
* Views say where something lies, and have done so when they are made.
* What depends on nothing that a call may change, such as `arange`, is computed now and kept.
* A few elementwise operations of PyTorch stay PyTorch's (`ELEMENTWISE`): a replay calls them between kernels.
* Anything else is refused, by its name: a recording is exact or there is none.

What tensors hold is not looked at, neither when recording, as it is not there yet, nor in a replay: who replays sees to
it that lengths and indices are in range. Ids of embeddings and plans of experts are checked by each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from twotower_kernels import cpu
from twotower_kernels.ops import _direct

T = TypeVar("T")
aten = torch.ops.aten

ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
CONSTANTS = {  # they read nothing but shapes of the tensors that they are given
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.new_full.default,
}
ELEMENTWISE = {  # and what a replay calls instead
    aten.add.Tensor: aten.add.out,
    aten.cat.default: aten.cat.out,
    aten.cos.default: aten.cos.out,
    aten.mul.Tensor: aten.mul.out,
    aten.silu.default: aten.silu.out,
    aten.sin.default: aten.sin.out,
}
IN_PLACE = {aten.relu_.default, aten.pow_.Scalar}
LOOKS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
WIDER = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}  # casts that a kernel of ours makes


class Replay:
    """A recorded step: call it to run it again."""

    def __init__(self, storage: Sequence[Tensor]) -> None:
        self.calls = cpu.kernels().Recording()
        self._parts: list[Callable[[], Any]] = []
        self._noted = 0  # calls that the parts have
        self._kept: list[Any] = []
        for tensor in storage:
            self.calls.add_storage(tensor)

    def __call__(self) -> None:
        for part in self._parts:
            part()

    def move_storage(self, storage: Sequence[Tensor]) -> None:
        """From now on these tensors are read and written, in the place of those that were given when it was recorded:
        of the same dtypes and with the same numbers in a row."""
        for number, tensor in enumerate(storage):
            self.calls.move_storage(number, tensor)

    def add_part(self, part: Callable[[], Any]) -> None:
        """Something to run behind the kernels that are noted so far."""
        self.end_part()
        self._parts.append(part)

    def end_part(self) -> None:
        first, last = self._noted, len(self.calls)
        if last > first:
            run = self.calls.run
            self._parts.append(lambda: run(first, last))
        self._noted = last

    def keep(self, owner: Any) -> None:
        self._kept.append(owner)


class CpuRecordings:
    """Records steps; they share the memory that lies between their kernels. So only one of them may run at a time."""

    def __init__(self) -> None:
        self._pool = _Pool()

    def __call__(self, call: Callable[[], T], storage: Sequence[Tensor] = ()) -> tuple[Replay, T]:
        """A replay of `call`, and its result, whose tensors every replay writes.

        Args:
            call: a step. It must not depend on what tensors hold in any way but by computing with them.
            storage: tensors that may be replaced later, `Replay.move_storage`; their views must not be read.

        Raises:
            NotImplementedError: the step asks for an operation that cannot be recorded.
        """
        replay = Replay(storage)
        tape = _Tape(replay, self._pool, storage)
        replay.calls.begin()
        try:
            with _NobodyLooks(), tape:
                output = call()
        finally:
            replay.calls.end()
        replay.end_part()
        replay.keep(self._pool)
        return replay, output


class Parts:
    """The parts of a module, as recordings have them: its modules, and its parameters by the places where they lie.

    What is written to a parameter, a replay reads. Who puts another tensor in its place, or another module in a
    module's, or moves a tensor to other memory, changes the parts; so does a hook.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)  # which keeps its recordings alive, so they must not keep it
        self._look(module)

    def _look(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._hooks = [d for part in parts for d in (part._forward_hooks, part._forward_pre_hooks)]
        named = [d for part in parts for d in (part._parameters, part._buffers, part._modules)]
        self._places = cpu.kernels().Places([*named, *self._hooks])

    def changed(self) -> bool:
        """Whether they have changed since this was asked for the last time."""
        module = self._module()
        if module is None or not self._places.changed():
            return False
        self._look(module)
        return True

    def watched(self) -> bool:
        """Whether anybody sees the modules' calls, which a replay does not make."""
        return any(self._hooks)


def may_replay() -> bool:
    """Whether a replay and what it stands for are the same thing now: not where something sees or changes the calls of
    operations, as a profiler, a mode, or another kernel laid over one of ours (`_direct.off`)."""
    answer: bool = _direct.entries().is_open()
    return answer


class _Pool:
    """Memory for results. A piece is free as soon as no tensor lies in it any more."""

    def __init__(self) -> None:
        self._pieces: list[tuple[torch.UntypedStorage, StorageWeakRef]] = []

    def tensor(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the same dtype, sizes and strides."""
        if like.device.type != "cpu":
            raise NotImplementedError(f"recording: expected tensors on the CPU, got one on {like.device}")
        size = like.untyped_storage().nbytes()
        return torch.empty(0, dtype=like.dtype).set_(self._storage(size), 0, like.shape, like.stride())

    def _storage(self, size: int) -> torch.UntypedStorage:
        fitting = [
            (piece.nbytes(), n)
            for n, (piece, used) in enumerate(self._pieces)
            if size <= piece.nbytes() <= 2 * size and used.expired()
        ]
        if fitting:
            n = min(fitting)[1]
            piece = self._pieces.pop(n)[0]
        else:
            piece = torch.empty((size + 63) // 64 * 64, dtype=torch.uint8).untyped_storage()
        lent = piece[0:size]  # a storage of its own, so that its end is seen
        self._pieces.append((piece, StorageWeakRef(lent)))
        return lent


class _NobodyLooks(TorchFunctionMode):
    """Refuses what hands a tensor's numbers to Python without an operation that the tape would see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            raise NotImplementedError(f"recording: {func.__name__} looks at numbers that are not there yet")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    def __init__(self, replay: Replay, pool: _Pool, storage: Sequence[Tensor]) -> None:
        super().__init__()
        self._replay, self._pool = replay, pool
        self._constant: set[int] = set()  # storages; kept, so that no other gets their names
        self._known = {_name_of(tensor) for tensor in storage}  # storages that are kept, or must not be

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "twotower":
            return self._kernel(func._schema.name.split("::")[1], args)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if _is_view(func):
            return func(*args, **kwargs)
        if func in ALLOCATIONS:
            return self._new(func(*args, **kwargs))
        given = _tensors((*args, *kwargs.values()))
        if func in CONSTANTS or (given and self._are_constant(given) and _is_function(func)):
            return self._keep_constant(func(*args, **kwargs))
        if func is aten.embedding.default:
            return self._embedding(*args)
        if func is aten.clone.default:
            return self._copied(args[0], func(*args, **kwargs))
        if func is aten._to_copy.default:
            return self._copied(args[0], func(*args, **kwargs))
        if func is aten.copy_.default:
            return self._copy(args[1], args[0])
        if func is aten._foreach_copy_.default:
            for to, source in zip(*args[:2], strict=True):
                self._copy(source, to)
            return None
        if func in ELEMENTWISE:
            return self._elementwise(func, args, kwargs)
        if func in IN_PLACE:
            self._replay.add_part(lambda: func(*args, **kwargs))
            return args[0]
        raise NotImplementedError(f"recording: {func} is an operation of PyTorch that a recording does not know")

    def _kernel(self, name: str, args: tuple[Any, ...]) -> Any:
        self._keep(*_tensors(args))
        written = [args[n] for n in _direct.WRITTEN.get(name, ())]
        if any(self._are_constant([tensor]) for tensor in written):
            raise NotImplementedError(f"recording: {name} writes to a tensor that the step made of nothing else")
        noted = len(self._replay.calls)
        with self:
            results = _direct.KERNELS[name](*args)
        if len(self._replay.calls) == noted:
            raise NotImplementedError(f"recording: {name} called no kernel that is noted")
        return results

    def _embedding(self, table: Tensor, ids: Tensor, *_: Any) -> Tensor:
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            raise NotImplementedError(f"recording: expected contiguous int64 ids, got {ids.dtype} {ids.stride()}")
        self._keep(table, ids)
        out = self._new(table.new_empty((*ids.shape, table.shape[1])))
        cpu.call("gather_rows", table, ids.view(-1), out.view(-1, table.shape[1]))
        return out

    def _copied(self, source: Tensor, like: Tensor) -> Tensor:
        """A copy of the layout and dtype of another tensor."""
        return self._copy(source, self._new(like))

    def _copy(self, source: Tensor, to: Tensor) -> Tensor:
        self._keep(source, to)
        if to.dtype == source.dtype or (source.dtype, to.dtype) in WIDER:
            cpu.call("copy_numbers", source.expand(to.shape), to)
        else:
            self._replay.add_part(lambda: to.copy_(source))
        return to

    def _elementwise(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = func(*args, **kwargs)  # of whatever lies there now: for its shape
        again = ELEMENTWISE[func]
        self._replay.add_part(lambda: again(*args, **kwargs, out=out))
        return out

    def _are_constant(self, tensors: list[Tensor]) -> bool:
        return all(_name_of(tensor) in self._constant for tensor in tensors)

    def _keep_constant(self, tensor: Tensor) -> Tensor:
        self._keep(tensor)
        self._constant.add(_name_of(tensor))
        return tensor

    def _new(self, like: Tensor) -> Tensor:
        """An uninitialised tensor, of which the pool hears when it is let go."""
        tensor = self._pool.tensor(like)
        self._known.add(_name_of(tensor))
        return tensor

    def _keep(self, *tensors: Tensor) -> None:
        """Whatever is not the pool's: a kernel is told where it lies."""
        for tensor in tensors:
            if (name := _name_of(tensor)) not in self._known:
                self._known.add(name)
                self._replay.keep(tensor.untyped_storage())


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """Those that an operation is given, alone or in lists."""
    lists = (a if isinstance(a, (list, tuple)) else (a,) for a in arguments)
    return [a for each in lists for a in each if isinstance(a, Tensor)]


def _name_of(tensor: Tensor) -> int:
    """Of its storage, as long as that lives."""
    return tensor.untyped_storage()._cdata


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others, whatever the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _is_function(func: Any) -> bool:
    """Whether an operation gives the same for the same, and changes nothing."""
    return not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation's results are parts of what it is given."""
    if func is aten._unsafe_view.default:  # of a copy that nothing else knows; its schema calls it new
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

"""What the context tower leaves behind for the denoiser and for itself: an argument and a result, never a hidden cache.

Keys and values are stored with room to spare and appended to in place; the room grows geometrically, so a context of n
tokens is copied O(1) times per token. A state that was selected or forked from another one reads that one's storage
through an index, without a copy, until it is committed to: dropping rows or sampling many continuations of one context
costs nothing in the denoiser's steps.

A denoiser on another device than the context tower reads a mirror: the same context in storage of its own device. Every
commit sends it the new tokens' keys and values and the Mamba-2 states; what it already has is never sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from twotower_kernels.model.cache import Cache, KVCache, MambaCache
from twotower_kernels.model.inference import inference
from twotower_kernels.ops import append_kv
from twotower_kernels.ops.linear import linear
from twotower_kernels.options.arguments import Integers, integers, readable, whole

_SPARE = 64  # tokens of room to spare at least


class Memory:
    """Stands for tensors that several states may read. It is the same object as long as they are the same tensors, so
    that comparing two states' memory costs one comparison, and it is alive as long as a state reads them.

    Args:
        some_of: the memory that some of these tensors are of, and that is therefore alive as well.
    """

    def __init__(self, some_of: Memory | None = None) -> None:
        self.some_of = some_of


@dataclass(eq=False, repr=False)
class ContextState:
    """The context of B rows. `lengths`, `logits`, `batch_size`, `select` and `fork` are for everyone; the rest is the
    model's own. `TwoTowerModel.commit` consumes a state: any later use of it is a RuntimeError.

    lengths: `[B]` int64, committed tokens of each row.
    k, v: per attention layer, `[R, T, Hkv, D]`, T at least the longest length; beyond a row's length unspecified.
    conv, ssm: per Mamba-2 layer, `[R, C, width-1]` and `[R, heads, head_dim, state]` (float32, or float64).
    last_hidden: `[R, H]`, what the context tower's head reads: the last token's output.
    head: `[V, H]`, that head's weight; None for a model without context tower.
    index: `[B]` int64, the storage row of each row; None: its own, R = B.
    longest: at least the longest length, known without asking the device.
    mirror: the same context on the denoiser's device; None: it is this one's.
    kv_memory, mamba_memory: the identity of the tensors of `k` and `v`, and of those of `conv` and `ssm`.
    """

    lengths: Tensor
    k: dict[int, Tensor]
    v: dict[int, Tensor]
    conv: dict[int, Tensor]
    ssm: dict[int, Tensor]
    last_hidden: Tensor
    head: Tensor | None
    index: Tensor | None
    longest: int
    mirror: ContextState | None = None
    kv_memory: Memory = field(default_factory=Memory)
    mamba_memory: Memory = field(default_factory=Memory)

    def __getattr__(self, name: str) -> Any:  # reached only by what is not there: everything, once consumed
        if name.startswith("__") or self.__dict__:
            raise AttributeError(f"ContextState has no attribute {name!r}")
        raise RuntimeError(
            f"state.{name}: this state was consumed by commit, expected the state that commit returned; "
            "to continue one context in several ways, fork it before"
        )

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    @inference
    def logits(self) -> Tensor:
        """Next-token logits of the context tower, `[B, V]` float32 (float64), computed when asked for.

        Raises:
            ValueError: a row has no token yet. RuntimeError: the state of a model without context tower.
        """
        if self.head is not None and not torch.compiler.is_compiling() and bool((self.lengths == 0).any()):
            lengths = self.lengths.tolist()  # a trace cannot look
            raise ValueError(f"state.logits: expected at least one token in every row, got lengths {lengths}")
        return self.next_logits()

    def select(self, rows: Integers) -> ContextState:
        """Some rows, in the order given, repeated where repeated. Nothing of the context is copied until a commit.

        Args:
            rows: indices `[N]` of any integer dtype, those below zero counted from the end; or a boolean mask `[B]`.
                A tensor, an array or a list.

        Raises:
            TypeError: neither integers nor booleans. ValueError: not one-dimensional, a mask of another length.
            IndexError: no such row. A GPU does not wait to look at what a tensor there holds.
        """
        return self._selected(self._checked_rows(rows))

    @inference
    def _selected(self, rows: Tensor) -> ContextState:
        """`select`, of rows that are there."""
        rows = rows.to(self.lengths.device)
        storage_rows = torch.arange(self.batch_size, device=rows.device) if self.index is None else self.index
        if self.mirror is None:
            return self.replaced(lengths=self.lengths[rows], index=storage_rows[rows])
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]  # counted on one device alone
        return self.replaced(lengths=self.lengths[rows], index=storage_rows[rows], mirror=self.mirror._selected(rows))

    def fork(self, n: int) -> ContextState:
        """n copies of every row, next to each other: n continuations of each context. The original stays usable.

        Raises:
            ValueError: n below 1.
        """
        n = whole("fork", n, "a number of copies")
        if n < 1:
            raise ValueError(f"fork: expected at least 1 copy, got {n}")
        return self._selected(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(n))

    def _checked_rows(self, rows: Integers) -> Tensor:
        """int64 indices, or a mask of the batch's length."""
        found, batch = integers("rows", rows), self.batch_size
        if found.ndim != 1:
            raise ValueError(f"rows: expected [N] indices or a [B] mask, got shape {list(found.shape)}")
        if found.dtype == torch.bool:
            if len(found) != batch:
                raise ValueError(f"rows: expected a mask of {batch} rows, got one of {len(found)}")
        elif found.dtype != torch.int64:
            raise TypeError(f"rows: expected integers or booleans, got {found.dtype}")
        elif readable(found):
            wrong = found[(found < -batch) | (found >= batch)]
            if len(wrong):
                raise IndexError(f"rows: expected rows of {batch}, got {int(wrong[0])}")
        return found

    # --- for the model ----------------------------------------------------------------------------------------------

    def next_logits(self) -> Tensor:
        """`logits`, without asking the device whether every row has a token."""
        if self.head is None:
            raise RuntimeError("state.logits: expected a model with a context tower, got one with the denoiser alone")
        return logits(self._gathered(self.last_hidden), self.head)

    @property
    def for_denoiser(self) -> ContextState:
        """This context where the denoiser reads it."""
        return self.mirror or self

    def read_by(self, layer: int) -> Cache:
        """What a layer of the denoiser reads."""
        if layer in self.conv:
            return MambaCache(self.conv[layer], self.ssm[layer], self.index)
        if layer in self.k:
            return KVCache(self.k[layer], self.v[layer], self.lengths, self.index)
        return None

    def extended_by(self, layer: int, block_lens: Tensor | None) -> Cache:
        """What a layer of the context tower reads, and where it leaves a block of which so many tokens count."""
        if layer in self.conv:
            return MambaCache(self.conv[layer], self.ssm[layer], None, block_lens, return_state=True)
        if layer in self.k:
            append = partial(self.append, layer, lengths=block_lens)
            return KVCache(self.k[layer], self.v[layer], self.lengths, None, block_lens, True, append)
        return None

    def looked_into_by(self, layer: int, scanned: dict[int, Scanned]) -> Cache:
        """What a layer of the context tower reads for a block of which it is not known yet how many tokens will count:
        keys and values are left behind the context, what Mamba-2 scanned is put into `scanned`."""
        if layer in self.conv:  # with states, although nobody reads them: a CPU then scans token by token, as one alone
            keep = partial(_put, scanned, layer)
            return MambaCache(self.conv[layer], self.ssm[layer], None, None, return_state=True, keep=keep)
        return self.extended_by(layer, None)

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        """Writes a block's keys and values `[B, S, Hkv, D]` behind those of an attention layer, and in the mirror.

        There must be room. They count once `advanced` says so.
        """
        append_kv(self.k[layer], self.v[layer], k, v, self.lengths, block_lens=lengths)
        if self.mirror is not None:
            device = self.mirror.lengths.device
            self.mirror.append(layer, k.to(device), v.to(device), None if lengths is None else lengths.to(device))

    def advanced(self, size: int, lengths: Tensor | None, read: BlockRead) -> ContextState:
        """This state, and its mirror, after a block `[B, size]` of which `lengths` tokens count (None: all): with what
        `read` has from there. Its keys and values are appended already."""
        mirror = self.mirror
        if mirror is not None:
            device = mirror.lengths.device
            mirror = mirror.advanced(size, None if lengths is None else lengths.to(device), read.to(device))
        return self.replaced(
            lengths=self.lengths + (size if lengths is None else lengths),
            conv=read.conv,
            ssm=read.ssm,
            last_hidden=read.last_hidden,
            longest=self.longest + size,
            mirror=mirror,
        )

    def room_for(self, tokens: int) -> ContextState:
        """This state with storage of its own, and room for so many more tokens in every row. Consumes nothing."""
        capacity = min([1 << 62, *(k.shape[1] for k in self.k.values())])
        if self.index is None and self.longest + tokens <= capacity:
            return self
        # `longest` is a bound. Before the storage is moved, which is rare, ask the device; a trace cannot.
        longest = self.longest
        if not torch.compiler.is_compiling():
            longest = int(self.lengths.max()) if self.batch_size else 0
        if self.index is None and longest + tokens <= capacity:
            return self.replaced(longest=longest)
        return self._moved(longest, longest + tokens)

    def replaced(self, **changed: Any) -> ContextState:
        """Another state with some fields changed, which shares the storage of this one."""
        if "k" in changed or "v" in changed:
            changed["kv_memory"] = Memory()
        if "conv" in changed or "ssm" in changed:
            both = "conv" in changed and "ssm" in changed
            changed["mamba_memory"] = Memory(None if both else self.mamba_memory)
        return ContextState(**{f.name: getattr(self, f.name) for f in fields(self)} | changed)

    def reads_alone(self) -> bool:
        """Whether no other state reads these tensors of `conv` and `ssm`. If none does, their memory is a new one."""
        reference = ref(self.mamba_memory)
        del self.mamba_memory
        self.mamba_memory = reference() or Memory()  # alive, if another state holds it
        return reference() is None

    def consume(self) -> None:
        """Makes any later use an error: its storage now belongs to the state that commit returned."""
        for f in fields(self):  # one by one, which a trace can follow
            delattr(self, f.name)

    def _moved(self, longest: int, needed: int) -> ContextState:
        """In storage of its own with room for `needed` tokens and some to spare; and so the mirror, on its device."""

        def moved(storage: Tensor) -> Tensor:  # [R, T, Hkv, D] -> [B, needed and spare, Hkv, D]
            fresh = storage.new_empty(self.batch_size, needed + needed // 2 + _SPARE, *storage.shape[2:])
            used = storage[:, :longest]
            fresh[:, :longest] = used if self.index is None else used.index_select(0, self.index)
            return fresh

        return self.replaced(
            k={i: moved(k) for i, k in self.k.items()},
            v={i: moved(v) for i, v in self.v.items()},
            conv={i: self._gathered(conv) for i, conv in self.conv.items()},
            ssm={i: self._gathered(ssm) for i, ssm in self.ssm.items()},
            last_hidden=self._gathered(self.last_hidden),
            index=None,
            longest=longest,
            mirror=self.mirror and self.mirror._moved(longest, needed),
        )

    def _gathered(self, storage: Tensor) -> Tensor:
        """[R, ...] to [B, ...]: the storage row of each row."""
        return storage if self.index is None else storage.index_select(0, self.index)


class Scanned(NamedTuple):
    """What the scan of a Mamba-2 layer has read of a block."""

    xbc: Tensor  # [B, S, C]
    dt: Tensor  # [B, S, heads]


def _put(scanned: dict[int, Scanned], layer: int, xbc: Tensor, dt: Tensor) -> None:
    scanned[layer] = Scanned(xbc, dt)


class BlockLook(NamedTuple):
    """What the context tower has made of a block of which it is not known yet how many tokens count."""

    logits: Tensor  # [B, S, V] float32 (float64), of the token behind each position
    hidden: Tensor  # [B, S, H], what the head has read
    scanned: dict[int, Scanned]  # per Mamba-2 layer


class BlockRead(NamedTuple):
    """What the context tower leaves behind a block, beside keys and values; the names mean what they do in a state."""

    conv: dict[int, Tensor]
    ssm: dict[int, Tensor]
    last_hidden: Tensor

    def to(self, device: torch.device) -> BlockRead:
        conv, ssm = ({i: tensor.to(device) for i, tensor in part.items()} for part in (self.conv, self.ssm))
        return BlockRead(conv, ssm, self.last_hidden.to(device))


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """The head's product, rounded to its dtype as in training, then float32 (float64 stays)."""
    out = linear(hidden, head)
    return out if out.dtype == torch.float64 else out.float()


def newest(hidden: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """Of each row of a block [B, S, H] the last token that counts, [B, H]; where none does, what was there before."""
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
    return torch.where(lengths[:, None] > 0, hidden.gather(1, last)[:, 0], before)

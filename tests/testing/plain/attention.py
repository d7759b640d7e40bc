"""The attention ops as short programs, each step a method: what is right here is made wrong, step by step, in
`tests/testing/wrong/attention.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number(value: Any, row: int, default: int) -> int:
    """A length of one batch row: given for all rows, for each, or not at all."""
    if value is None:
        return default
    value = torch.as_tensor(value)
    return int(value[row] if value.ndim else value)


class Attention:
    """`block_attention`, row by row: the visible keys are copied together, then it is one softmax."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_context: Tensor | None = None,
        v_context: Tensor | None = None,
        *,
        context_lens: Any = None,
        context_starts: Any = None,
        context_index: Tensor | None = None,
        block_table: Tensor | None = None,
        block_lens: Any = None,
        causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        out, lse = self.results(q, v)
        for row in range(len(q)):
            real = self.block_length(block_lens, row, q.shape[1])
            keys, values, seen = [k[row, :real]], [v[row, :real]], [self.own(real, causal, q.device)]
            if k_context is not None and v_context is not None:
                start, stop = self.context_range(k_context, block_table, context_lens, context_starts, window, row)
                source = self.context_row(context_index, row, len(k_context if block_table is None else block_table))
                for parts, storage in ((keys, k_context), (values, v_context)):
                    parts.insert(0, self.read(storage, block_table, source, start, stop))
                seen.insert(0, q.new_ones(real, len(keys[0]), dtype=torch.bool))
            together = torch.cat(keys), torch.cat(values), torch.cat(seen, 1)
            out[row, :real], lse[row, :real] = self.attend(q[row, :real], *together, scale, softcap, sinks)
        return (out, lse) if return_lse else out

    def results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries beyond a length: 0, and -inf."""
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=self.wide(q))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse

    def wide(self, q: Tensor) -> torch.dtype:
        return torch.float64 if q.dtype == torch.float64 else torch.float32

    # --- who sees what ------------------------------------------------------------------------------------------------

    def block_length(self, lens: Any, row: int, length: int) -> int:
        return number(lens, row, length)

    def own(self, real: int, causal: bool, device: torch.device) -> Tensor:
        """The block's own keys that each of its queries sees, bool [m, m]."""
        seen = torch.ones(real, real, dtype=torch.bool, device=device)
        return seen.tril() if causal else seen

    def capacity(self, storage: Tensor, table: Tensor | None) -> int:
        return storage.shape[1] if table is None else table.shape[1] * storage.shape[1]

    def context_range(
        self, storage: Tensor, table: Tensor | None, lens: Any, starts: Any, window: int | None, row: int
    ) -> tuple[int, int]:
        stop, start = number(lens, row, self.capacity(storage, table)), number(starts, row, 0)
        return (start if window is None else max(start, stop - window)), stop

    def context_row(self, index: Tensor | None, row: int, rows: int) -> int:
        if index is not None:
            return int(index[row])
        return row if rows > 1 else 0

    def read(self, storage: Tensor, table: Tensor | None, row: int, start: int, stop: int) -> Tensor:
        """Tokens start to stop of a context, [t, Hkv, D]."""
        if table is None:
            return storage[row, start:stop]
        page = storage.shape[1]
        first, last = start // page, -(-stop // page)
        if start >= stop:
            return storage.reshape(-1, *storage.shape[2:])[:0]
        return storage[table[row, first:last].long()].flatten(0, 1)[start - first * page : stop - first * page]

    # --- the sums -----------------------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q [m, Hq, D], k and v [t, Hkv, D], seen [m, t]: out [m, Hq, Dv], log-sum-exp [m, Hq]."""
        wide, heads = self.wide(q), self.key_heads(q.shape[1], k.shape[1]).to(q.device)
        k, v = k[:, heads].to(wide), v[:, heads].to(wide)  # [t, Hq, D]
        logits = self.products(q.to(wide), k) * (self.default_scale(q.shape[2]) if scale is None else scale)
        logits = self.capped(logits, softcap) if softcap else logits
        logits = logits.masked_fill(~seen[None], -torch.inf)  # [Hq, m, t]
        if sinks is not None:
            logits = torch.cat([logits, self.sink(sinks.to(wide), q)[:, None, None].expand(-1, len(q), 1)], 2)
        weights, lse = self.softmax(logits, q.dtype)
        return torch.einsum("hmt,thd->mhd", weights[..., : len(v)], v).to(q.dtype), lse.T

    def key_heads(self, heads: int, kv_heads: int) -> Tensor:
        """The key head of each query head."""
        return torch.arange(heads) // (heads // kv_heads)

    def default_scale(self, head_dim: int) -> float:
        return head_dim**-0.5

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("mhd,thd->hmt", q, k)

    def capped(self, logits: Tensor, softcap: float) -> Tensor:
        return softcap * torch.tanh(logits / softcap)

    def sink(self, sinks: Tensor, q: Tensor) -> Tensor:
        return sinks

    def softmax(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights [Hq, m, t] and log-sum-exp [Hq, m] of logits of which a row may be -inf throughout, or have none.
        dtype: of the queries."""
        if not logits.shape[2]:
            return logits, logits.new_full(logits.shape[:2], -torch.inf)
        largest = logits.amax(2, keepdim=True)
        weights = (logits - largest.masked_fill(largest.isneginf(), 0)).exp()
        total = weights.sum(2, keepdim=True)
        lse = (largest + total.log()).squeeze(2)
        return weights / total.masked_fill(total == 0, 1), lse


class ContextAttention(Attention):
    """`context_attention`: each query of the block sees one range of the context."""

    def __call__(  # type: ignore[override]
        self,
        q: Tensor,
        k_context: Tensor,
        v_context: Tensor,
        *,
        context_lens: Any = None,
        context_starts: Any = None,
        context_index: Tensor | None = None,
        block_table: Tensor | None = None,
        block_lens: Any = None,
        causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        out, lse = self.results(q, v_context)
        for row in range(len(q)):
            real = self.block_length(block_lens, row, q.shape[1])
            first, stop = self.context_range(k_context, block_table, context_lens, context_starts, None, row)
            source = self.context_row(context_index, row, len(k_context if block_table is None else block_table))
            last = self.last(real, stop, causal, q.device)
            oldest = first if window is None else max(first, self.oldest(last, window, stop))
            keys, values = (self.read(x, block_table, source, oldest, stop) for x in (k_context, v_context))
            position = torch.arange(oldest, oldest + len(keys), device=q.device)
            seen = position <= last[:, None]
            if window is not None:
                seen = self.within(seen, position, last, window)
            out[row, :real], lse[row, :real] = self.attend(q[row, :real], keys, values, seen, scale, softcap, sinks)
        return (out, lse) if return_lse else out

    def last(self, real: int, stop: int, causal: bool, device: torch.device) -> Tensor:
        """The last position that each query sees, [m]."""
        if not causal:
            return torch.full((real,), stop - 1, device=device)
        return torch.arange(stop - real, stop, device=device)

    def oldest(self, last: Tensor, window: int, stop: int) -> int:
        """The first position that any query sees within the window."""
        return int(last.min()) - window + 1 if len(last) else stop

    def within(self, seen: Tensor, position: Tensor, last: Tensor, window: int) -> Tensor:
        return seen & (position > last[:, None] - window)


class BlockCausalAttention(Attention):
    """`block_causal_attention`: the mask of whole blocks."""

    def __call__(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_size: int,
        *,
        seq_lens: Any = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        out, lse = self.results(q, v)
        for row in range(len(q)):
            real = self.block_length(seq_lens, row, q.shape[1])
            block = self.block_of(torch.arange(real, device=q.device), block_size, real)
            seen = self.sees(block[:, None], block)
            args = q[row, :real], k[row, :real], v[row, :real], seen, scale, softcap, sinks
            out[row, :real], lse[row, :real] = self.attend(*args)
        return (out, lse) if return_lse else out

    def block_of(self, position: Tensor, block_size: int, real: int) -> Tensor:
        return position // block_size

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return key <= query


class Merge:
    """`merge_attention`."""

    def __call__(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        lse_a, lse_b = (self.mark_empty(x) for x in (lse_a, lse_b))
        largest = self.largest(lse_a, lse_b)
        a, b = (lse_a - largest).exp(), (lse_b - largest).exp()
        total = a + b
        wide = [self.without_empty(x.to(lse_a.dtype), lse) for x, lse in ((out_a, lse_a), (out_b, lse_b))]
        return self.weigh(*wide, *self.shares(a, b, total)).to(out_a.dtype), largest + total.log()

    def mark_empty(self, lse: Tensor) -> Tensor:
        """FlashAttention writes +inf where there is no key."""
        return lse.masked_fill(lse.isposinf(), -torch.inf)

    def largest(self, lse_a: Tensor, lse_b: Tensor) -> Tensor:
        larger = torch.maximum(lse_a, lse_b)
        return larger.masked_fill(larger.isneginf(), 0)

    def without_empty(self, out: Tensor, lse: Tensor) -> Tensor:
        """An empty side may hold anything."""
        return out.masked_fill(lse.isneginf()[..., None], 0)

    def shares(self, a: Tensor, b: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total = total.masked_fill(total == 0, 1)
        return a / total, b / total

    def weigh(self, out_a: Tensor, out_b: Tensor, share_a: Tensor, share_b: Tensor) -> Tensor:
        return share_a[..., None] * out_a + share_b[..., None] * out_b


class Append:
    """`append_kv`, token by token."""

    def __call__(
        self,
        k_context: Tensor,
        v_context: Tensor,
        k: Tensor,
        v: Tensor,
        context_lens: Any,
        *,
        context_index: Tensor | None = None,
        block_table: Tensor | None = None,
        block_lens: Any = None,
    ) -> None:
        for row in range(len(k)):
            source = self.context_row(context_index, row)
            start, count = number(context_lens, row, 0), self.count(block_lens, row, k.shape[1])
            for token in range(count):
                place = self.place(block_table, source, self.position(start, token), k_context.shape[1])
                for storage, block in ((k_context, k), (v_context, v)):
                    storage[place] = block[row, self.token(token, k.shape[1])]

    def context_row(self, index: Tensor | None, row: int) -> int:
        return row if index is None else int(index[row])

    def count(self, lens: Any, row: int, length: int) -> int:
        return number(lens, row, length)

    def position(self, start: int, token: int) -> int:
        return start + token

    def token(self, token: int, length: int) -> int:
        return token

    def place(self, table: Tensor | None, row: int, position: int, page: int) -> tuple[int, int]:
        return (row, position) if table is None else (int(table[row, position // page]), position % page)

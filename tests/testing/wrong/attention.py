"""Wrong attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from tests.testing.plain.attention import Append, Attention, BlockCausalAttention, ContextAttention, Merge, number
from tests.testing.wrong.collection import wrong

# --- who sees what ----------------------------------------------------------------------------------------------------


@wrong("block_attention", "numbers")
class CausalMaskOffByOne(Attention):
    """Each query sees the token behind it."""

    def own(self, real: int, causal: bool, device: torch.device) -> Tensor:
        seen = super().own(real, False, device)
        return seen.tril(1) if causal else seen


@wrong("block_attention", "numbers")
class CausalIgnored(Attention):
    """A causal block sees all of itself."""

    def own(self, real: int, causal: bool, device: torch.device) -> Tensor:
        return super().own(real, False, device)


@wrong("block_attention", "numbers")
class BlockTokenHidesItself(Attention):
    """A causal query sees the tokens before it, but not its own."""

    def own(self, real: int, causal: bool, device: torch.device) -> Tensor:
        seen = super().own(real, False, device)
        return seen.tril(-1) if causal else seen


@wrong("block_attention", "numbers")
class LastContextKeyDropped(Attention):
    """The last token of a context is not read."""

    def context_range(self, *given: Any) -> tuple[int, int]:
        start, stop = super().context_range(*given)
        return start, max(start, stop - 1)


@wrong("block_attention", "numbers")
class LastKeyOfATileDropped(Attention):
    """A context is read in tiles of 8 keys, and what fills no tile is left out."""

    def context_range(self, *given: Any) -> tuple[int, int]:
        start, stop = super().context_range(*given)
        return start, stop if stop - start < 8 else start + (stop - start) // 8 * 8


@wrong("block_attention", "numbers")
class ReadsBeyondTheContext(Attention):
    """One token more than a context's length is read, where there is room for it."""

    def context_range(self, storage: Tensor, table: Tensor | None, *given: Any) -> tuple[int, int]:
        start, stop = super().context_range(storage, table, *given)
        return start, min(stop + 1, self.capacity(storage, table))


@wrong("block_attention", "padding")
class PaddingTimesZero(Attention):
    """Keys beyond a length have weight 0, and 0 times the NaN that lies there is NaN."""

    def read(self, storage: Tensor, table: Tensor | None, row: int, start: int, stop: int) -> Tensor:
        padding = storage[row, stop:] if table is None else storage[:0].flatten(0, 1)
        return super().read(storage, table, row, start, stop) + 0 * padding.sum()


@wrong("block_attention", "numbers")
class LeftPaddingIsSeen(Attention):
    """Where a context starts is ignored."""

    def context_range(self, storage: Tensor, table: Tensor | None, lens: Any, starts: Any, *given: Any) -> Any:
        return super().context_range(storage, table, lens, None, *given)


@wrong("block_attention", "numbers")
class WindowOffByOne(Attention):
    """The window holds one token more."""

    def context_range(self, *given: Any) -> tuple[int, int]:
        *others, window, row = given
        return super().context_range(*others, None if window is None else window + 1, row)


@wrong("block_attention", "numbers")
class WindowOfTheStorage(Attention):
    """The window ends where the storage ends, and not the context."""

    def context_range(self, *given: Any) -> tuple[int, int]:
        storage, table, lens, starts, window, row = given
        start, stop = super().context_range(storage, table, lens, starts, None, row)
        return min(stop, start if window is None else max(start, self.capacity(storage, table) - window)), stop


@wrong("block_attention", "numbers")
class PaddedQueriesAttend(Attention):
    """The length of a block is ignored: its padding is seen, and attends."""

    def block_length(self, lens: Any, row: int, length: int) -> int:
        return length


@wrong("block_attention", "numbers")
class ContextIndexIgnored(Attention):
    """Row b reads context b, whatever the index says."""

    def context_row(self, index: Tensor | None, row: int, rows: int) -> int:
        return row % rows


@wrong("block_attention", "numbers")
class LengthOfTheContextRow(Attention):
    """Of rows that share a context, all have the length of the batch row of the context's number."""

    def context_range(
        self, storage: Tensor, table: Tensor | None, lens: Any, starts: Any, window: Any, row: int
    ) -> Any:
        return super().context_range(storage, table, lens, starts, window, 0 if len(storage) == 1 else row)


@wrong("block_attention", "numbers")
class PageTableOfRow0(Attention):
    """Every row reads the pages of row 0."""

    def read(self, storage: Tensor, table: Tensor | None, row: int, *given: Any) -> Tensor:
        return super().read(storage, table, row if table is None else 0, *given)


@wrong("block_attention", "numbers")
class PagesInOrder(Attention):
    """The pages of a context are taken to lie behind its first one."""

    def read(self, storage: Tensor, table: Tensor | None, row: int, *given: Any) -> Tensor:
        if table is not None:
            behind = table[:, :1] + torch.arange(table.shape[1], device=table.device)
            table = behind.clamp(max=len(storage) - 1)
        return super().read(storage, table, row, *given)


@wrong("block_attention", "numbers")
class WrongGroupOfHeads(Attention):
    """Query heads take key heads in turn, not in groups."""

    def key_heads(self, heads: int, kv_heads: int) -> Tensor:
        return torch.arange(heads) % kv_heads


# --- the sums ---------------------------------------------------------------------------------------------------------


def truncated(x: Tensor) -> Tensor:
    """What a tensor core keeps of a float32 as TF32: 10 bits of its mantissa."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


@wrong("block_attention", "numbers")
class ProductsInTF32(Attention):
    """The factors of logits lose 13 bits."""

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        return super().products(truncated(q), truncated(k))


@wrong("block_attention", "numbers")
class ScaleOfPaddedHeads(Attention):
    """The scale is that of a head_dim rounded up to a power of two."""

    def default_scale(self, head_dim: int) -> float:
        return (1 << (head_dim - 1).bit_length()) ** -0.5


@wrong("block_attention", "numbers")
class ScaleGivenIsIgnored(Attention):
    """The scale is 1/√D, whatever was asked for."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: Any, *given: Any) -> Any:
        return super().attend(q, k, v, seen, None, *given)


@wrong("block_attention", "numbers")
class LogitsInTheInputsDtype(Attention):
    """Logits are rounded to the dtype of the queries, bfloat16 for one."""

    def softmax(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return super().softmax(logits.to(dtype).to(logits.dtype), dtype)


@wrong("block_attention", "numbers")
class SoftmaxOfLargeLogitsOverflows(Attention):
    """The largest logit is not taken off before the exponential."""

    def softmax(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights = logits.exp()
        total = weights.sum(2, keepdim=True)
        return weights / total.masked_fill(total == 0, 1), total.squeeze(2).log()


@wrong("block_attention", "numbers")
class LogSumExpInBits(Attention):
    """The log-sum-exp is to base 2, in which kernels compute."""

    def softmax(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights, lse = super().softmax(logits, dtype)
        return weights, lse / 0.6931471805599453


@wrong("block_attention", "numbers")
class CapBeforeScale(Attention):
    """Logits are capped before they are scaled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: Any, softcap: float, sinks: Any) -> Any:
        factor = self.default_scale(q.shape[2]) if scale is None else scale
        return super().attend(q, k, v, seen, scale, softcap * abs(factor), sinks)


@wrong("block_attention", "numbers")
class SinksIgnored(Attention):
    """Sinks are taken, and forgotten."""

    def attend(self, *given: Any) -> Any:
        return super().attend(*given[:-1], None)


@wrong("block_attention", "numbers")
class SinksAreScaled(Attention):
    """Sinks are scaled as the logits are."""

    def sink(self, sinks: Tensor, q: Tensor) -> Tensor:
        return sinks * q.shape[2] ** -0.5


@wrong("block_attention", "numbers")
class SinksOfTheKeyHeads(Attention):
    """Query heads take the sinks in the order of another grouping."""

    def sink(self, sinks: Tensor, q: Tensor) -> Tensor:
        return sinks.flip(0)


@wrong("block_attention", "numbers")
class ResultThroughBfloat16(Attention):
    """The result is rounded to bfloat16, whatever its dtype."""

    def attend(self, q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(q, *given)
        return out.bfloat16().to(q.dtype), lse


@wrong("block_attention", "runs")
class ValuesAsWideAsKeys(Attention):
    """Values are taken to have the head_dim of the keys."""

    def results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), super().results(q, v)[1]


# --- manners ----------------------------------------------------------------------------------------------------------


@wrong("block_attention", "rows")
def scales_by_the_batch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Queries are divided by the largest of the batch, so that a row with NaN spoils all."""
    largest = q.double().abs().amax().clamp(min=1e-30) if q.numel() else 1.0
    return tt.block_attention((q.double() / largest * largest).to(q.dtype), k, v, causal=causal)


@wrong("block_attention", "deterministic")
def adds_in_any_order(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """As with atomics, keys are summed in another order each time."""
    order = torch.randperm(k.shape[1])
    return tt.block_attention(q, k[:, order], v[:, order], scale=scale)


@wrong("block_attention", "untouched")
def scales_the_queries_in_place(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The caller's queries come back scaled."""
    return tt.block_attention(q.mul_(q.shape[3] ** -0.5), k, v, causal=causal, scale=1.0)


@wrong("block_attention", "strides")
def takes_every_tensor_for_contiguous(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Strides are not looked at."""
    q, k, v = (x.as_strided(x.shape, x.new_empty(x.shape, device="meta").stride()) for x in (q, k, v))
    return tt.block_attention(q, k, v, causal=causal)


@wrong("block_attention", "numbers")
def returns_float32(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The result has the dtype of the sums."""
    return tt.block_attention(q.float(), k.float(), v.float(), causal=causal)


# --- context_attention, block_causal_attention ------------------------------------------------------------------------


@wrong("context_attention", "numbers")
class NothingSeenIsNaN(ContextAttention):
    """A query without any key divides 0 by 0."""

    def softmax(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return logits.softmax(2), logits.logsumexp(2)


@wrong("context_attention", "numbers")
class AlignedTopLeft(ContextAttention):
    """Causal query i sees the tokens up to i, not up to its own place behind the context."""

    def last(self, real: int, stop: int, causal: bool, device: torch.device) -> Tensor:
        return torch.arange(real, device=device) if causal else super().last(real, stop, causal, device)


@wrong("context_attention", "numbers")
class WindowWithoutOneself(ContextAttention):
    """A sliding window holds `window` tokens beside the query's own."""

    def within(self, seen: Tensor, position: Tensor, last: Tensor, window: int) -> Tensor:
        return super().within(seen, position, last, window + 1)

    def oldest(self, last: Tensor, window: int, stop: int) -> int:
        return super().oldest(last, window + 1, stop)


@wrong("context_attention", "numbers")
class WindowOfTheBlock(ContextAttention):
    """The window does not slide with a causal query: it is that of the block's last one."""

    def within(self, seen: Tensor, position: Tensor, last: Tensor, window: int) -> Tensor:
        return seen & (position > last[-1:, None] - window)


@wrong("context_attention", "numbers")
class AlignedByThePaddedBlock(ContextAttention):
    """A causal query counts the block's padding: its own place is wrong where a block is short."""

    def __call__(self, q: Tensor, *given: Any, **options: Any) -> Any:
        self.length = q.shape[1]
        return super().__call__(q, *given, **options)

    def last(self, real: int, stop: int, causal: bool, device: torch.device) -> Tensor:
        return super().last(real, stop, causal, device) - (self.length - real if causal else 0)


@wrong("block_causal_attention", "numbers")
class CausalByToken(BlockCausalAttention):
    """Tokens of one block do not see those behind them."""

    def block_of(self, position: Tensor, block_size: int, real: int) -> Tensor:
        return position


@wrong("block_causal_attention", "numbers")
class BlocksFromTheEnd(BlockCausalAttention):
    """The first block is the short one."""

    def block_of(self, position: Tensor, block_size: int, real: int) -> Tensor:
        return (position - real) // block_size


@wrong("block_causal_attention", "numbers")
class OwnBlockAlone(BlockCausalAttention):
    """Blocks do not see those before them."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return key == query


# --- merge_attention --------------------------------------------------------------------------------------------------


@wrong("merge_attention", "padding")
class EmptySideIsNaN(Merge):
    """An empty side's weight is 0, and what it holds may be NaN."""

    def without_empty(self, out: Tensor, lse: Tensor) -> Tensor:
        return out


@wrong("merge_attention", "numbers")
class TwoEmptySidesAreNaN(Merge):
    """-inf less -inf is NaN."""

    def largest(self, lse_a: Tensor, lse_b: Tensor) -> Tensor:
        return torch.maximum(lse_a, lse_b)


@wrong("merge_attention", "numbers")
class PlusInfinityIsNoMark(Merge):
    """A side marked as FlashAttention marks it takes everything."""

    def mark_empty(self, lse: Tensor) -> Tensor:
        return lse


@wrong("merge_attention", "numbers")
class WeightsSwapped(Merge):
    """Each side has the other's weight."""

    def weigh(self, out_a: Tensor, out_b: Tensor, share_a: Tensor, share_b: Tensor) -> Tensor:
        return super().weigh(out_a, out_b, share_b, share_a)


@wrong("merge_attention", "numbers")
class LargeLogSumExpOverflows(Merge):
    """The exponentials are taken as they are."""

    def largest(self, lse_a: Tensor, lse_b: Tensor) -> Tensor:
        return torch.zeros_like(lse_a)


# --- append_kv --------------------------------------------------------------------------------------------------------


@wrong("append_kv", "numbers")
class WritesOneBeyond(Append):
    """One token more is written, where there is room."""

    def __call__(self, k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Any) -> None:  # type: ignore[override]
        super().__call__(k_context, v_context, k, v, context_lens)
        for row in range(len(k)):
            stop = number(context_lens, row, 0) + k.shape[1]
            if stop < k_context.shape[1] and k.shape[1]:
                k_context[row, stop] = k[row, -1]


@wrong("append_kv", "numbers")
class PaddingIsAppended(Append):
    """The length of a block is ignored, where there is room for its padding."""

    def count(self, lens: Any, row: int, length: int) -> int:
        return length if lens is None else min(length, super().count(lens, row, length) + 1)


@wrong("append_kv", "numbers")
class WrongPosition(Append):
    """A block begins on the last token of the context."""

    def position(self, start: int, token: int) -> int:
        return max(0, start - 1) + token


@wrong("append_kv", "numbers")
class TokensBackwards(Append):
    """A block's tokens are written in reverse order."""

    def token(self, token: int, length: int) -> int:
        return length - 1 - token


@wrong("append_kv", "numbers")
class AppendIndexIgnored(Append):
    """Row b writes to context b, whatever the index says."""

    def context_row(self, index: Tensor | None, row: int) -> int:
        return row


@wrong("append_kv", "numbers")
class AppendsToTheFirstPage(Append):
    """A block that crosses the end of a page goes on at the page's start."""

    def place(self, table: Tensor | None, row: int, position: int, page: int) -> tuple[int, int]:
        place = super().place(table, row, position, page)
        return place if table is None else (int(table[row, 0]), place[1])


@wrong("append_kv", "numbers")
def forgets_the_values(k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Any) -> None:
    """Keys are written where values belong."""
    tt.append_kv(k_context, v_context, k, k if k.shape == v.shape else v, context_lens)

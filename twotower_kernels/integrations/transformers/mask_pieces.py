"""Masks of several pieces: queries that see a stretch of the keys each, or both sides of themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.ops.attention import merge_attention


@dataclass(frozen=True, eq=False)
class Pieces:
    """Stretches of a call's queries, each of them a row of its own to the kernel: N pieces of at most P queries.

    Attributes:
        rows: `[N]`, the row of the cache that a piece reads.
        queries: `[N, P]`, which of the B · S queries it holds; beyond its length, any.
        back: `[B, S]`, where in the N · P results a query's is.
        starts, lens: `[N]`, where in the cache's row its keys begin and end.
        block_lens: `[N]`, its queries; the last so many of its keys are their own, where they see causally.
    """

    rows: Tensor
    queries: Tensor
    back: Tensor
    starts: Tensor
    lens: Tensor
    block_lens: Tensor

    def gather(self, query: Tensor) -> Tensor:
        """`[B, S, H, D]` as `[N, P, H, D]`."""
        return query.flatten(0, 1)[self.queries]

    def scatter(self, result: Tensor) -> Tensor:
        """`[N, P, H, D]` as `[B, S, H, D]`."""
        return result.flatten(0, 1)[self.back]


def of_chunks(
    size: int,
    begins: Tensor,
    first: Tensor,
    starts: Tensor,
    lens: Tensor,
    queries: int,
) -> Pieces:
    """Queries that see those of their own chunk alone, of `size` keys, up to themselves.

    How many pieces there are is known from the shapes: no tensor is read by the host.

    Args:
        size: keys of a chunk.
        begins: `[B]`, where in the cache's row the chunks are counted from; may be negative.
        first: `[B]`, the first query's own key.
        starts, lens: `[B]`, keys that are seen at all.
        queries: S.
    """
    count, most = (queries + size - 2) // size + 1, min(size, queries)
    chunk = (first - begins).div(size, rounding_mode="floor")[:, None] + torch.arange(count, device=first.device)
    begin = begins[:, None] + size * chunk  # [B, count]
    from_query = (begin - first[:, None]).clamp(0, queries)
    to_query = (begin + size - first[:, None]).clamp(0, queries)
    end = torch.minimum(first[:, None] + to_query, lens[:, None])
    number = (end - first[:, None] - from_query).clamp(min=0)
    i = torch.arange(queries, device=first.device)
    of_query = (first[:, None] + i - begins[:, None]).div(size, rounding_mode="floor") - chunk[:, :1]  # [B, S]
    end = torch.where(number > 0, end, 0)  # of a piece without queries
    return _pieces(from_query, number, of_query, torch.maximum(begin, starts[:, None]).clamp(min=0), end, most)


def of_sequences(numbers: Tensor) -> Pieces:
    """Sequences one after the other in a row, which see nothing of each other. Reads on the host how many there are.

    Args:
        numbers: `[B, S]`, the number of each token's sequence in its row, from 0 on.
    """
    count = int(numbers.max()) + 1
    lengths = torch.zeros(len(numbers), count, dtype=torch.long, device=numbers.device)
    lengths.scatter_add_(1, numbers, torch.ones_like(numbers))
    ends = lengths.cumsum(1)
    return _pieces(ends - lengths, lengths, numbers, ends - lengths, ends, int(lengths.max()))


def _pieces(begin: Tensor, number: Tensor, of_query: Tensor, starts: Tensor, ends: Tensor, most: int) -> Pieces:
    """Pieces `[B, count]` of the queries from `begin` on, `number` of them, and `[B, S]` the piece of each query."""
    (batch, count), length = begin.shape, of_query.shape[1]
    row = torch.arange(batch, device=begin.device)[:, None]
    inside = (begin[..., None] + torch.arange(most, device=begin.device)).clamp(max=length - 1)  # [B, count, most]
    place = torch.arange(length, device=begin.device) - begin.gather(1, of_query)
    return Pieces(
        rows=row.expand(-1, count).flatten(),
        queries=(row[..., None] * length + inside).flatten(0, 1),
        back=(row * count + of_query) * most + place,
        starts=torch.minimum(starts, ends).flatten(),
        lens=ends.flatten(),
        block_lens=number.flatten(),
    )


def both_sides(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance: int,
    starts: Tensor | None,
    lens: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries that see the keys up to `distance` before and behind their own, of as many keys: two causal windows, the
    second read backwards and without the own key, merged by their log-sum-exps.

    Args:
        attend: `context_attention` with scale and softcap.
        query, key, value: `[B, S, H, D]`, tokens before heads.
        starts, lens: `[B]`, keys that are seen at all; None: all.
        sinks: of the softmax as a whole, and so of one side.
    """
    tokens = query.shape[1]
    rows = {"context_starts": starts, "context_lens": lens, "block_lens": lens}
    before = attend(query, key, value, window=distance + 1, sinks=sinks, **rows)
    if tokens < 2:
        return before[0]
    rows = {}
    if starts is not None and lens is not None:
        last = (tokens - 1 - starts).clamp(min=0)  # a padding query on the left sees nothing
        rows = {"context_starts": torch.minimum(tokens - lens, last), "context_lens": last, "block_lens": last}
    flipped = query[:, :-1].flip(1), key[:, 1:].flip(1), value[:, 1:].flip(1)
    out, lse = attend(*flipped, window=distance, **rows)
    out = torch.nn.functional.pad(out.flip(1), (0, 0, 0, 0, 0, 1))  # the last query sees nothing behind it
    lse = torch.nn.functional.pad(lse.flip(1), (0, 0, 0, 1), value=-torch.inf)
    return merge_attention(*before, out, lse)[0]

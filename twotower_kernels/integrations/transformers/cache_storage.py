"""Where the keys and values of a layer lie: rows, or pages that rows share until they write to them."""

import torch
from torch import Tensor

from twotower_kernels.ops.attention import append_kv


class Rows:
    """A row of storage for each row of the batch, `[B, room, Hkv, D]` and `[B, room, Hkv, Dv]`."""

    table: Tensor | None = None

    def __init__(
        self, batch: int, room: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k, self.v = (torch.zeros(batch, room, heads, dim, dtype=dtype, device=device) for dim in dims)

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def room(self) -> int:
        """Tokens that a row can hold."""
        return self.k.shape[1]

    def grow(self, room: int) -> None:
        """Room for more tokens; all of them are copied once."""
        self.k, self.v = (torch.cat([x, x.new_zeros(x.shape[0], room - x.shape[1], *x.shape[2:])], 1) for x in self.kv)

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def reserve(self, first: int, end: int) -> None:
        """Makes tokens [first, end) of every row writable."""

    def release(self, end: int) -> None:
        """Tokens from `end` on are no longer needed."""

    def select(self, indices: Tensor) -> None:
        """The rows with these numbers instead."""
        self.k, self.v = (x.index_select(0, indices.to(x.device)) for x in self.kv)

    def write(self, k: Tensor, v: Tensor, start: int | Tensor) -> None:
        """`[B, Hkv, S, D]` from token `start` of each row on."""
        append_kv(self.k, self.v, k.transpose(1, 2), v.transpose(1, 2), start, block_table=self.table)


class Pages(Rows):
    """Pages of `size` tokens, `[P, size, Hkv, D]`, which rows are given as they fill them.

    Rows that come from one row, as those of a beam search, share its pages until one writes to them: to select rows
    copies a table. Which pages a row has is known on the host, and on the device in `table` `[B, n]`, int32.

    Source: PagedAttention (arXiv 2309.06180).
    """

    table: Tensor

    def __init__(
        self,
        batch: int,
        room: int,
        heads: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        size: int,
    ) -> None:
        self.size, width = size, -(-room // size)
        super().__init__(batch * width, size, heads, dims, dtype, device)
        self.table = torch.zeros(batch, width, dtype=torch.int32, device=device)
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.users = [0] * (batch * width)  # rows that have a page
        self.free = list(range(batch * width))[::-1]

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def room(self) -> int:
        return self.table.shape[1] * self.size

    def grow(self, room: int) -> None:
        """A wider table; pages come when they are needed, and none moves."""
        more = -(-room // self.size) - self.table.shape[1]
        self.table = torch.cat([self.table, self.table.new_zeros(len(self.rows), more)], 1)

    def reserve(self, first: int, end: int) -> None:
        changed = False
        for pages in self.rows:
            for place in range(first // self.size, min(len(pages), -(-end // self.size))):
                if self.users[pages[place]] > 1:  # written by this row alone from now on
                    page = self._take()
                    for x in self.kv:
                        x[page].copy_(x[pages[place]])
                    self.users[pages[place]] -= 1
                    pages[place], changed = page, True
            while len(pages) * self.size < end:
                pages.append(self._take())
                changed = True
        if changed:
            self._write_table()

    def release(self, end: int) -> None:
        for pages in self.rows:
            while len(pages) > -(-end // self.size):
                self._give(pages.pop())

    def select(self, indices: Tensor) -> None:
        """Reads the numbers on the host."""
        before, self.rows = self.rows, [list(self.rows[i]) for i in indices.tolist()]
        for page in (page for pages in self.rows for page in pages):
            self.users[page] += 1
        for page in (page for pages in before for page in pages):
            self._give(page)
        self.table = self.table.new_zeros(len(self.rows), self.table.shape[1])
        self._write_table()

    def _take(self) -> int:
        """A free page; where there is none, as many again."""
        if not self.free:
            pages = len(self.users)
            self.k, self.v = (torch.cat([x, torch.zeros_like(x)]) for x in self.kv)
            self.free, self.users = list(range(pages, 2 * pages))[::-1], self.users + [0] * pages
        self.users[self.free[-1]] = 1
        return self.free.pop()

    def _give(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            self.free.append(page)

    def _write_table(self) -> None:
        width = max(map(len, self.rows), default=0)
        rows = [pages + [0] * (width - len(pages)) for pages in self.rows]
        self.table[:, :width].copy_(torch.tensor(rows, dtype=torch.int32).view(len(rows), width))

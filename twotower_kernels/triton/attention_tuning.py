"""How attention's kernels are cut into programs: tiles, columns, splits. What was tried: the kernels' own files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

WIDEST = 512  # of head dimensions
# Where the forward kernel masks only those tiles of keys that cross a bound; on sm_80 a second loop spills registers.
PEELING = (90, 100, 120)


@dataclass(frozen=True)
class Tuning:
    """Rows of queries and keys per tile, how a program is run, and how many columns of its result it sums at most."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    columns: int = 256

    def parts(self, dim: int) -> int:
        """Programs that share a tile of rows: each takes all of a head for the logits, and its own columns."""
        return -(-dim // self.columns)

    def launch(self, block_d: int) -> dict[str, int]:
        """What kernels and their launches are given by name."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_V": min(block_d, self.columns)}
        return tiles | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tuning(dtype: torch.dtype, query_rows: int, dim: int, arch: int) -> Tuning:
    """Tiles for packed query rows. Products of 16-bit numbers want 64 rows for each group of four warps, and
    sums of [block_m, dim] fill half of the registers; float32 runs without tensor cores, in small tiles."""
    large = arch in (90, 100)  # 227 KB of shared memory: two tiles of keys and values are on their way
    least = not large and arch != 80  # 99 KB
    if dtype == torch.float32:
        if dim <= 64 and arch == 80:  # with more warps some registers are spilled, to make room for one more program
            return Tuning(32, 32, 4, 1)
        return Tuning(32, 16 if dim > 256 and least else 32, 8, 1)
    if dim <= 128:
        if query_rows > 64:
            if not large and dim > 64:  # 64 keys under a causal mask spill registers
                return Tuning(128, 32, 8, 3)
            return Tuning(128, 64, 8, 3 if large else 2)
        return Tuning(64, 64, 4, 3) if large else Tuning(64, 32, 4, 2)
    if dim <= 256:
        if query_rows > 64 and arch == 90:
            return Tuning(128, 32, 8, 3)
        return Tuning(64, 64, 8, 2) if large else Tuning(64, 32, 8, 2)
    if large:
        return Tuning(128, 32, 8, 2) if arch == 90 else Tuning(64, 32, 8, 3)
    return Tuning(32, 32, 4, 2) if least else Tuning(32, 64, 8, 2)


def gradient_tuning(dtype: torch.dtype, dim: int, arch: int) -> tuple[Tuning, Tuning]:
    """Tiles for the gradients of queries and of keys. A program holds two tiles of rows [block, dim] and needs two
    more in every step: at head_dim 512 that leaves room for 32 rows, or 16 in float32."""
    large = arch in (90, 100)
    least = not large and arch != 80
    if dtype == torch.float32:
        if dim <= 256:
            warps = 8 if arch == 120 and dim <= 64 else 4  # four spill some there
            return Tuning(16, 16, warps, 1), Tuning(16, 32 if dim <= 128 else 16, 8, 1)
        tune = Tuning(16, 16, 16, 1) if least else Tuning(16, 16, 8, 1, columns=512)
        return tune, tune
    if dim <= 128:
        return Tuning(64, 64, 8, 2), Tuning(32, 64, 8, 2)
    if dim <= 256:
        if large:
            return Tuning(128, 32, 8, 2, columns=128), Tuning(32, 128, 8, 2, columns=128)
        return Tuning(32, 16 if arch == 120 else 32, 8, 2), Tuning(32, 32, 8, 2)  # 32 keys under a causal mask spill
    return Tuning(32, 16 if least else 32, 8, 2, columns=512), Tuning(32, 16, 8, 2, columns=512)


def unit(dtype: torch.dtype) -> float:
    """Logits times it are exponents of 2. The factor to base 2 rounds every logit by a part in 2**25, which 16-bit
    inputs drown and float32 shows when logits are large: there logits are natural, and differences are scaled."""
    return math.log2(math.e) if dtype == torch.float32 else 1.0


@cache
def splits_for(items: int, tiles: int, processors: int) -> int:
    """Into how many parts to cut the keys of `items` tiles of rows with at most `tiles` tiles of keys each: what leaves
    the longest queue of tiles on a processor the shortest. Starting a part and merging it costs about two tiles, and
    four parts per processor, which the scratch must hold, are as good as more."""
    most = min(processors, tiles // 2, 4 * processors // max(items, 1))
    counts = range(1, max(most, 1) + 1)
    return min(counts, key=lambda n: -(-items * n // processors) * (-(-tiles // n) + 2 * (n > 1)))

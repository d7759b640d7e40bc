"""Which tiles `moe.py` takes, and whether its kernels overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from twotower_kernels.triton import launch


@dataclass(frozen=True)
class Tuning:
    """A program's tile: `block_m` rows of weights by `block_n` pairs of one expert, `block_k` of K in a stage."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


NARROW = 32  # pairs of a tile at most, whose time is that of its weights
# block_k and num_stages of narrow tiles on GPUs with 227 KB of shared memory. A stage is a run of 2 block_k bytes in
# each of 64 rows. `python -m bench.gpu_switches` compares them; until then docs/gpu_kernels.md says why it is this one.
STREAMS = {"deep": (128, 3), "deeper": (128, 4), "shallow": (64, 6)}
STREAM = "deep"


def tuning(dtype: torch.dtype, num_pairs: int, num_experts: int, gated: bool, aligned: bool, arch: int) -> Tuning:
    """As many pairs to a tile as an expert has on average. Narrow tiles stream weights: small ones of many stages,
    of which three programs fit an SM. Wide ones multiply: large ones, whose factors are read less often. Factors that
    are not aligned to 16 numbers go through registers, one number at a time: small tiles, so that they fit."""
    block_n = min(max(triton.next_power_of_2(triton.cdiv(num_pairs, max(num_experts, 1))), 16), 128)
    space = 227 if 90 <= arch < 120 else 163 if arch == 80 else 99  # KB of shared memory
    if dtype == torch.float32:  # without tensor cores: a tile's factors have to fit the registers
        return Tuning(64, min(block_n, 32), 16, 4, 3)
    if not aligned:
        return Tuning(64, min(block_n, 32), 16, 4, 2)
    if block_n <= NARROW:
        if space == 227 and not gated:
            return Tuning(64, block_n, STREAMS[STREAM][0], 4, STREAMS[STREAM][1])
        stages = {227: 4, 163: 4, 99: 3} if gated else {163: 5, 99: 4}
        return Tuning(64, block_n, 64, 4, stages[space])
    return Tuning(64 if gated else 128, block_n, 64, 8 if block_n == 128 else 4, 3 if space == 99 else 4)


def overlaps(device: torch.device, dtype: torch.dtype, arch: int) -> bool:
    """Whether a kernel may begin before the one before it has ended: not in the interpreter. float32 lacks registers
    for it, and tensor cores to be in a hurry."""
    return launch.PDL and device.type == "cuda" and arch >= 90 and dtype != torch.float32

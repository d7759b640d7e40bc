"""What this machine can do at most, measured: the first lines of every table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """read, copy: GB/s of main memory, bytes read plus bytes written. fp32, bf16: GFLOP/s of a large matrix product."""

    read: float
    copy: float
    fp32: float
    bf16: float

    def better_of(self, other: Ceilings) -> Ceilings:
        """The larger of each."""
        return Ceilings(*map(max, astuple(self), astuple(other)))

    def matrix(self, dtype: torch.dtype) -> float:
        """What arithmetic in this dtype could reach: a 16-bit type may always be widened."""
        return self.fp32 if dtype == torch.float32 else max(self.fp32, self.bf16)


def _median(call: Callable[[], Any], times: int = 7) -> float:
    """Seconds per call; on a GPU everything is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    call()
    taken = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _copied(x: torch.Tensor) -> float:
    y = torch.empty_like(x)
    return _median(lambda: y.copy_(x))


def measure(device: str = "cpu") -> Ceilings:
    """A sum over 1 GiB (on a GPU 4), a copy of it, and matrix products, with PyTorch's number of threads."""
    on_cpu = torch.device(device).type == "cpu"
    x = torch.ones(2**28 if on_cpu else 2**30, device=device)  # zeros might all lie on one page
    size = x.numel() * x.element_size() / 1e9

    def product(dtype: torch.dtype, n: int) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / _median(lambda: a @ b) / 1e9

    read, copied = size / _median(x.sum), 2 * size / _copied(x)
    if not on_cpu:
        return Ceilings(read, copied, product(torch.float32, 4096), product(torch.bfloat16, 8192))
    # Where bfloat16 is emulated, a smaller product says so soon enough.
    small = product(torch.bfloat16, 256)
    bf16 = product(torch.bfloat16, 1024) if small > 20 else small
    return Ceilings(read, copied, product(torch.float32, 1024), bf16)


if __name__ == "__main__":
    print(measure())

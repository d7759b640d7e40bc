"""What this machine can do at most, measured: the first lines of every table."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.measure import gpu_clock
from twotower_kernels.bench.report.saved import write_json


@dataclass(frozen=True)
class Ceilings:
    """read, copy: GB/s of main memory, bytes read plus bytes written. fp64 to bf16: GFLOP/s of a large matrix product.
    launch: seconds of an empty kernel on a GPU, on a CPU of a very small call of an operation.
    device: "cpu" or "cuda"."""

    read: float
    copy: float
    fp64: float
    fp32: float
    fp16: float
    bf16: float
    launch: float
    device: str = "cpu"

    def better_of(self, other: Ceilings) -> Ceilings:
        """The larger of each, and the shorter launch."""
        pairs = {name: (mine, vars(other)[name]) for name, mine in vars(self).items() if name != "device"}
        return replace(self, **{name: (min if name == "launch" else max)(*pair) for name, pair in pairs.items()})

    def matrix(self, dtype: torch.dtype) -> float:
        """What arithmetic in this dtype could reach: a 16-bit type may always be widened."""
        if dtype == torch.float64:
            return self.fp64
        narrow = {torch.float16: self.fp16, torch.bfloat16: self.bf16}
        return max(self.fp32, narrow.get(dtype, 0.0))


def _median(call: Callable[[], Any], times: int = 7) -> float:
    """Seconds per call; on a GPU between two events."""
    call()
    if torch.cuda.is_initialized():
        return gpu_clock.median(call, times)
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _copied(x: torch.Tensor) -> float:
    y = torch.empty_like(x)
    return _median(lambda: y.copy_(x))


def _launch(on_cpu: bool) -> float:
    if on_cpu:
        x, weight = torch.ones(1, 16), torch.ones(16)
        return _median(lambda: tt.rms_norm(x, weight, eps=1e-5), times=1001)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2**22)  # while this kernel waits, the host queues those that are timed
    start.record()
    for _ in range(100):
        torch.cuda._sleep(0)  # waits for nothing
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / 100


def measure(device: str = "cpu") -> Ceilings:
    """A sum over 1 GiB (on a GPU 4, or a quarter of what is free), a copy of it, matrix products with PyTorch's number
    of threads, and a launch."""
    on_cpu = torch.device(device).type == "cpu"
    count = 2**28 if on_cpu else min(2**30, torch.cuda.mem_get_info()[0] // 16)
    x = torch.ones(count, device=device)  # zeros might all lie on one page
    size = x.numel() * x.element_size() / 1e9

    def product(dtype: torch.dtype, n: int) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / _median(lambda: a @ b) / 1e9

    def narrow(dtype: torch.dtype) -> float:
        if not on_cpu:
            return product(dtype, 8192)
        small = product(dtype, 256)  # where the type is emulated, a smaller product says so soon enough
        return product(dtype, 1024) if small > 20 else small

    return Ceilings(
        read=size / _median(x.sum),
        copy=2 * size / _copied(x),
        fp64=product(torch.float64, 1024 if on_cpu else 4096),
        fp32=product(torch.float32, 1024 if on_cpu else 4096),
        fp16=narrow(torch.float16),
        bf16=narrow(torch.bfloat16),
        launch=_launch(on_cpu),
        device="cpu" if on_cpu else "cuda",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.measure.ceilings", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/ceilings.json")
    options = parser.parse_args(arguments)
    found = measure(options.device)
    print(found)
    if options.save:
        write_json(options.save / "ceilings.json", asdict(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The model's linear layers on few rows against F.linear: `python -m bench.bench_linear`.

The sizes are those of the released model's projections and of a narrow model's. The weights of a case are several, read
in turn, so that they come from memory as they do in a model. The last program only reads as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.timing import Report

SHAPES = ((2688, 10304), (4096, 2688), (2688, 4096), (2688, 131072), (1024, 1024), (1024, 4384))  # K, N
ROWS = (1, 16, 64)
APART = 128 * 2**20  # bytes of weights that a case takes turns through: more than the caches hold


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    report = Report("linear layers on few rows")
    for dtype in (torch.bfloat16, torch.float32):
        for k, n in SHAPES:
            size = dtype.itemsize * k * n
            count = 1 if size > APART else APART // size + 1
            first = torch.randn(n, k, generator=generator).mul_(k**-0.5).to(dtype)
            weights = [first] + [first.clone() for _ in range(count - 1)]
            for rows in ROWS:
                x = torch.randn(rows, k, generator=generator).to(dtype)
                torch.testing.assert_close(
                    torch.ops.twotower.linear(x, first, None), F.linear(x, first), rtol=8e-3, atol=8e-3
                )

                def turns(call: Callable[[Tensor], Tensor], weights: list[Tensor] = weights) -> Callable[[], Tensor]:
                    turn = cycle(weights)
                    return lambda: call(next(turn))

                report.add(
                    f"[{rows}, {k}] x [{n}, {k}] {str(dtype).removeprefix('torch.')}",
                    {
                        "twotower_kernels": turns(lambda w, x=x: torch.ops.twotower.linear(x, w, None)),
                        "F.linear": turns(lambda w, x=x: F.linear(x, w)),
                        "sum of as many bytes": turns(lambda w: w.view(torch.int64).sum()),
                    },
                    bytes=size,
                    flops=2 * rows * k * n,
                )
    report.show()


if __name__ == "__main__":
    main()

"""The Triton kernels on a CPU, in Triton's interpreter: `python -m tests.gpu_checks`, the arguments those of
`python -m bench.checks`, which a GPU takes.

Without the released sizes, which would take hours, and without kernels in CUDA C++, which have an executor of their own
(tests/simt)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from tests.gpu.triton_checks import triton_kernels
from twotower_kernels.bench.checks import command


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    with triton_kernels():
        return command.main(["--device", "cpu", *words], program=("tests.gpu_checks",), interpreted=True)


if __name__ == "__main__":
    raise SystemExit(main())

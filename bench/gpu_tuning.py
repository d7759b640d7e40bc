"""Which way is fastest? `python -m bench.gpu_tuning`, on a GPU: what only measurement can decide, side by side.

The experts of 16 tokens at the released sizes, alone and behind their router, with every entry of
`triton.moe_tuning.STREAMS`, without and with programmatic dependent launch (`triton.launch.PDL`). What is fastest
belongs into those constants.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import twotower_kernels as tt
from twotower_kernels.bench import bench_moe, timing
from twotower_kernels.bench.shapes import RELEASED, SMALL
from twotower_kernels.bench.timing import OURS, Case, close
from twotower_kernels.ops.moe import moe_router


def kernels() -> tuple[ModuleType, ModuleType]:
    """triton.launch and triton.moe_tuning, whose constants are tried; they need Triton."""
    from twotower_kernels.triton import launch, moe_tuning

    return launch, moe_tuning


@contextmanager
def chosen(stream: str, pdl: bool) -> Iterator[None]:
    """Inside, kernels are launched so."""
    launch, tuning = kernels()
    with mock.patch.object(launch, "PDL", pdl), mock.patch.object(tuning, "STREAM", stream):
        yield


def layer(case: Case, gate_weight: torch.Tensor) -> Any:
    """The experts of a case behind a router, which chooses others."""
    weights, experts, plan = moe_router(case.inputs["x"], gate_weight, None, top_k=case.sizes["top_k"], scaling=2.5)
    return tt.moe_experts(**{**case.inputs, "weights": weights, "experts": experts, "plan": plan})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tuning", description="Which way is fastest?")
    parser.add_argument("--shapes", choices=("small", "released"), default="released")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each of them")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none")
    weights = bench_moe.Weights("cuda", SMALL if options.shapes == "small" else RELEASED)
    case = bench_moe.experts(weights, 16)
    gate_weight = torch.randn(case.sizes["experts"], case.sizes["hidden"], device="cuda")
    programs: dict[str, Callable[[], Any]] = {
        "experts": case.programs[OURS],
        "layer": partial(layer, case, gate_weight),
    }
    expected = {name: program() for name, program in programs.items()}
    candidates: dict[str, Callable[[], Any]] = {}
    _, tuning = kernels()
    for (name, program), stream, pdl in itertools.product(programs.items(), tuning.STREAMS, (False, True)):

        def call(program: Callable[[], Any] = program, stream: str = stream, pdl: bool = pdl) -> Any:
            with chosen(stream, pdl):
                return program()

        close(8e-3)(call(), expected[name])
        candidates[f"{name}, {stream}, PDL {'on' if pdl else 'off'}"] = call
    for name, taken in timing.on_gpu(candidates, options.seconds).items():
        rate = case.cost.bytes / taken.median / 1e9
        print(f"{name:32} {1e6 * taken.median:8.1f} us, {rate:5.0f} GB/s of the experts' bytes", flush=True)


if __name__ == "__main__":
    main()

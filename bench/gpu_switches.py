"""Which way is faster? `python -m bench.gpu_switches`, on a GPU: what only measurement can decide, side by side.

Every operation of a step at batch 1 and at the released sizes, and the chains in which they follow each other, each
with every value of the constants in `bench.measure.switches`: first compared, to the bit where the value may change
none, then timed in turns. A launch that begins early shows in a chain, and in operations that are several launches.
What is fastest belongs into those constants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import twotower_kernels as tt
from twotower_kernels.bench.cases import adaln, attention, mamba2, moe, remask
from twotower_kernels.bench.measure import timing
from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.bench.measure.switches import Way, ways
from twotower_kernels.bench.measure.timing import OURS, Case
from twotower_kernels.bench.report.saved import write_json
from twotower_kernels.bench.sizes.shapes import RELEASED, SMALL, Shapes
from twotower_kernels.ops.moe import moe_router

BF16, CONTEXT = torch.bfloat16, 4096
Program = Callable[[], Any]
Check = Callable[[Any, Any], None]


def moe_layer(experts: Case, norm: Case, gate_weight: Tensor) -> Any:
    """Norm, router and experts, as a layer of the model calls them."""
    _, x = norm.programs[OURS]()
    x = x.flatten(0, 1)
    weights, chosen, plan = moe_router(x, gate_weight, None, top_k=experts.sizes["top_k"], scaling=2.5)
    return tt.moe_experts(**{**experts.inputs, "x": x, "weights": weights, "experts": chosen, "plan": plan})


def mamba_layer(scan: Case, gated: Case, norm: Case) -> Any:
    """Norm, scan and gated norm, without the products between them."""
    norm.programs[OURS]()
    y = scan.programs[OURS]()
    return tt.gated_rms_norm(**{**gated.inputs, "y": y})


def programs(device: str, shapes: Shapes) -> Iterator[tuple[str, Program, Check]]:
    """Name, program, and what compares two of its results where bits may differ."""
    alike: Check = timing.close(2e-2)
    residual = next(case for case in adaln.cases(device, shapes, [1]) if case.op == "gated_residual_adaln_norm")
    scan, gated = mamba2.scan(1, shapes.block_size, False, device, shapes=shapes), mamba2.norm(1, device, shapes=shapes)
    experts = moe.experts(moe.Weights(device, shapes), shapes.block_size)
    gate_weight = torch.randn(shapes.n_routed_experts, shapes.hidden_size, device=device) * shapes.hidden_size**-0.5
    yield "moe layer", partial(moe_layer, experts, residual, gate_weight), alike
    yield "mamba layer", partial(mamba_layer, scan, gated, residual), alike
    others = [
        moe.router(shapes.block_size, device, shapes),
        residual,
        scan,
        gated,
        attention.over_context(1, CONTEXT, BF16, device, shapes=shapes),
        remask.case(1, 0.0, torch.float32, device, shapes=shapes),
    ]
    for case in (experts, *others):
        yield f"{case.op}, {case.shape}", case.programs[OURS], case.check


def bits(result: Any) -> list[Tensor]:
    """Of all tensors of a result."""
    return [leaf.contiguous().view(torch.uint8).clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def in_this(way: Way, program: Program) -> Program:
    def call() -> Any:
        with way.taken():
            return program()

    return call


def compared(name: str, program: Program, check: Check, found: list[Way], seconds: float) -> Iterator[dict[str, Any]]:
    """A row per way: its seconds, or why it was not timed."""
    reference = program()
    expected = bits(reference)
    candidates: dict[str, Program] = {}
    for way in found:
        call = in_this(way, program)
        try:
            result = call()
            if way.same_bits:
                same = all(a.equal(b) for a, b in zip(expected, bits(result), strict=True))
                assert same, "other bits than as shipped"
            else:
                check(result, reference)
        except Exception as error:
            yield {"program": name, "way": way.name, "wrong": timing.said(error)}
            if lost():
                return
        else:
            candidates[way.name] = call
    for way_name, taken in timing.on_gpu(candidates, seconds).items():
        yield {"program": name, "way": way_name, "seconds": taken.median, "low": taken.low, "high": taken.high}


def said(row: dict[str, Any], shipped: float | None) -> str:
    if "wrong" in row:
        return f"{row['program']:44} {row['way']:20} WRONG: {row['wrong']}"
    ratio = f", {shipped / row['seconds']:.3f} × as fast as shipped" if shipped else ""
    return f"{row['program']:44} {row['way']:20} {1e6 * row['seconds']:9.2f} µs{ratio}"


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a way is wrong, LOST if one took the GPU with it, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_switches", description="Which way is faster?")
    parser.add_argument("--shapes", choices=("small", "released"), default="released")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each way of each program")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/switches.json, anew each time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none")
    found = ways()
    rows: list[dict[str, Any]] = []
    print("compared:", ", ".join(way.name for way in found), flush=True)
    for name, program, check in programs("cuda", SMALL if options.shapes == "small" else RELEASED):
        shipped = None
        try:
            for row in compared(name, program, check, found, options.seconds):
                rows.append(row)
                print(said(row, shipped), flush=True)
                shipped = shipped or row.get("seconds")  # what is shipped comes first
        except Exception as error:  # as it is shipped, or while it was timed
            rows.append({"program": name, "way": "", "wrong": timing.said(error)})
            print(said(rows[-1], None), flush=True)
        if options.save:
            write_json(options.save / "switches.json", {"gpu": torch.cuda.get_device_name(), "rows": rows})
        if lost():
            print("the GPU is lost to this process", flush=True)
            return LOST
    return int(any("wrong" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

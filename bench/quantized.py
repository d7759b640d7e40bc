"""How fast quantized weights are beside ours in bfloat16: `python -m bench.quantized`.

The experts of 16 tokens, a projection and the head at the released sizes, and a step of the mid-size model; bfloat16
activations. Everything is compared before it is timed, with what the weights stand for, and timed in turns. Beside them
PyTorch's own product with weights of four bits in groups of 32, and of eight bits, where this PyTorch has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.cases.model import random_model, random_state
from twotower_kernels.bench.cases.moe import Weights
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.bench.measure.clock import interleaved
from twotower_kernels.bench.report.tables import where
from twotower_kernels.model.layers import Linear, Stacked
from twotower_kernels.model.parts import Quantize, formats
from twotower_kernels.quantization import FORMATS
from twotower_kernels.reference import moe

ROWS = 16
OURS = "bfloat16"
Programs = Mapping[str, tuple[Callable[[], Tensor], int]]  # and the bytes of weights that each reads


def quantize_model(model: tt.TwoTowerModel, quantize: Quantize) -> tt.TwoTowerModel:
    """The same model with its weights quantized, as `from_pretrained(quantize=...)` would."""
    format_of = formats(quantize)
    for prefix, module in list(model.named_modules()):
        stacked = isinstance(module, Stacked)
        key = f"{prefix}.0.up_proj.weight" if stacked else f"{prefix}.weight"
        format = format_of(key) if stacked or isinstance(module, Linear) else None
        if format is None:
            continue
        for name in ("up", "down") if stacked else ("weight",):
            weight = tt.quantize(getattr(module, name), format)
            delattr(module, name)
            setattr(module, name, weight)
    return model


def experts() -> Programs:
    w, e = Weights("cpu"), 128
    x = w.normal(ROWS, w.up.shape[2]) * w.up.shape[2] ** 0.5
    route = moe.make_inputs("moe_route", dict(n=ROWS, e=e, top_k=6))["logits"]
    weights, chosen = tt.moe_route(route, top_k=6, scaling=2.5)
    hit = len(chosen.unique())
    programs = {}
    for format in (OURS, *FORMATS):
        up, down = (m if format == OURS else tt.quantize(m, format) for m in (w.up, w.down))
        size = (up.nbytes + down.nbytes) * hit // e
        programs[format] = (lambda up=up, down=down: tt.moe_experts(x, up, down, weights, chosen)), size
    return programs


def linear(outputs: int, inputs: int) -> Programs:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).bfloat16()
    x = torch.randn(ROWS, inputs, generator=generator).bfloat16()
    programs: dict[str, tuple[Callable[[], Tensor], int]] = {OURS: (lambda: tt.linear(x, weight), weight.nbytes)}
    for format in FORMATS:
        packed = tt.quantize(weight, format)
        programs[format] = (lambda packed=packed: tt.linear(x, packed)), packed.nbytes
    programs["PyTorch, bfloat16"] = (lambda: torch.nn.functional.linear(x, weight)), weight.nbytes
    return programs | dict(_peers(x, weight))


def _peers(x: Tensor, weight: Tensor) -> Iterator[tuple[str, tuple[Callable[[], Tensor], int]]]:
    """PyTorch's products with packed weights: internal functions, which torchao calls."""
    int4 = tt.quantize(weight, "int4")
    codes = torch.stack([int4.data & 15, int4.data >> 4], -1).flatten(-2).int()
    scales = int4.scales.bfloat16().T.contiguous()
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()  # [K/32, R, 2]: scale, zero
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    yield "PyTorch, int4", ((lambda: torch._weight_int4pack_mm_for_cpu(x, packed, 32, pairs)), int4.nbytes)
    int8 = tt.quantize(weight, "int8")
    row = int8.scales[:, 0].bfloat16()
    yield "PyTorch, int8", ((lambda: torch._weight_int8pack_mm(x, int8.data, row)), int8.nbytes)


def step() -> Programs:
    plain = random_model(torch.bfloat16, "denoiser")
    block = torch.full((1, ROWS), 3)
    programs = {}
    chosen: dict[str, Quantize] = {OURS: None, "int8": "int8", "int4": "int4"}
    chosen["int4, experts alone"] = {"denoiser.experts": "int4"}
    for format, quantize in chosen.items():
        model = plain if quantize is None else quantize_model(random_model(torch.bfloat16, "denoiser"), quantize)
        state = random_state(model, 1, 1024)
        size = sum(tensor.nbytes for tensor in model.denoiser_tower.state_dict().values())
        programs[format] = (lambda model=model, state=state: model.denoise(block, state, t=1.0)), size
    return programs


def check(programs: Programs) -> None:
    """Formats err as their steps are wide: a share of the whole, in the root mean square."""
    exact = programs[OURS][0]().float()
    for name, (program, _) in programs.items():
        error = (program().float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < (0.05 if "int8" in name or "fp8" in name or "bfloat16" in name else 0.4), (name, float(error))


def table(title: str, programs: Programs, seconds: float, read: float, checked: bool) -> None:
    if checked:
        check(programs)
    taken = interleaved({name: program for name, (program, _) in programs.items()}, seconds)
    print(f"\n{title}\n\n| weights | ms | beside ours in bfloat16 | GB/s | of read |\n|---|---|---|---|---|")
    for name, timing in taken.items():
        rate = programs[name][1] / timing.low / 1e9
        ratio = taken[OURS].low / timing.low
        print(f"| {name} | {timing.low * 1e3:.2f} | {ratio:.2f} × | {rate:.1f} | {rate / read:.0%} |", flush=True)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantized", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each program is timed at least (1)")
    parser.add_argument("--only", choices=("experts", "linear", "head", "step"), help="one part")
    options = parser.parse_args()
    print(where("cpu"))
    read = ceilings.measure().read
    print(f"memory read {read:.1f} GB/s")
    parts: dict[str, tuple[str, Callable[[], Any], bool]] = {
        "experts": ("moe_experts, 16 tokens, 6 of 128 experts, 2688 and 1856", experts, True),
        "linear": ("linear, 16 rows, 2688 to 10304", lambda: linear(10304, 2688), True),
        "head": ("head, 16 rows, 2688 to 131072", lambda: linear(131072, 2688), True),
        "step": ("a denoiser step of the mid-size model, context 1024", step, False),
    }
    for name, (title, make, checked) in parts.items():
        if options.only in (None, name):
            table(title, make(), options.seconds, read, checked)


if __name__ == "__main__":
    main()

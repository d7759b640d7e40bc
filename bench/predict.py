"""A model's cost on a machine, predicted: `python -m bench.predict --machine h200 --context 32768`.

`--check` prints the measured cases of a saved run beside their predictions instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import twotower_kernels as tt
from twotower_kernels.bench.costs.cost_model import Call, Checked, Prediction, check, forward, predict, seconds, total
from twotower_kernels.bench.costs.machines import MACHINES, Machine, measured
from twotower_kernels.bench.sizes.configs import config
from twotower_kernels.options.flags import integer, number
from twotower_kernels.options.units import size

LOCAL = Path(__file__).parent / "results" / "cpu" / "avx512bf16.json"


def table_of_step(calls: Sequence[Call], machine: Machine) -> Table:
    found = Table("op", title="one denoiser step")
    for name in ("calls", "MB", "GFLOP", "µs", "share"):
        found.add_column(name, justify="right")
    whole = seconds(calls, machine)
    for op in dict.fromkeys(call.op for call in calls):
        some = [call for call in calls if call.op == op]
        cost, time = total(some), seconds(some, machine)
        share = f"{100 * time / whole:.1f} %"
        found.add_row(
            op, str(len(some)), f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.2f}", f"{time * 1e6:.0f}", share
        )
    cost = total(calls)
    found.add_row(
        "all", str(len(calls)), f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.2f}", f"{whole * 1e6:.0f}", ""
    )
    return found


def facts(p: Prediction, machine: Machine, tokens_per_nfe: Sequence[float]) -> Table:
    found = Table(box=None, show_header=False, pad_edge=False)
    found.add_row("denoiser step, remask, commit", f"{p.step * 1e3:.2f}, {p.remask * 1e3:.2f}, {p.commit * 1e3:.2f} ms")
    for n in tokens_per_nfe:
        found.add_row(f"block diffusion at {n:g} tokens per NFE", f"{p.diffusion_rate(n):.1f} tokens per second")
    found.add_row("autoregressive", f"{p.ar_rate:.1f} tokens per second")
    found.add_row("the denoiser as a next-token model", f"{p.batch / p.mock_ar:.1f} tokens per second")
    even = p.break_even
    found.add_row("diffusion is faster from", "never" if even is None else f"{even:.2f} tokens per NFE")
    for tower, needed in enumerate(p.memory):
        fits = "" if needed <= machine.memory else ": does not fit"
        device = "weights and context" + ("" if len(p.memory) == 1 else f", {('context', 'denoiser')[tower]} tower")
        found.add_row(device, f"{size(needed)} of {size(int(machine.memory))}{fits}")
    return found


def table_of_check(rows: Sequence[Checked]) -> Table:
    found = Table("op", "shape", "dtype")
    for name in ("predicted, µs", "measured, µs", "measured / predicted"):
        found.add_column(name, justify="right")
    for row in rows:
        ratio = f"{row.measured / row.predicted:.2f}"
        found.add_row(row.op, row.shape, row.dtype, f"{row.predicted * 1e6:.0f}", f"{row.measured * 1e6:.0f}", ratio)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description="What a TwoTower costs, predicted.")
    parser.add_argument(
        "--machine",
        choices=(*MACHINES, "local"),
        default="h200",
        help="local: that of --run (default: h200)",
    )
    parser.add_argument("--run", type=Path, default=LOCAL, metavar="FILE", help="the saved run that local stands for")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.json (default: the released model's size)"
    )
    parser.add_argument("--batch", type=integer(1, 2**16), default=1, metavar="N", help="rows (default: 1)")
    parser.add_argument(
        "--context", type=integer(0, 2**24), default=4096, metavar="N", help="tokens per row (default: 4096)"
    )
    parser.add_argument("--block", type=integer(1, 2**16), default=16, metavar="N", help="tokens in it (default: 16)")
    parser.add_argument(
        "--tokens-per-nfe",
        type=number(above=0),
        action="append",
        metavar="X",
        help="that a call brings (default: 1, 2 and 4)",
    )
    parser.add_argument(
        "--experts-hit",
        type=number(0),
        metavar="X",
        help="per layer, by a block (default: even routing)",
    )
    parser.add_argument("--apart", action="store_true", help="the towers on two devices")
    parser.add_argument("--check", action="store_true", help="the saved run's cases, predicted and measured, instead")
    options = parser.parse_args(argv)
    tokens_per_nfe = options.tokens_per_nfe or [1.0, 2.0, 4.0]
    try:
        local = options.check or options.machine == "local"
        machine = measured(options.run) if local else MACHINES[options.machine]
        c = config() if options.config is None else tt.TwoTowerConfig.from_file(options.config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    reached = f"{machine.read / 1e9:.0f} GB/s, {machine.flops['bfloat16'] / 1e12:.4g} TFLOP/s in bfloat16"
    console.print(f"{machine.name}: {reached}, {machine.launch * 1e6:.0f} µs per launch ({machine.source}).")
    if options.check:
        run = json.loads(options.run.read_text(encoding="utf-8"))
        console.print(table_of_check(check(run, machine)))
        return
    sizes = options.batch, options.context
    hit = options.experts_hit
    console.print(
        table_of_step(forward(c, "denoiser", options.batch, options.block, options.context, hit=hit), machine)
    )
    p = predict(c, machine, *sizes, options.block, apart=options.apart, hit=hit)
    console.print(facts(p, machine, tokens_per_nfe))


if __name__ == "__main__":
    main()

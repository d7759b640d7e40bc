"""The released model's size with random weights on one GPU: `python -m bench.gpu_model`.

Both towers in bfloat16 take 126 GB. Where that does not fit, the layers are as many as do, of the same pattern, and the
table says how many. A denoiser step is timed as it runs in generation, replayed from a CUDA graph, beside the bytes
that it must read: the weights of the layers it computes and of the experts that its tokens hit, keys, values, states.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from bench import ceilings, report
from bench.bench_model import random_state
from bench.configs import RELEASED, config
from bench.cost_model import forward, total, weights
from twotower_kernels import layers
from twotower_kernels.capture import CapturedDenoiser
from twotower_kernels.state import logits

BLOCK = 16


def largest(free: int) -> str:
    """The longest beginning of the released pattern whose two towers leave a tenth of the memory free."""
    for n in range(len(RELEASED), 0, -1):
        if sum(weights(config(RELEASED[:n])).values()) < 0.9 * free:
            return RELEASED[:n]
    raise SystemExit(f"no layer fits into {free / 1e9:.0f} GB")


def median(call: Callable[[], Any], times: int = 20) -> float:
    """Seconds per call, by device events."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@contextmanager
def routes() -> Iterator[list[Tensor]]:
    """The experts that every router chooses meanwhile."""
    found: list[Tensor] = []
    before = layers.moe_router

    def moe_router(*arguments: Any, **options: Any) -> Any:
        result = before(*arguments, **options)
        found.append(result[1])
        return result

    layers.moe_router = moe_router
    try:
        yield found
    finally:
        layers.moe_router = before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/model.json")
    options = parser.parse_args()
    limits = ceilings.measure("cuda")
    print(report.heading(limits))
    free, _ = torch.cuda.mem_get_info()
    c = config(largest(free))
    model = tt.TwoTowerModel(c, device="cuda", dtype=torch.bfloat16)
    print(f"{len(c.hybrid_override_pattern)} of {len(RELEASED)} layers, {sum(weights(c).values()) / 1e9:.1f} GB")
    rows = []
    with torch.inference_mode():
        for batch, context in ((1, 4096), (1, 131072), (4, 4096), (16, 4096)):
            state = random_state(model, batch, context)
            ids = torch.randint(c.vocab_size, (batch, BLOCK), device="cuda")
            t = torch.linspace(0.25, 1, batch, device="cuda")
            with routes() as found:
                model.denoise(ids, state, t)
            hit = [len(experts.unique()) for experts in found]
            denoise = CapturedDenoiser(model)
            seconds = median(lambda d=denoise, i=ids, s=state, t=t: d(i, s, t))  # type: ignore[misc]
            moved = total(forward(c, "denoiser", batch, BLOCK, context, hit=statistics.mean(hit) if hit else 0)).bytes
            one, states = ids[:, :1].contiguous(), [state]
            del state

            def ar_step(one: Tensor = one, states: list[tt.ContextState] = states) -> Tensor:
                states.append(model.commit(one, states.pop()))
                return logits(states[0].last_hidden, model.context_lm_head.weight)

            ar = median(ar_step, times=5)
            floor = moved / limits.read / 1e9
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "step seconds": seconds,
                    "bytes": moved,
                    "floor seconds": floor,
                    "experts hit per layer": statistics.mean(hit) if hit else 0,
                    "autoregressive step seconds": ar,
                    "tokens per second at 1, 2, 4 tokens per NFE": [batch * n / seconds for n in (1, 2, 4)],
                }
            )
            print(
                f"B {batch:2}, context {context:6}: step {seconds * 1e3:7.2f} ms = {seconds / floor:.2f} × its bytes "
                f"({moved / 1e9:.1f} GB, {rows[-1]['experts hit per layer']:.0f} experts hit), AR {ar * 1e3:7.2f} ms"
            )
            del states, denoise
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        whole = {"machine": report.machine("cuda"), "layers": c.hybrid_override_pattern, "results": rows}
        (options.save / "model.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

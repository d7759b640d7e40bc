"""The released model's size with random weights on one GPU: `python -m bench.gpu_model`.

Both towers in bfloat16 take 126 GB. Where that does not fit, the layers are as many as do, of the same pattern, and the
table says how many. A denoiser step, the commit of a block and an autoregressive step are timed as they run in
generation, replayed from CUDA graphs, beside the bytes that each must read: the weights of the layers it computes and
of the experts that its tokens hit, keys, values, states. What a replay gives must be to the bit what the model gives.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.cases.model import BLOCK, random_model, random_state
from twotower_kernels.bench.costs.cost_model import forward, total, weights
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.bench.measure.gpu_clock import median
from twotower_kernels.bench.measure.switches import ways
from twotower_kernels.bench.measure.timing import said
from twotower_kernels.bench.report import tables
from twotower_kernels.bench.report.saved import write_json
from twotower_kernels.bench.sizes.configs import RELEASED, config
from twotower_kernels.model import layers
from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.model.state import logits

SIZES = ((1, 4096), (1, 131072), (4, 4096), (16, 4096))  # batch, context
TOKENS_PER_NFE = (1, 2, 4)


def largest(free: int) -> str:
    """The longest beginning of the released pattern whose two towers leave a tenth of the memory free."""
    for n in range(len(RELEASED), 0, -1):
        if sum(weights(config(RELEASED[:n])).values()) < 0.9 * free:
            return RELEASED[:n]
    raise SystemExit(f"no layer fits into {free / 1e9:.0f} GB")


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


def experts_hit(call: Callable[[], Any]) -> float:
    """Distinct experts that a call's tokens go to, per layer; 0 without such layers."""
    with routes() as found:
        call()
    return statistics.mean(len(experts.unique()) for experts in found) if found else 0.0


def step_by_way(
    model: tt.TwoTowerModel, step: Callable[[CapturedModel], Tensor], plain: Tensor
) -> dict[str, float | str]:
    """Seconds of a step with every value of the constants in `measure.switches`, or what is wrong with it; nothing,
    where there are none to compare."""
    found: dict[str, float | str] = {}
    for way in ways()[1:]:
        graphs = CapturedModel(model)
        try:
            with way.taken():
                for _ in range(2):  # the second call records
                    replayed = step(graphs)
            assert replayed.equal(plain) or not way.same_bits, "other bits than as shipped"
            found[way.name] = median(lambda graphs=graphs: step(graphs))
        except Exception as error:
            found[way.name] = said(error)
            if lost():
                break
    return found


def _milliseconds(found: float | str) -> str:
    return f"WRONG: {found}" if isinstance(found, str) else f"{found * 1e3:.2f} ms"


class Measured:
    """A model's three kinds of pass at one batch and context: seconds, and the least bytes that each must move."""

    def __init__(self, model: tt.TwoTowerModel, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        captured, c = CapturedModel(model), model.config
        state = random_state(model, batch, context)
        device = state.lengths.device
        ids = torch.randint(c.vocab_size, (batch, BLOCK), device=device)
        t = torch.linspace(0.25, 1, batch, device=device)
        self.hit = experts_hit(lambda: model.denoise(ids, state, t))
        for _ in range(2):  # the second call records
            replayed = captured.denoise(ids, state, t)
        plain = model.denoise(ids, state, t)
        assert plain.isfinite().all(), "logits that are not finite"
        assert replayed.equal(plain), "a replayed step differs from the model's"
        self.step = median(lambda: captured.denoise(ids, state, t))
        self.moved = total(forward(c, "denoiser", batch, BLOCK, context, hit=self.hit)).bytes
        self.by_way = step_by_way(model, lambda graphs: graphs.denoise(ids, state, t), plain)
        states = [state]

        def commit(ids: Tensor) -> Tensor:
            states.append(captured.commit(ids, states.pop()))
            return states[0].last_hidden

        one = ids[:, :1].contiguous()
        for _ in range(2):
            commit(ids)
        self.commit = median(lambda: commit(ids), times=5)
        for _ in range(2):
            commit(one)
        self.ar_hit = experts_hit(lambda: model.commit(one, states[0].fork(1)))
        self.ar_step = median(lambda: logits(commit(one), model.context_lm_head.weight), times=10)
        self.ar_moved = total(forward(c, "context", batch, 1, context, hit=self.ar_hit)).bytes

    def tokens_per_second(self, tokens_per_nfe: float) -> float:
        """Of the batch by block diffusion: the steps of a block and its commit."""
        return self.batch * BLOCK / (BLOCK / tokens_per_nfe * self.step + self.commit)

    def entry(self, limits: Ceilings) -> dict[str, Any]:
        """As it is saved."""
        read = limits.read * 1e9
        return {
            "batch": self.batch,
            "context": self.context,
            "step seconds": self.step,
            "step seconds by way": self.by_way,
            "bytes": self.moved,
            "floor seconds": self.moved / read,
            "experts hit per layer": self.hit,
            "commit seconds": self.commit,
            "autoregressive step seconds": self.ar_step,
            "autoregressive bytes": self.ar_moved,
            "autoregressive floor seconds": self.ar_moved / read,
            "autoregressive experts hit per layer": self.ar_hit,
            "autoregressive tokens per second": self.batch / self.ar_step,
            "tokens per second at tokens per NFE": {str(n): self.tokens_per_second(n) for n in TOKENS_PER_NFE},
        }

    def line(self, limits: Ceilings) -> str:
        step, ar = (moved / limits.read / 1e9 for moved in (self.moved, self.ar_moved))
        rates = ", ".join(f"{self.tokens_per_second(n):.0f} at {n} per NFE" for n in TOKENS_PER_NFE)
        return (
            f"B {self.batch:2}, context {self.context:6}: "
            f"step {self.step * 1e3:.2f} ms = {self.step / step:.2f} × its {self.moved / 1e9:.1f} GB "
            f"({self.hit:.0f} experts hit); commit {self.commit * 1e3:.2f} ms; "
            f"AR {self.ar_step * 1e3:.2f} ms = {self.ar_step / ar:.2f} × its {self.ar_moved / 1e9:.1f} GB; "
            f"tokens/s: AR {self.batch / self.ar_step:.0f}, {rates}"
        ) + "".join(f"\n    step, {way}: {_milliseconds(found)}" for way, found in self.by_way.items())


def size(text: str) -> tuple[int, int]:
    """Batch and context, from "1,4096"."""
    batch, context = map(int, text.split(","))
    return batch, context


def main(arguments: list[str] | None = None) -> int:
    """Returns how many sizes failed; LOST if one took the GPU with it, and so those behind it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/model.json, anew after every line")
    parser.add_argument(
        "--size",
        type=size,
        action="append",
        metavar="BATCH,CONTEXT",
        help="measured; may be given again",
    )
    options = parser.parse_args(arguments)
    limits = ceilings.measure("cuda")
    print(tables.heading(limits), flush=True)
    torch.cuda.empty_cache()  # the ceilings' buffers: the model fits by less than they take
    free, _ = torch.cuda.mem_get_info()
    c = config(largest(free))
    model = random_model(torch.bfloat16, "both", c, device="cuda")
    print(f"{len(c.hybrid_override_pattern)} of {len(RELEASED)} layers, {sum(weights(c).values()) / 1e9:.1f} GB")
    entries, failed = [], 0
    with torch.inference_mode():
        for batch, context in options.size or SIZES:
            try:
                measured = Measured(model, batch, context)
            except Exception as error:  # too little memory for one size is no reason to leave out the next
                print(f"FAILED B {batch}, context {context}: {said(error)}", flush=True)
                failed += 1
                if lost():
                    return LOST
                continue
            entries.append(measured.entry(limits))
            print(measured.line(limits), flush=True)
            if options.save:
                whole = {"machine": tables.machine("cuda"), "ceilings": vars(limits)}
                whole |= {"layers": c.hybrid_override_pattern, "results": entries}
                write_json(options.save / "model.json", whole)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

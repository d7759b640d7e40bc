"""What a call costs: `python -m bench.calls`.

Every public operation on a few numbers, so that next to nothing is computed, beside the nearest that PyTorch has: one
function where there is one, else the shortest chain of them. Each is called in short runs, ours and theirs in turns,
and the fastest run counts, which other work on the machine disturbs least. One thread; outside and inside of
`torch.inference_mode`. With the dispatcher: the same call where something lies between (`ops/_direct.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import twotower_kernels as tt
from twotower_kernels.bench.report.tables import where
from twotower_kernels.ops import _direct

CALLS, RUNS = 100, 300  # calls in a run, runs of each program
Program = Callable[[], object]


def pairs() -> dict[str, tuple[Program, str, Program]]:
    """Per operation our call, PyTorch's nearest as text, and that as a call."""
    torch.manual_seed(0)
    row, matrix, vector = torch.randn(1, 64), torch.randn(64, 64), torch.randn(64)
    x, y = torch.randn(1, 16, 64), torch.randn(1, 16, 64)
    gate, shift, scale = torch.randn(3, 1, 64)
    logits = torch.randn(1, 64)
    q, k = torch.randn(1, 16, 4, 32), torch.randn(1, 16, 2, 32)
    q_t, k_t = q.transpose(1, 2), k.transpose(1, 2)
    storage = torch.zeros(2, 1, 256, 2, 32)
    lengths = torch.tensor([7])
    out, lse = torch.randn(1, 16, 4, 32), torch.randn(1, 16, 4)
    experts = torch.randint(8, (16, 2), dtype=torch.int32)
    up, down, weights = torch.randn(8, 32, 64), torch.randn(8, 64, 32), torch.rand(16, 2)
    block, masks = torch.randn(1, 16, 300), torch.full((1, 16), 299)

    def looped() -> object:
        total = torch.zeros(16, 64)
        for expert in experts.unique().tolist():
            token, choice = torch.where(experts == expert)
            y = F.linear(F.linear(x[0][token], up[expert]).relu().square(), down[expert])
            total.index_add_(0, token, y * weights[token, choice, None])
        return total

    def routed() -> object:
        found, chosen = logits.sigmoid().topk(6)
        return found / found.sum(-1, keepdim=True), chosen

    def copied() -> object:
        storage[0][:, 7:23].copy_(k)
        return storage[1][:, 7:23].copy_(k)

    def merged() -> object:
        total = torch.logaddexp(lse, lse)
        return out * (lse - total).exp()[..., None] + out * (lse - total).exp()[..., None], total

    def remasked() -> object:
        p = block.softmax(-1)
        confidence, candidate = p.max(-1)
        entropy = -(p * p.log()).sum(-1)
        waits = masks == 299
        best = torch.where(waits, confidence, -1.0).topk(4).indices
        transfer = torch.zeros_like(waits).scatter_(1, best, True) & waits
        tokens = torch.where(transfer, candidate, masks)
        left = (tokens == 299).sum(-1)
        return tokens, transfer, candidate, confidence, entropy, left, left == 0

    return {
        "linear": (lambda: tt.linear(row, matrix), "F.linear", lambda: F.linear(row, matrix)),
        "rms_norm": (
            lambda: tt.rms_norm(row, vector, eps=1e-5),
            "F.rms_norm",
            lambda: F.rms_norm(row, (64,), vector, 1e-5),
        ),
        "adaln_norm": (
            lambda: tt.adaln_norm(x, vector, shift, scale, eps=1e-5),
            "F.rms_norm of x * (1 + scale) + shift",
            lambda: F.rms_norm(x * (1 + scale[:, None]) + shift[:, None], (64,), vector, 1e-5),
        ),
        "gated_residual": (lambda: tt.gated_residual(x, y, gate), "x + gate * y", lambda: x + gate[:, None] * y),
        "gated_rms_norm": (
            lambda: tt.gated_rms_norm(x, y, vector, n_groups=2, eps=1e-5),
            "F.rms_norm of x * silu(y) per group, times the weight",
            lambda: F.rms_norm((x * F.silu(y)).unflatten(-1, (2, 32)), (32,), None, 1e-5).flatten(-2) * vector,
        ),
        "moe_gate": (
            lambda: tt.moe_gate(row, matrix),
            "F.linear in float64",
            lambda: F.linear(row.double(), matrix.double()),
        ),
        "moe_route": (lambda: tt.moe_route(logits, top_k=6), "sigmoid, topk, sum, division", routed),
        "moe_plan": (
            lambda: tt.moe_plan(experts, 8),
            "bincount, cumsum, argsort",
            lambda: (experts.flatten().bincount(minlength=8).cumsum(0), experts.flatten().argsort(stable=True)),
        ),
        "moe_experts": (
            lambda: tt.moe_experts(x[0], up, down, weights, experts),
            "a loop over the experts that tokens chose",
            looped,
        ),
        "block_attention": (
            lambda: tt.block_attention(q, k, k),
            "F.scaled_dot_product_attention",
            lambda: F.scaled_dot_product_attention(q_t, k_t, k_t, enable_gqa=True),
        ),
        "append_kv": (lambda: tt.append_kv(*storage, k, k, lengths), "two copy_ into slices", copied),
        "merge_attention": (lambda: tt.merge_attention(out, lse, out, lse), "logaddexp, exp, products, sum", merged),
        "remask": (
            lambda: tt.remask(block, masks, mask_token_id=299, num_steps=4),
            "softmax, max, entropy, topk, scatter, where",
            remasked,
        ),
    }


def fastest(programs: list[Program]) -> list[float]:
    """Microseconds of a call of each."""
    best = [float("inf")] * len(programs)
    for _ in range(RUNS):
        for n, program in enumerate(programs):
            start = time.perf_counter()
            for _ in range(CALLS):
                program()
            best[n] = min(best[n], (time.perf_counter() - start) / CALLS)
    return [seconds * 1e6 for seconds in best]


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    lines = [
        "| operation | ours, µs | through the dispatcher | PyTorch, µs | PyTorch's nearest |",
        "|---|---|---|---|---|",
    ]
    for name, (ours, nearest, theirs) in pairs().items():
        ours_us, theirs_us = fastest([ours, theirs])
        with _direct.off():
            (dispatched_us,) = fastest([ours])
        lines.append(f"| {name} | {ours_us:.1f} | {dispatched_us:.1f} | {theirs_us:.1f} | {nearest} |")
    return lines


def main() -> None:
    """The program."""
    argparse.ArgumentParser(prog="python -m bench.calls", description=str(__doc__).splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print(where("cpu"))
    for inference in (False, True):
        with torch.inference_mode(inference):
            print(f"\n{'torch.inference_mode' if inference else 'without a mode'}\n")
            print(*table(), sep="\n", flush=True)


if __name__ == "__main__":
    main()

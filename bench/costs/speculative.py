"""What speculative decoding costs on a machine, and from how many accepted tokens on it pays: by the cost model."""

from __future__ import annotations

from dataclasses import dataclass

import twotower_kernels as tt
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.costs.cost_model import Call, forward, seconds
from twotower_kernels.bench.costs.machines import Machine


@dataclass(frozen=True)
class Rounds:
    """Seconds of a batch's passes.

    Attributes:
        size: tokens of a draft, the known one included.
        draft: a denoiser call and the choice after it.
        verification: the context tower over the draft with the logits of every position, its choice, and Mamba-2's
            scans once more for what was accepted.
        ar: one token of every row by the context tower alone.
    """

    size: int
    draft: float
    verification: float
    ar: float

    def break_even(self, draft_steps: int = 1) -> float | None:
        """The tokens per verification from which a round is faster than autoregression; None: a whole draft would not
        be."""
        found = (draft_steps * self.draft + self.verification) / self.ar
        return found if found <= self.size else None

    def speedup(self, accepted: float, draft_steps: int = 1) -> float:
        """Over autoregression, at so many tokens per verification."""
        return accepted * self.ar / (draft_steps * self.draft + self.verification)


def rounds(
    c: tt.TwoTowerConfig,
    machine: Machine,
    batch: int = 1,
    context: int = 4096,
    size: int = 16,
    hit: float | None = None,
) -> Rounds:
    """In bfloat16. `hit`: distinct experts that a batch of drafts uses per layer, at most what even routing would use,
    which is assumed where it is None; a token by itself uses those that it is routed to."""

    dtype = "bfloat16"

    def chosen(length: int) -> Call:
        return Call("remask", costs.remask(batch, length, c.vocab_size), "float32")

    scan = batch, size, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups, c.conv_kernel
    again = Call("mamba2_scan", costs.mamba2_scan(*scan, context > 0, True), costs.arithmetic("mamba2_scan", dtype))
    even = costs.experts_hit(c.n_routed_experts, c.num_experts_per_tok, batch * size)
    hit = even if hit is None else min(hit, even)
    draft = forward(c, "denoiser", batch, size, context, hit=hit)
    verification = forward(c, "context", batch, size, context, heads=size, hit=hit)
    return Rounds(
        size=size,
        draft=seconds([*draft, chosen(size)], machine),
        verification=seconds([*verification, chosen(size), *[again] * c.hybrid_override_pattern.count("M")], machine),
        ar=seconds([*forward(c, "context", batch, 1, context, heads=1), chosen(1)], machine),
    )

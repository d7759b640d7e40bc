"""Right remasking steps: position by position, and all at once."""

from __future__ import annotations

import torch
from torch import Tensor

import twotower_kernels as tt
from tests.testing.plain.remask import Remask
from tests.testing.right.collection import right


def greedy(logits: Tensor, tokens: Tensor, *, mask_token_id: int, step: int = 0, num_steps: int = 1) -> tt.RemaskResult:
    """The default policy without noise, all positions at once, log-softmax first."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(wide).index_fill(2, torch.tensor([mask_token_id]), -torch.inf)
    waiting, usable = tokens == mask_token_id, z.amax(2).isfinite()
    log_p = z.log_softmax(2)
    candidate = z.argmax(2)
    confidence = log_p.gather(2, candidate[..., None])[..., 0].exp()
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(2)
    bad = waiting & ~usable
    steps = (torch.as_tensor(x).expand(len(tokens)) for x in (step, num_steps))
    i, n = steps
    due = -(-waiting.sum(1) // (n - i).clamp(min=1))
    rank = confidence.where(waiting & usable, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
    chosen = waiting & usable & (rank < due[:, None].clamp(min=1))
    after = torch.where(chosen, candidate, tokens).to(tokens.dtype)
    left = (after == mask_token_id).sum(1)
    numbers = (x.masked_fill(~waiting, 0).masked_fill(bad, torch.nan) for x in (confidence, entropy))
    return tt.RemaskResult(after, chosen, candidate.masked_fill(~waiting | bad, -1), *numbers, left, left == 0)


right("remask", Remask(), "Remask")
right("remask", greedy)

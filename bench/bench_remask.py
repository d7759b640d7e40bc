"""Remasking against PyTorch's softmax, top-k and sampling: `python -m bench.bench_remask`."""

import torch

import twotower_kernels as tt
from bench.timing import Report
from reference import remask as specification

THRESHOLD = 0.8


def eager(logits, tokens, *, mask_token_id, step, num_steps, **_):  # type: ignore[no-untyped-def]
    """TwoTower's greedy rule as one writes it: the whole softmax, then the best of every row."""
    z = logits.float().index_fill(2, torch.tensor([mask_token_id]), -torch.inf)
    confidence, candidate = z.softmax(-1).max(-1)
    return commit(tokens, mask_token_id, confidence, candidate, step, num_steps)


def careful(logits, tokens, *, mask_token_id, step, num_steps, **_):  # type: ignore[no-untyped-def]
    """The same with one number per position instead of the softmax: the best that PyTorch's operations allow."""
    keep = logits[..., mask_token_id].clone()
    logits[..., mask_token_id] = -torch.inf
    best, candidate = logits.max(-1)
    confidence = (best.float() - logits.logsumexp(-1).float()).exp()
    logits[..., mask_token_id] = keep
    return commit(tokens, mask_token_id, confidence, candidate, step, num_steps)


def sampled(logits, tokens, *, mask_token_id, step, num_steps, temperature, **_):  # type: ignore[no-untyped-def]
    """The rule with samples instead of the argmax: noise of PyTorch's generator, all of it in memory."""
    z = logits.float().index_fill(2, torch.tensor([mask_token_id]), -torch.inf)
    candidate = (z / temperature - torch.empty_like(z).exponential_().log()).argmax(-1)
    confidence = z.softmax(-1).gather(2, candidate[..., None])[..., 0]
    return commit(tokens, mask_token_id, confidence, candidate, step, num_steps)


def commit(tokens, mask_token_id, confidence, candidate, step, num_steps):  # type: ignore[no-untyped-def]
    masked = tokens == mask_token_id
    score = torch.where(masked, confidence, -torch.inf)
    n = masked.sum(1, keepdim=True)
    q = torch.maximum((n + num_steps - step - 1) // (num_steps - step), (score > THRESHOLD).sum(1, keepdim=True))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return torch.where(masked & (rank < q), candidate, tokens)


def main() -> None:
    report = Report("remask, TwoTower's rule, V = 131072")
    policy = tt.RemaskPolicy.twotower(THRESHOLD)
    for dtype in (torch.bfloat16, torch.float32):
        for batch, temperature in ((1, 0.0), (8, 0.0), (1, 1.0)):
            case = dict(batch=batch, block=16, vocab=131072, num_steps=16, step=2, temperature=temperature)
            inputs = specification.make_inputs("remask", case, dtype=dtype) | {"policy": policy}
            ours = tt.remask(**inputs)
            rivals = {"PyTorch eager": sampled} if temperature else {"PyTorch eager": eager, "PyTorch careful": careful}
            if not temperature:  # the draws of the sampled rival are its own
                assert torch.equal(ours.tokens, eager(**inputs))
            report.add(
                f"[{batch}, 16, 131072] {dtype}{', sampled' if temperature else ''}",
                {"twotower_kernels": lambda i=inputs: tt.remask(**i)}
                | {name: lambda i=inputs, f=rival: f(**i) for name, rival in rivals.items()},
                bytes=inputs["logits"].numel() * inputs["logits"].element_size(),
            )
    report.show()


if __name__ == "__main__":
    main()

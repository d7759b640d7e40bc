"""Remasking against PyTorch's softmax, top-k and sampling: `python -m bench.bench_remask`.

Two rivals per case. "original style" is how decoding loops are published: the logits cloned, the whole softmax, then a
loop over the rows. "PyTorch, best" is the least work that PyTorch's operations allow: one maximum and one logsumexp per
position, in greedy cases also compiled. Every rival's tokens are compared with ours before it is timed; what draws with
a generator of its own is compared where its draw is handed to us.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from bench.timing import Report, interleaved
from reference import remask as specification

MASK, THRESHOLD, STEP, STEPS = 3, 0.8, 2, 16


def original(logits: Tensor, tokens: Tensor, candidate: Tensor | None = None, **sampling: Any) -> Tensor:
    """A decoding loop as published: a copy of the logits, all probabilities, one row after the other."""
    z = logits.clone().float()
    z[..., MASK] = -torch.inf
    p = torch.softmax(z, -1)
    if sampling:
        q = torch.softmax(_filtered(z / sampling["temperature"], sampling), -1)
        drawn = torch.multinomial(q.flatten(0, 1), 1).view(tokens.shape)
        candidate = drawn if candidate is None else candidate
        confidence = p.gather(2, candidate[..., None])[..., 0]
    else:
        confidence, candidate = p.max(-1)
    out = tokens.clone()
    for b in range(tokens.shape[0]):
        waits = (tokens[b] == MASK).nonzero()[:, 0]
        if len(waits) == 0:
            continue
        c = confidence[b, waits]
        n = max(1, int((c > THRESHOLD).sum()), -(-len(waits) // (STEPS - STEP)))
        chosen = waits[c.topk(n).indices]
        out[b, chosen] = candidate[b, chosen]
    return out


def careful(logits: Tensor, tokens: Tensor, _candidate: Tensor | None = None) -> Tensor:
    """One number per position instead of the softmax; the mask token's logits are put back afterwards."""
    keep = logits[..., MASK].clone()
    logits[..., MASK] = -torch.inf
    confidence, candidate = best_of(logits)
    logits[..., MASK] = keep
    return commit(tokens, confidence, candidate)


def best_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, candidate = logits.max(-1)
    return (best.float() - logits.float().logsumexp(-1)).exp(), candidate


compiled_best_of = torch.compile(best_of, dynamic=False)


def compiled(logits: Tensor, tokens: Tensor, _candidate: Tensor | None = None) -> Tensor:
    keep = logits[..., MASK].clone()
    logits[..., MASK] = -torch.inf
    confidence, candidate = compiled_best_of(logits)
    logits[..., MASK] = keep
    return commit(tokens, confidence, candidate)


def gumbel(logits: Tensor, tokens: Tensor, candidate: Tensor | None = None, **sampling: Any) -> Tensor:
    """Samples by Gumbel noise: PyTorch's exponential numbers divide the probabilities."""
    keep = logits[..., MASK].clone()
    logits[..., MASK] = -torch.inf
    z = logits if sampling["temperature"] == 1 else logits / sampling["temperature"]
    z = _filtered(z, sampling)
    drawn = (z - torch.empty_like(z, dtype=torch.float32).exponential_().log_()).argmax(-1)
    candidate = drawn if candidate is None else candidate
    chosen = logits.gather(2, candidate[..., None])[..., 0].float()
    confidence = (chosen - logits.float().logsumexp(-1)).exp()
    logits[..., MASK] = keep
    return commit(tokens, confidence, candidate)


def _filtered(z: Tensor, sampling: dict[str, Any]) -> Tensor:
    """Top-k by topk, top-p by a sort of the vocabulary."""
    if k := sampling.get("top_k"):
        z = z.masked_fill(z < z.topk(k).values[..., -1:], -torch.inf)
    if p := sampling.get("top_p"):
        ordered = z.sort(-1, descending=True).values
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        last = ordered.masked_fill(before > p, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < last, -torch.inf)
    return z


def commit(tokens: Tensor, confidence: Tensor, candidate: Tensor) -> Tensor:
    masked = tokens == MASK
    score = torch.where(masked, confidence, -torch.inf)
    n = masked.sum(1, keepdim=True)
    q = torch.maximum((n + STEPS - STEP - 1) // (STEPS - STEP), (score > THRESHOLD).sum(1, keepdim=True))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return torch.where(masked & (rank < q), candidate, tokens)


def read(logits: Tensor) -> Callable[[], Any]:
    """Reading as many bytes and no more: a sum, in pieces that PyTorch deals out to its threads."""
    rows = logits.view(torch.int64).flatten(0, 1)
    return lambda: rows.sum(-1)


def main() -> None:
    report = Report("remask, TwoTower's rule, V = 131072")
    policy = tt.RemaskPolicy.twotower(THRESHOLD)
    samplings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.9},
    )
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 16):
            case = dict(batch=batch, block=16, vocab=131072, num_steps=STEPS, step=STEP)
            inputs = specification.make_inputs("remask", case, dtype=dtype) | {"policy": policy}
            logits, tokens = inputs["logits"], inputs["tokens"]
            size = logits.numel() * logits.element_size()
            reading = statistics.median(interleaved({"read": read(logits)}, seconds=0.5)["read"])
            for sampling in samplings:
                if batch > 1 and len(sampling) > 1:
                    continue  # a minute per call of the rivals
                ours = tt.remask(**inputs, **sampling)
                rivals = {"original style": original, "PyTorch, best": gumbel if sampling else careful}
                if not sampling:
                    rivals["PyTorch, compiled"] = compiled
                for name, rival in rivals.items():
                    result = rival(logits, tokens, ours.candidate, **sampling)
                    assert torch.equal(result, ours.tokens), f"{name} disagrees"
                words = ", ".join(f"{key} {value}" for key, value in sampling.items()) or "greedy"
                report.add(
                    f"[{batch}, 16, 131072] {str(dtype)[6:]}, {words}",
                    {"twotower_kernels": lambda i=inputs, s=sampling: tt.remask(**i, **s)}
                    | {n: lambda f=f, a=(logits, tokens), s=sampling: f(*a, **s) for n, f in rivals.items()},
                    bytes=size,
                )
            shares.append(f"[{batch}, 16, 131072] {str(dtype)[6:]}: read in {reading * 1e6:.0f} µs")
    report.show()
    print("Reading alone, the bound where logits do not fit a cache:", *shares, sep="\n  ")


if __name__ == "__main__":
    with torch.inference_mode():  # as the model runs
        main()

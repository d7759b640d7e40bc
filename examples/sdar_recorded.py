"""SDAR's `block_diffusion_generate` to the last token, overwritten ones included: what recordings are compared with.

The original counts how many tokens a step commits from the length of the block. Where fewer masks are left, its
`torch.topk`, of confidences that are -inf where no mask is, or its window behind the first mask reaches tokens that are
committed already, and they are overwritten by the candidates of this step. Our policies leave them alone, so
`Sdar.generate` differs from there on. With prompts of whole blocks this happens to "low_confidence_dynamic" alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from examples.sdar import Sdar, policy


@torch.no_grad()
def generate(
    model: Sdar,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    denoising_steps: int,
    strategy: str,
    confidence_threshold: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stopping_criteria_idx: list[int] | None = None,
) -> tuple[Tensor, int]:
    """Tokens `[B, T]` for prompts `[B, P]`, and how many steps denoised.

    T is the next multiple of the block. Behind a block with a token to stop at, masks are left.

    Raises:
        RuntimeError: masks are left after the last step, as candidates were the mask token; the original fails there.
    """
    mask_token_id, given = model.mask_token_id, prompt.shape[1]
    rule = policy(strategy, confidence_threshold)
    length = -(-(given + gen_length) // block_length) * block_length
    x, cache = F.pad(prompt, (0, length - given), value=mask_token_id), model.cache(len(prompt), length)
    prefilled, nfe = given // block_length * block_length, 0
    if prefilled:
        model.forward(x[:, :prefilled], cache=cache, commit=True, block_length=block_length)
    for start in range(prefilled, length, block_length):
        block = x[:, start : start + block_length]
        for step in range(denoising_steps):
            if not (block == mask_token_id).any():
                break
            logits = model.forward(block, start, cache=cache)
            assert logits is not None
            result = tt.remask(
                logits,
                block,
                mask_token_id=mask_token_id,
                policy=rule,
                step=step,
                num_steps=denoising_steps,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            quota = block_length // denoising_steps + (step < block_length % denoising_steps)
            overwrite(result, block == mask_token_id, logits, quota, sequential=strategy == "sequential")
            block.copy_(result.tokens)
            nfe += 1
        if (block == mask_token_id).any():
            raise RuntimeError(f"tokens: expected no masks after {denoising_steps} steps, got {block.tolist()}")
        model.forward(block, start, cache=cache, commit=True)
        if stopping_criteria_idx and torch.isin(x[:, given:], x.new_tensor(stopping_criteria_idx)).any():
            break
    return x, nfe


def overwrite(result: tt.RemaskResult, masked: Tensor, logits: Tensor, quota: int, *, sequential: bool) -> None:
    """What the original overwrites in a step, in the result's tokens."""
    for row, waiting in enumerate(masked):
        if sequential:
            first = int(waiting.int().argmax())
            taken = torch.arange(first, min(first + quota, len(waiting)), device=waiting.device)
        elif waiting.sum() < quota:
            taken = torch.where(waiting, result.confidence[row], -torch.inf).topk(quota).indices
        else:
            continue
        taken = taken[~waiting[taken]]
        result.tokens[row, taken] = logits[row, taken].argmax(-1).to(result.tokens.dtype)

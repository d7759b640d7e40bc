"""Generation token by token: the next one is proposed by the denoiser (mock_ar) or by the context tower (ar)."""

from __future__ import annotations

from collections.abc import Generator

import torch

from twotower_kernels.generation.request import Request, indices, log_probabilities, on_device
from twotower_kernels.generation.results import StepEvent
from twotower_kernels.model.interface import Calls
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone


def autoregress(
    request: Request, calls: Calls, with_denoiser: bool, mask_token_id: int
) -> Generator[StepEvent, None, None]:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar).

    A token is the proposal of a remasking step on a block of one, so both kinds of generation share one sampler.

    mask_token_id: what processors see where the next token will stand.
    """
    max_new_tokens, sampling = request.options.max_new_tokens, request.options.sampling
    if not max_new_tokens:
        return
    # [R] those still generating, in the state's order
    request_rows, seeds = list(range(len(request.prompts))), request.seeds
    rows = torch.arange(len(request_rows), device=seeds.device)
    prompts, lengths = request.padded(request_rows)
    last = prompts.gather(1, lengths[:, None] - 1)  # [R, 1]
    # The denoiser reads the last token itself, so the context stops before it.
    state = calls.prefill(prompts[:, :-1], lengths - 1) if with_denoiser else calls.prefill(prompts, lengths)
    for position in range(max_new_tokens):
        logits = calls.denoise(last, state, t=None) if with_denoiser else state.next_logits()[:, None]  # [R, 1, V]
        logits, proposed = request.processed(logits, torch.full_like(last, mask_token_id), rows)
        mask = torch.zeros_like(last)  # a block of one mask, whatever its number
        result = remask(logits, mask, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=position, **sampling)
        token = result.candidate  # [R, 1]
        seen = request.look(request_rows, result.num_masked, token, result.confidence)
        logprobs = None if request.logprobs is None else log_probabilities(proposed, token)
        yield request.finish_block(position, 1, request_rows, token, logprobs)
        going = indices([not end for _, end in seen])
        if position + 1 == max_new_tokens or not going:
            return
        if len(going) < len(request_rows):
            index = on_device(going, seeds.device)
            state, seeds, rows = state.select(index), seeds[index], rows[index]
            last, token = last[index], token[index]
            request_rows = [request_rows[i] for i in going]
        state = calls.commit(last if with_denoiser else token, state)
        last = token

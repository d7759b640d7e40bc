"""Generation token by token: the next one is proposed by the denoiser (mock_ar) or by the context tower (ar)."""

from __future__ import annotations

from collections.abc import Generator

import torch

from twotower_kernels.model.request import Request, indices, log_probabilities, on_device
from twotower_kernels.model.results import StepEvent
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone


def autoregress(request: Request, with_denoiser: bool) -> Generator[StepEvent, None, None]:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar).

    A token is the proposal of a remasking step on a block of one, so both kinds of generation share one sampler.
    """
    max_new_tokens, sampling = request.options.max_new_tokens, request.options.sampling
    if not max_new_tokens:
        return
    prompts, lengths = request.padded()
    # [R] those still generating, in the state's order
    request_rows, seeds = list(range(len(request.prompts))), request.seeds
    last = prompts.gather(1, lengths[:, None] - 1)  # [R, 1]
    if with_denoiser:  # it reads the last token itself, so the context stops before it
        state = request.model.prefill(prompts[:, :-1], lengths - 1)
    else:
        state = request.model.prefill(prompts, lengths)
    for position in range(max_new_tokens):
        logits = request.denoise(last, state, t=None) if with_denoiser else state.next_logits()[:, None]  # [R, 1, V]
        mask = torch.zeros_like(last)  # a block of one mask, whatever its number
        result = remask(logits, mask, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=position, **sampling)
        token = result.candidate  # [R, 1]
        seen = request.look(request_rows, result.num_masked, token, result.confidence)
        logprobs = None if request.logprobs is None else log_probabilities(logits, token)
        yield request.finish_block(position, 1, request_rows, token, logprobs)
        going = indices([not end for _, end in seen])
        if position + 1 == max_new_tokens or not going:
            return
        if len(going) < len(request_rows):
            index = on_device(going, seeds.device)
            state, seeds, last, token = state.select(index), seeds[index], last[index], token[index]
            request_rows = [request_rows[i] for i in going]
        state = request.commit(last if with_denoiser else token, state)
        last = token

"""Generation token by token: the next one is proposed by the denoiser (mock_ar) or by the context tower (ar)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels.generation.request import Request, indices, log_probabilities, on_device
from twotower_kernels.generation.results import StepEvent
from twotower_kernels.model.interface import Calls, Towers
from twotower_kernels.model.state import ContextState
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone
Sampling = dict[str, Any]  # temperature, top_k and top_p of `remask`


class Proposal(NamedTuple):
    """The next token of R rows."""

    logits: Tensor  # [R, 1, V], those that it was drawn from
    token: Tensor  # [R, 1] int64; -1 where they are not usable
    confidence: Tensor  # [R, 1], its probability; NaN there
    num_masked: Tensor  # [R] int64: 0


def propose(logits: Tensor, seeds: Tensor, position: int | Tensor, sampling: Sampling) -> Proposal:
    """New token number `position` of R rows, from logits [R, 1, V].

    A token is the proposal of a remasking step on a block of one, so all kinds of generation share one sampler.
    """
    mask = torch.zeros_like(seeds)[:, None]  # a block of one mask, whatever its number
    result = remask(logits, mask, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=position, **sampling)
    return Proposal(logits, result.candidate, result.confidence, result.num_masked)


def next_token(
    model: Towers, token: Tensor, state: ContextState, seeds: Tensor, position: int, sampling: Sampling
) -> tuple[ContextState, Proposal]:
    """The context tower reads a token [R, 1] and proposes number `position`, the one behind it."""
    state = model.commit(token, state)
    return state, propose(state.next_logits()[:, None], seeds, position, sampling)


def autoregress(
    request: Request, calls: Calls, with_denoiser: bool, mask_token_id: int
) -> Generator[StepEvent, None, None]:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar).

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
    in_one = not with_denoiser and not request.options.processors  # nothing lies between a token and the next
    proposal: Proposal | None = None
    for position in range(max_new_tokens):
        if proposal is None:
            logits = calls.denoise(last, state, t=None) if with_denoiser else state.next_logits()[:, None]  # [R, 1, V]
            logits, proposed = request.processed(logits, torch.full_like(last, mask_token_id), rows)
            proposal = propose(logits, seeds, position, sampling)
        else:
            proposed = proposal.logits
        token = proposal.token  # [R, 1]
        seen = request.look(request_rows, proposal.num_masked, token, proposal.confidence)
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
        if in_one:
            state, proposal = calls.next_token(token, state, seeds, position + 1, sampling)
        else:
            state, proposal = calls.commit(last if with_denoiser else token, state), None
        last = token

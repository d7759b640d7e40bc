"""Generation by block diffusion: the denoiser fills a block of masks in a few calls, then the context grows by it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from twotower_kernels.model.request import Request, indices, log_probabilities, on_device
from twotower_kernels.model.results import StepEvent
from twotower_kernels.model.state import ContextState
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

FINISH = RemaskPolicy(finish=True)  # in the last step of its schedule: every candidate, none of which is the mask


def diffuse(request: Request) -> Generator[StepEvent, None, None]:
    """Block after block: denoise it, hand it out, extend the context of the rows that go on."""
    num_blocks = -(-request.options.max_new_tokens // request.options.block_size)
    if not num_blocks:
        return
    state = request.model.prefill(*request.padded())
    # [R] those still generating, in the state's order
    request_rows, seeds = list(range(len(request.prompts))), request.seeds
    for block in range(num_blocks):
        tokens, logprobs, steps, ended = yield from _denoise_block(request, state, request_rows, seeds, block)
        yield request.finish_block(block, steps, request_rows, tokens, logprobs)
        if block + 1 == num_blocks or all(ended):
            return  # the last block is read by nobody: the context need not grow
        if any(ended):
            keep = indices([not end for end in ended])
            index = on_device(keep, seeds.device)
            state, seeds, tokens = state.select(index), seeds[index], tokens[index]
            request_rows = [request_rows[i] for i in keep]
        state = request.commit(tokens, state)


def _denoise_block(
    request: Request,
    state: ContextState,
    request_rows: list[int],
    seeds: Tensor,
    block: int,
) -> Generator[StepEvent, None, tuple[Tensor, Tensor | None, int, list[bool]]]:
    """From all masks to none: int64 [R, S] tokens, float32 [R, S] their logprobs if wanted, the steps the slowest row
    took, and per row whether it has ended."""
    options, device = request.options, seeds.device
    block_size, num_steps, policy = options.block_size, options.steps_per_block, options.unmasking
    mask_token_id = request.mask_token_id
    tokens = torch.full((len(request_rows), block_size), mask_token_id, device=device)
    logprobs = None if request.logprobs is None else torch.full(tokens.shape, torch.nan, device=device)
    ended = [False] * len(request_rows)
    # [A] those that still hold masks, for the host and for the device
    active, active_rows = list(range(len(request_rows))), torch.arange(len(request_rows), device=device)
    masked = torch.full((len(request_rows),), block_size, device=device)  # [A]
    last_call = max(num_steps, block_size)
    for step in range(last_call + 1):
        of_steps = max(num_steps, step + 1)  # past the schedule, every step is the last one
        before = tokens[active_rows]  # [A, S]
        t = policy.model_time(masked, block_size, step, of_steps)  # [A]
        logits = request.denoise(before, state, t)  # [A, S, V]
        result = remask(
            logits,
            before,
            mask_token_id=mask_token_id,
            policy=policy if step < last_call else FINISH,
            step=step,
            num_steps=of_steps,
            seed=seeds,
            offset=block,
            initial_num_masked=block_size,
            **options.sampling,
        )
        tokens[active_rows] = result.tokens
        written = None  # [A, S] logprobs
        if logprobs is not None:
            written = log_probabilities(logits, result.tokens, without=mask_token_id)
            written = torch.where(result.transfer_mask, written, logprobs[active_rows])
            written = torch.where(result.tokens == mask_token_id, torch.nan, written)
            logprobs[active_rows] = written
        masked = result.num_masked
        of_request = [request_rows[i] for i in active]
        seen = request.look(of_request, masked, result.tokens, result.confidence)
        yield request.step(block, step, of_request, before, result.tokens, [masks for masks, _ in seen], written)
        for i, (_, end) in zip(active, seen, strict=True):
            ended[i] = end
        keep = indices([masks > 0 for masks, _ in seen])
        if not keep:
            break
        if len(keep) < len(active):
            index = on_device(keep, device)
            state, seeds, masked = state.select(index), seeds[index], masked[index]
            active_rows = active_rows[index]
            active = [active[i] for i in keep]
    return tokens, logprobs, step + 1, ended

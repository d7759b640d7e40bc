"""Autoregression's text by drafts of the denoiser, which the context tower reads at once: plainly, by recomputation.

Speculative decoding (arXiv 2211.17192) where both programs draw with one noise: a draft is right where it is what
autoregression writes, and its first wrong token is replaced by that.
"""

import torch
from torch import Tensor

from twotower_kernels.reference.generation_request import Run, check_finite, logprobs_of, propose
from twotower_kernels.reference.model import ContextState
from twotower_kernels.reference.remask import remask
from twotower_kernels.reference.remask_schedule import model_time


def speculate(run: Run) -> None:
    """A draft behind the next token, and as much of it as the context tower would have written, again and again."""
    if not run.config.max_new_tokens:
        return
    rows = torch.arange(len(run.lengths), device=run.lengths.device)  # [R] rows still generating, in the state's order
    state = run.model.prefill(run.text[:, : int(run.lengths.max())], run.lengths)
    known, of_known = _own_tokens(run, state.logits[:, None], rows, number=0)  # [R, 1] each: the next tokens
    block = 0
    while True:
        check_finite(torch.where(known < 0, torch.nan, 0.0), rows)
        ends = torch.tensor(run.config.ends, dtype=torch.int64, device=rows.device)
        last = torch.isin(known[:, 0], ends) | (run.written[rows] + 1 == run.config.max_new_tokens)
        if last.any():  # a last token that is known needs no draft
            run.finish_draft(block, 0, rows[last], known[last], of_known[last], torch.ones_like(rows[last]))
            state, rows, known, of_known = state.select(~last), rows[~last], known[~last], of_known[~last]
        if not len(rows):
            return
        draft, steps = _draft(run, state, rows, known, block)  # [R, S]
        hidden, _ = run.model.context_pass(draft, state)
        logits = run.model.context_lm_head(hidden)  # [R, S, V]
        run.nfe[rows] += 1
        run.verifications[rows] += 1
        own, of_own = _own_tokens(run, logits, rows, number=1)  # [R, S]: what the context tower says behind each
        agrees = (draft[:, 1:] == own[:, :-1]).cumprod(dim=1)  # [R, S-1]
        newest = agrees.sum(dim=1, keepdim=True)  # [R, 1] the last position that agrees; the known token always does
        agreed = newest[:, 0] + 1
        of_draft = torch.cat([of_known, torch.where(agrees.bool(), of_own[:, :-1], torch.nan)], dim=1)
        goes_on = run.finish_draft(block, steps, rows, draft, of_draft, agreed)
        state = run.model.commit(draft, state, agreed)
        known, of_known = own.gather(1, newest), of_own.gather(1, newest)
        state, rows, known, of_known = state.select(goes_on), rows[goes_on], known[goes_on], of_known[goes_on]
        block += 1


def _own_tokens(run: Run, logits: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """What autoregression writes behind each position of logits [R, S, V], -1 where it cannot, and the logprobs of
    that: [R, S] each. The first are tokens `number` of what their rows have not written yet."""
    tokens, logprobs = [], []
    for i, position in enumerate(logits.split(1, dim=1)):  # [R, 1, V]
        mask = torch.full_like(position[..., 0], run.mask_token_id, dtype=torch.int64)
        proposed = run.processed(position, mask, rows)
        step = propose(proposed, run.seeds[rows], run.written[rows] + number + i, run.config.sampling)
        tokens.append(step.candidate)
        logprobs.append(logprobs_of(position, step.candidate.clamp(min=0)))
    return torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)


def _draft(run: Run, state: ContextState, rows: Tensor, known: Tensor, block: int) -> tuple[Tensor, int]:
    """The known tokens [R, 1] and what the denoiser puts behind them, int64 [R, S]; the steps of the slowest row."""
    config, policy, masks = run.config, run.config.unmasking, run.config.block_size - 1
    mask = config.mask_token_id
    assert mask is not None
    tokens = torch.cat([known, torch.full((len(rows), masks), mask, device=rows.device)], dim=1)
    editable = torch.arange(masks + 1, device=rows.device) > 0  # what is known is given, even if it is the mask
    active = torch.arange(len(rows) if masks else 0, device=rows.device)  # [A] rows that hold masks
    masked, step = torch.full_like(active, masks), 0
    while step < config.draft_steps and len(active):
        before = tokens[active]  # [A, S]
        t = model_time(policy, masked, config.block_size, torch.tensor(step), torch.tensor(config.draft_steps))  # [A]
        logits = run.model.denoise(before, state.select(active), t)  # [A, S, V]
        result = remask(
            run.processed(logits, before, rows[active]),
            before,
            mask_token_id=mask,
            policy=policy,
            step=step,
            num_steps=config.draft_steps,
            seed=run.seeds[rows[active]],
            offset=run.written[rows[active]],
            noise="sequence",
            editable=editable.expand_as(before),
            **config.sampling,
        )
        check_finite(result.confidence, rows[active])
        tokens[active], masked, step = result.tokens, result.num_masked, step + 1
        run.nfe[rows[active]] += 1
        run.report(block, step - 1, rows[active], before, result.tokens, masked, None)
        active, masked = active[masked > 0], masked[masked > 0]
    return tokens, step

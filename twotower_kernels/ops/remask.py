"""One remasking step, from logits to tokens. Definition: `reference/remask.py`; kernels: `csrc/cpu/remask.cpp`,
`csrc/cuda/remask_*.cu`."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import as_index, define
from twotower_kernels.ops._traced import call
from twotower_kernels.ops.remask_checks import (
    PLAIN_REAL,
    PLAIN_WHOLE,
    Arguments,
    as_row,
    check_arguments,
    check_kinds,
    check_values,
    ids,
    split_all,
)
from twotower_kernels.ops.remask_fields import filled
from twotower_kernels.options.arguments import whole as whole_number
from twotower_kernels.options.remask_choices import CHOICES, NOISES
from twotower_kernels.options.remask_policy import OPTIONS, RemaskPolicy


class RemaskResult(NamedTuple):
    """What a step did. Positions that waited were looked at; where the policy judges committed tokens (edit, remask,
    renoise), all within reach. Elsewhere candidate is -1, confidence and entropy are 0."""

    tokens: Tensor  # [B, S], dtype of the argument
    transfer_mask: Tensor  # bool [B, S]: positions that took their candidate, edits included
    candidate: Tensor  # int64 [B, S]: -1 where the logits are not usable
    confidence: Tensor  # [B, S] float32, float64 for float64 logits: the candidate's probability, or NaN
    entropy: Tensor  # [B, S] as confidence: in nats, or NaN
    num_masked: Tensor  # int64 [B]: masks left within reach; with renoise, positions that became noise
    done: Tensor  # bool [B]: num_masked == 0; with renoise, whether this was the last step


def remask(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int | None,
    policy: RemaskPolicy = RemaskPolicy(),  # noqa: B008 (frozen)
    step: int | Tensor = 0,
    num_steps: int | Tensor = 1,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = 0,
    top_p: float | Tensor | None = 1.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    suppress_ids: Sequence[int] | Tensor | None = None,
    editable: Tensor | None = None,
    valid_lens: Tensor | None = None,
    initial_num_masked: int | Tensor | None = None,
    gate_bound: float | Tensor | None = None,
    confidence_suppress_ids: Sequence[int] | Tensor | None = None,
    candidates: Tensor | None = None,
    rank_noise: Tensor | None = None,
    shift: int = 0,
    shift_logits: Tensor | None = None,
    noise: str = "block",
) -> RemaskResult:
    """Proposes a token for every mask and decides which proposals stay: one step of a masked-diffusion block.

    The rules are those of twenty published systems, each with its source: see `RemaskPolicy`. Noise is counter-based
    (Philox-4x32-10, Gumbel), so a row with its own seed draws the same tokens alone, in any batch and on any device.

    Args:
        logits: `[B, S, V]`; float64, float32, bfloat16 or float16; any strides. Statistics are float32 or float64.
            `[N, V]` is the one row `[1, N, V]`: what is `[B, S]` is then `[N]`, what is `[B]` is `[]` or `[1]`, and the
            results are `[N]` and `[]`.
        tokens: `[B, S]` int64 or int32; a position waits where it equals `mask_token_id`.
        mask_token_id: a token, or None for policies with renoise, which need no mask.
        policy: the rule.
        step, num_steps: i and N of the rule. Steps from N - 1 on count as the last.
        temperature: 0 takes the argmax, more samples (unless the policy is greedy). At most 1e6. From 1e-36 down the
            argmax is taken by definition, and before that wherever the best logit divided by it is too large for a
            number: noise could not matter. Tempered statistics see 1e-36 in the place of what lies between it and 0.
        top_k, top_p: filters of the sample; 0 and 1.0, or None, are off. What ties with the last token kept stays too.
        seed, offset: the key (64 bits) of the noise, and the row offset of its counter (the block's index).
        suppress_ids: tokens without probability, like the mask token; a sequence or an integer tensor `[n]`.
        editable: bool `[B, S]`, where the step may write. Other positions neither wait nor count.
        valid_lens: `[B]` integers; positions beyond are not part of the block.
        initial_num_masked: n0, what waited when the block began. None: the least n0 of which the schedule would have
            left as many as wait now.
        gate_bound: instead of the policy's.
        confidence_suppress_ids: tokens without probability in the statistics, which may still be proposed.
        candidates: `[B, S]` integers, proposals of the caller; -1: the op's own.
        rank_noise: `[B, S]` floating, in [0, 1), instead of the op's own number per position.
        shift: 1: position i is predicted by the logits at i - 1 (Dream), the first one by `shift_logits`; 0: by its
            own.
        shift_logits: `[B, V]` of the logits' dtype, what stands before the first position, the last logits of a prompt
            for one. None: the first position's own logits.
        noise: "block": tokens of position p draw with the counter (token, p, step, offset); "sequence": with (token, 0,
            0, offset + p), the sum modulo 2^32. So, with the number of a block's first token in its text as offset, a
            token draws the same in every step, in whatever block it comes to lie, and alone, as autoregression draws
            it. The numbers per position that `rank_noise` may replace are those of "block" in both.

        step, num_steps, temperature, top_k, top_p, seed, offset, initial_num_masked and gate_bound are numbers or
        tensors `[B]`.

    Returns:
        `RemaskResult`. A position whose logits hold NaN or +inf, or nothing finite, keeps its token; its confidence and
        entropy are NaN. Nothing is differentiable, nothing is modified, and autocast changes nothing.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device or value; logits that require grad. A GPU does
            not wait to look at what tensors hold: with values out of range the step is another, but nothing else is
            harmed. NotImplementedError, on a GPU: float64 logits.
    """
    optional = editable, valid_lens, candidates, rank_noise, shift_logits
    mask_token_id = check_kinds(logits, tokens, mask_token_id, policy, *optional)
    shift = whole_number("shift", shift, "0 or 1")
    if noise not in NOISES:
        raise ValueError(f"noise: expected {' or '.join(map(repr, NOISES))}, got {noise!r}")
    alone = logits.ndim == 2
    if alone:
        positions = {"tokens": tokens, "editable": editable, "candidates": candidates, "rank_noise": rank_noise}
        rows = as_row(logits, valid_lens, shift_logits, **positions)
        logits, valid_lens, shift_logits, tokens, editable, candidates, rank_noise = rows
    whole, whole_rows = split_all(PLAIN_WHOLE, (step, num_steps, top_k, seed, offset, initial_num_masked), logits)
    bound = policy.gate_bound if gate_bound is None else gate_bound
    real, real_rows = split_all(PLAIN_REAL, (temperature, top_p, bound), logits)
    options, bounds = policy.encoded()
    suppressed, suppress_tensor = ids("suppress_ids", suppress_ids, logits)
    unscored, unscore_tensor = ids("confidence_suppress_ids", confidence_suppress_ids, logits)
    arguments = (
        *(logits, tokens, mask_token_id, options, bounds, whole, real, *whole_rows, *real_rows),
        *(suppressed, suppress_tensor, unscored, unscore_tensor, editable, as_index(valid_lens)),
        *(as_index(candidates), rank_noise, shift, shift_logits, noise == "sequence"),
    )
    result = call("remask", *arguments)
    return RemaskResult(*(x.squeeze(0) for x in result)) if alone else RemaskResult(*result)


# --- registration ---------------------------------------------------------------------------------------------------

_SUPPRESS_MASK, _SCHEDULE = OPTIONS.index("suppress_mask"), OPTIONS.index("schedule")
_POSTERIOR = CHOICES["schedule"].index("posterior")


def results(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """The step's results, not yet written, contiguous. (One made like another takes half the time of a new one.)"""
    tokens_out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    transfer_mask = torch.empty_like(tokens_out, dtype=torch.bool)
    candidate = torch.empty_like(tokens_out, dtype=torch.int64)
    acc_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    confidence = torch.empty_like(tokens_out, dtype=acc_dtype)
    entropy = torch.empty_like(confidence)
    num_masked = tokens.new_empty(tokens.shape[:1], dtype=torch.int64)
    done = torch.empty_like(num_masked, dtype=torch.bool)
    return tokens_out, transfer_mask, candidate, confidence, entropy, num_masked, done


@lru_cache(maxsize=64)
def _listed(tokens: tuple[int, ...]) -> Tensor:
    return torch.tensor(sorted(tokens))


def _sorted(listed: list[int], tensor: Tensor | None) -> Tensor | None:
    """Token numbers as the kernel looks them up: int64 [n], ascending; None if there are none."""
    if tensor is not None:
        listed = [*listed, *tensor.tolist()]
        return torch.tensor(sorted(listed)) if listed else None
    return _listed(tuple(listed)) if listed else None


def _remask(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    if a.gives_tensors:
        check_values(a)
    if a.logits.stride(2) != 1:
        a = a._replace(logits=a.logits.contiguous())
    if a.shift_logits is not None:
        a = a._replace(shift_logits=a.shift_logits.contiguous())
    suppressed, mask, options = a.suppressed, a.mask_token_id, a.options
    if mask is not None and (options[_SUPPRESS_MASK] or options[_SCHEDULE] == _POSTERIOR):
        suppressed = [*suppressed, mask]
    out = results(a.logits, a.tokens)
    fields = filled(a, _sorted(suppressed, a.suppress_ids), _sorted(a.unscored, a.confidence_suppress_ids), out)
    cpu.kernels().remask(ctypes.addressof(fields), ctypes.sizeof(fields))
    return out


define(
    # options, bounds: RemaskPolicy.encoded(). whole: step, num_steps, top_k, seed, offset, n0 (-1: not known); real:
    # temperature, top_p, gate_bound; each is replaced by the tensor [B] of its name where one is given.
    "remask(Tensor logits, Tensor tokens, SymInt? mask_token_id, SymInt[] options, float[] bounds, SymInt[] whole, "
    "float[] real, Tensor? step, Tensor? num_steps, Tensor? top_k, Tensor? seed, Tensor? offset, "
    "Tensor? initial_num_masked, Tensor? temperature, Tensor? top_p, Tensor? gate_bound, SymInt[] suppressed, "
    "Tensor? suppress_ids, SymInt[] unscored, Tensor? confidence_suppress_ids, Tensor? editable, Tensor? valid_lens, "
    "Tensor? candidates, Tensor? rank_noise, int shift, Tensor? shift_logits, "
    "bool by_sequence=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=lambda *arguments: check_arguments(Arguments(*arguments)),
    cpu=_remask,
    cuda="cuda.remask:remask",
    fake=lambda logits, tokens, *_: results(logits, tokens),
)

"""One remasking step of a masked-diffusion block: propose a token for every mask, then decide which proposals stay.

    z      logits [V] of a position, the mask token's and the suppressed ones' set to -inf
    x^     argmax z, or at temperature T > 0 argmax (z / T + g) over what top-k and top-p keep: a sample of the softmax
    c      softmax(z)[x^], the confidence (of the tempered and filtered distribution where the policy says so)
    k      how many positions take x^, from the policy; the best go first, ties go to the lowest position

The noise g is counter-based (see `philox`): the same seed draws the same tokens on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels.options.arguments import whole
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import philox, remask_checks, remask_schedule
from twotower_kernels.reference.remask_select import Rows, first_waiting, select

NEAR = 1e-4  # candidates closer than this are decided again with float64 noise
COLDEST = 1e-36  # at this temperature, and at all below, a draw is the argmax


class RemaskResult(NamedTuple):
    """What a step made. S positions, of which some were looked at: those that waited and, where the policy judges
    committed tokens (edit, remask, renoise), all others in reach as well. Elsewhere candidate is -1 and the rest 0."""

    tokens: Tensor  # [B, S], dtype of the argument
    transfer_mask: Tensor  # bool [B, S]: positions that took their candidate, edits included
    candidate: Tensor  # int64 [B, S]: the proposal x^; -1 where the logits are not usable
    confidence: Tensor  # [B, S] float32 (float64 for float64 logits): probability of x^; NaN where not usable
    entropy: Tensor  # [B, S], same dtype, natural logarithm; NaN where not usable
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
    """One remasking step; see `RemaskPolicy` for the rule. Nothing is modified, nothing is differentiable.

    Every argument marked "per row" is a number or a tensor [B]. A row with its own seed gets what it would get alone.

    Args:
        logits: [B, S, V] floating. Statistics are float32, float64 for float64 logits. [N, V] is the row [1, N, V]; all
            that is [B, S] is then [N], what is [B] is [] or [1], and of the results, too: [N] and [].
        tokens: [B, S] integer; a position waits where it equals mask_token_id.
        mask_token_id: in [0, V); None only for policies with renoise, which have no mask.
        policy: the rule.
        step, num_steps: i and N of the rule, per row. Steps at or past N - 1 count as the last one.
        temperature: per row. 0: the argmax. Otherwise x^ is drawn (unless the policy is greedy). As T falls the draw
            becomes the argmax, ties of logits other than 0 included: from T = 1e-36 down by definition, before that
            where the best z / T is too large for a number, or so large that float64 loses the noise. Tempered
            statistics see 1e-36 in the place of what lies between it and 0.
        top_k, top_p: per row; 0 and 1.0, or None, are off. The k largest logits stay, then the largest ones of which
            the probabilities before them sum to at most top_p. What ties with the last one kept stays too.
        seed, offset: per row, the Philox key (64 bits) and the row offset of the counter (the block's index).
        suppress_ids: tokens that get no probability, as the mask token.
        editable: bool [B, S], where the step may write. Other positions neither wait nor count.
        valid_lens: integer [B]; positions beyond are left alone, do not count, and are not part of the block's length.
        initial_num_masked: n0, per row: what waited when the block began, for schedules that are made from it. Without
            it, the smallest n0 of which the schedule would leave as many masks as there are now.
        gate_bound: per row, instead of the policy's.
        confidence_suppress_ids: tokens without probability in the statistics only; x^ may be one, with confidence 0.
        candidates: int64 [B, S], proposals drawn by the caller; -1: the op draws.
        rank_noise: [B, S] floating in [0, 1), instead of the op's own number per position: random scores, the noise of
            ranks, the coin of each position, what it becomes under "posterior" and "uniform", the random token
            floor(u V), which is the op's own draw with "uniform" and "corrupt".
        shift: 1: position i is predicted by the logits at i - 1 (Dream), the first one by shift_logits; 0: by its own.
        shift_logits: [B, V] as logits, what stands before the first position. None: the first position's own logits.
        noise: "block": tokens of position p draw with the counter (token, p, step, offset); "sequence": with (token, 0,
            0, offset + p), the sum modulo 2^32: in every step, and wherever a block begins, the number of a token in
            its text says what it draws with. The numbers per position (rank_noise) are those of "block" in both.

    A position of which the logits hold NaN or +inf, or nothing finite, keeps its token and has confidence NaN; so does
    one whose token is none of the vocabulary, under policies that ask for its probability (standing, "uniform").

    Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value; each names the argument.
    """
    mask_token_id = None if mask_token_id is None else whole("mask_token_id", mask_token_id, "an int")
    alone = isinstance(logits, Tensor) and logits.ndim == 2
    if alone:
        logits, tokens, editable, valid_lens, candidates, rank_noise, shift_logits = remask_checks.as_row(
            logits,
            tokens=tokens,
            editable=editable,
            valid_lens=valid_lens,
            candidates=candidates,
            rank_noise=rank_noise,
            shift_logits=shift_logits,
        )
    a = remask_checks.check(
        logits=logits,
        tokens=tokens,
        mask_token_id=mask_token_id,
        policy=policy,
        step=step,
        num_steps=num_steps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        offset=offset,
        suppress_ids=suppress_ids,
        editable=editable,
        valid_lens=valid_lens,
        initial_num_masked=initial_num_masked,
        gate_bound=gate_bound,
        confidence_suppress_ids=confidence_suppress_ids,
        candidates=candidates,
        rank_noise=rank_noise,
        shift=shift,
        shift_logits=shift_logits,
        noise=noise,
    )
    with torch.no_grad():
        if shift:
            before = logits[:, :1] if shift_logits is None else shift_logits[:, None]
            logits = torch.cat([before, logits], 1)[:, : tokens.shape[1]]
        result = _step(policy, mask_token_id, logits, tokens, a)
    return RemaskResult(*(x[0] for x in result)) if alone else result


def _step(
    policy: RemaskPolicy, mask_token_id: int | None, logits: Tensor, tokens: Tensor, a: remask_checks.Arguments
) -> RemaskResult:
    judges_all = policy.renoise or policy.edit_threshold is not None or policy.remask_threshold is not None
    masked = torch.zeros_like(a.reach) if mask_token_id is None else tokens == mask_token_id
    looked = a.reach if judges_all else a.reach & masked  # [B, S]
    rho = remask_schedule.leave_probability(policy, a.step, a.num_steps)  # [B]

    z = _admitted(policy, mask_token_id, logits, a, rho)  # [B, S, V]
    temperature = _temperature(policy, a)  # [B]
    survivors = _filtered(policy, z, temperature, a)
    candidate = _candidate(policy, mask_token_id, z, survivors, temperature, a)
    known = (tokens >= 0) & (tokens < logits.shape[2])  # what stands there may be any number
    there = torch.where(known, tokens, 0).long()
    if policy.standing:
        candidate = there if a.candidates is None else torch.where(a.candidates >= 0, a.candidates, there)
    drawn = torch.zeros_like(masked)
    if policy.schedule == "uniform":
        standing = _statistics(policy, mask_token_id, z, survivors, there, temperature, a)[0]
        stays, drawn = _uniform(policy, standing, logits.shape[2], a)
        candidate = torch.where(stays, there, candidate)
    confidence, entropy, score = _statistics(policy, mask_token_id, z, survivors, candidate, temperature, a)
    if policy.standing or policy.schedule == "uniform":
        confidence = torch.where(known, confidence, torch.nan)
    bad = ~confidence.isfinite()

    sent_back = torch.zeros_like(masked)
    if policy.remask_threshold is not None:
        sent_back = looked & ~masked & (confidence < policy.remask_threshold)
    waiting = looked if policy.renoise else (looked & masked) | sent_back
    usable = waiting & ~bad
    if policy.skip_mask_candidates:
        usable = usable & (candidate != mask_token_id)
    if policy.position_penalty:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        score = score - policy.position_penalty * (position - first_waiting(waiting)[:, None])
    if policy.rank_temperature:
        noise = -torch.log(-torch.log1p(-a.noise(philox.RANKING)))  # Gumbel: the k best are draws without replacement
        score = score.double() / max(policy.rank_temperature, COLDEST) + noise
    if policy.schedule == "coin":
        drawn = a.noise(philox.RANKING) < rho[:, None]
    elif policy.schedule == "posterior":
        assert mask_token_id is not None
        drawn = a.noise(philox.POSTERIOR) < _posterior(mask_token_id, z, survivors, temperature)
    chosen = _choose(policy, waiting, usable, sent_back, score, confidence, entropy, drawn, masked, a)

    after = torch.where(chosen, candidate, tokens.long())
    if mask_token_id is not None:
        after = torch.where(sent_back & ~chosen, mask_token_id, after)
    if policy.edit_threshold is not None:
        edited = looked & ~masked & ~sent_back & (confidence > policy.edit_threshold) & (candidate != tokens)
        after, chosen = torch.where(edited, candidate, after), chosen | edited
    if policy.renoise:
        rejected = usable & ~chosen
        own = policy.schedule in ("uniform", "corrupt")  # whose caller's numbers say which are random
        noisy = (a.noise(philox.RENOISE, own) * logits.shape[2]).long()
        if policy.renoise_as == "mask":
            assert mask_token_id is not None
            noisy = torch.full_like(noisy, mask_token_id)
        after = torch.where(rejected, noisy, after)
        num_masked, done = rejected.sum(1), a.step >= a.num_steps - 1
    else:
        num_masked = (a.reach & (after == mask_token_id)).sum(1)
        done = num_masked == 0
    return RemaskResult(
        tokens=after.to(tokens.dtype),
        transfer_mask=chosen,
        candidate=torch.where(looked & ~bad, candidate, -1),
        confidence=torch.where(looked, torch.where(bad, torch.nan, confidence), 0.0),
        entropy=torch.where(looked, torch.where(bad, torch.nan, entropy), 0.0),
        num_masked=num_masked,
        done=done,
    )


def _admitted(
    policy: RemaskPolicy, mask_token_id: int | None, logits: Tensor, a: remask_checks.Arguments, rho: Tensor
) -> Tensor:
    """The logits in the dtype of the computation, -inf where a token may not be proposed: [B, S, V].

    For the posterior the mask token's logit becomes what gives the mask its probability 1 - rho in q(x_s | x_t).
    """
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
    if policy.suppress_mask and mask_token_id is not None:
        z[..., mask_token_id] = -torch.inf
    z[..., a.suppress_ids] = -torch.inf
    if policy.schedule == "posterior":
        assert mask_token_id is not None
        odds = torch.log1p(-rho) - torch.log(rho)  # [B]
        z[..., mask_token_id] = z.logsumexp(-1) + odds[:, None].to(z.dtype)
    return z


def _temperature(policy: RemaskPolicy, a: remask_checks.Arguments) -> Tensor:
    """The temperature of this step: float64 [B], 0 or at least COLDEST."""
    temperature = a.temperature
    if policy.temperature_end is not None:
        rest = (a.num_steps - a.step).clamp(min=0) / a.num_steps
        falling = policy.temperature_end + (temperature - policy.temperature_end) * rest
        temperature = torch.where(temperature > 0, falling, 0.0)
    return torch.where(temperature > 0, temperature.clamp(min=COLDEST), 0.0)


def _tempered(z: Tensor, temperature: Tensor) -> Tensor:
    """(z - max z) / T, or z - max z where T = 0: [B, S, V]. The shift keeps the division from overflowing."""
    shifted = z - z.amax(-1, keepdim=True)
    return shifted / torch.where(temperature > 0, temperature, 1.0)[:, None, None].to(z.dtype)


def _filtered(policy: RemaskPolicy, z: Tensor, temperature: Tensor, a: remask_checks.Arguments) -> Tensor:
    """The tokens that top-k and top-p keep, bool [B, S, V]."""
    survivors = torch.ones_like(z, dtype=torch.bool)
    if not ((a.top_k > 0).any() or (a.top_p < 1).any()):
        return survivors
    ordered = z.sort(-1, descending=True).values
    k = torch.where((a.top_k > 0) & (a.top_k < z.shape[2]), a.top_k, z.shape[2])  # [B]
    among_k = z >= ordered.gather(2, (k - 1)[:, None, None].expand(*z.shape[:2], 1))
    x = _tempered(z, temperature) if policy.top_p_tempered else z
    x = x if policy.top_p_first else torch.where(among_k, x, -torch.inf)
    x_ordered = x.sort(-1, descending=True).values
    p = torch.softmax(x_ordered, -1).double()
    total = p.cumsum(-1)
    if policy.top_p_keep_crossing:
        total = total - p
    in_nucleus = (total <= a.top_p[:, None, None]).sum(-1, keepdim=True).clamp(min=1)
    last = x_ordered.gather(2, in_nucleus - 1)  # [B, S, 1] the least logit of the nucleus
    return among_k & ((x >= last) | (a.top_p[:, None, None] >= 1))


def _candidate(
    policy: RemaskPolicy,
    mask_token_id: int | None,
    z: Tensor,
    survivors: Tensor,
    temperature: Tensor,
    a: remask_checks.Arguments,
) -> Tensor:
    """The proposals x^, int64 [B, S]: the caller's, or the argmax of z, or of z / T + g over the surviving tokens."""
    tokens_only = z
    if policy.schedule == "posterior":
        tokens_only = z.index_fill(2, torch.tensor([mask_token_id], device=z.device), -torch.inf)
    candidate = tokens_only.argmax(-1)  # the first of equal ones
    sampled = (temperature > COLDEST) & (not policy.greedy) & (not policy.standing)
    if policy.renoise and policy.finish:
        sampled = sampled & (a.step < a.num_steps - 1)
    if sampled.any():
        drawn = _sample(torch.where(survivors, tokens_only, -torch.inf), temperature, a)
        t = torch.where(sampled, temperature, 1.0)[:, None].to(z.dtype)  # [B, 1]
        noise_matters = (tokens_only.amax(-1) / t).isfinite()
        candidate = torch.where(sampled[:, None] & noise_matters, drawn, candidate)
    return candidate if a.candidates is None else torch.where(a.candidates >= 0, a.candidates, candidate)


def _sample(z: Tensor, temperature: Tensor, a: remask_checks.Arguments) -> Tensor:
    """argmax (z / T + g), the two best decided in float64 when they are closer than NEAR: int64 [B, S]."""
    word = a.token_words(z.shape[2])  # [B, S, V]
    t = torch.where(temperature > 0, temperature, 1.0)[:, None, None]  # [B, 1, 1]
    noisy = z / t.to(z.dtype) + philox.gumbel(word)
    first = noisy.argmax(-1, keepdim=True)
    best = noisy.gather(2, first)
    second = noisy.scatter(2, first, -torch.inf).argmax(-1, keepdim=True)
    near = best - noisy.gather(2, second) < NEAR
    both = torch.cat([first, second], dim=-1).sort(-1).values  # [B, S, 2], the lower token first
    exact = z.gather(2, both).double() / t + philox.gumbel(word.gather(2, both), torch.float64)
    again = both.gather(2, exact.argmax(-1, keepdim=True))
    return torch.where(near, again, first).squeeze(2)


def _statistics(
    policy: RemaskPolicy,
    mask_token_id: int | None,
    z: Tensor,
    survivors: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    a: remask_checks.Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, entropy and score, [B, S] each; NaN where the logits are not usable."""
    x = z
    if policy.statistics == "filtered":
        x = torch.where(survivors, _tempered(z, temperature), -torch.inf)
    if policy.schedule == "posterior":
        x = x.index_fill(2, torch.tensor([mask_token_id], device=z.device), -torch.inf)
    if a.confidence_suppress_ids.numel():
        x = x.index_fill(2, a.confidence_suppress_ids, -torch.inf)
    p = torch.softmax(x, -1)
    confidence = p.gather(2, candidate.unsqueeze(2)).squeeze(2)
    entropy = torch.special.entr(p).sum(-1)
    if policy.score == "confidence":
        score = confidence
    elif policy.score == "margin":
        top = p.topk(min(2, p.shape[2]), dim=-1).values
        score = top[..., 0] - (top[..., 1] if p.shape[2] > 1 else 0.0)
    elif policy.score == "neg_entropy":
        score = -entropy
    elif policy.score == "top":
        score = p.amax(-1)
    elif policy.score == "gap":
        score = x.gather(2, candidate.unsqueeze(2)).squeeze(2) - x.amax(-1)
    elif policy.score == "random":
        score = a.noise(philox.RANKING)
    else:
        score = -torch.arange(p.shape[1], device=p.device).expand(p.shape[:2]).double()
    return confidence, entropy, score


def _posterior(mask_token_id: int, z: Tensor, survivors: Tensor, temperature: Tensor) -> Tensor:
    """The probability that a draw of q(x_s | x_t), tempered and filtered, is a token: [B, S]; 0 or 1 where T = 0."""
    x = torch.where(survivors, _tempered(z, temperature), -torch.inf)
    drawn = 1 - torch.softmax(x, -1)[..., mask_token_id]
    best = (z.argmax(-1) != mask_token_id).to(z.dtype)
    return torch.where(temperature[:, None] > 0, drawn, best)


def _uniform(
    policy: RemaskPolicy, standing: Tensor, vocabulary: int, a: remask_checks.Arguments
) -> tuple[Tensor, Tensor]:
    """Whether a draw of the uniform-state q(x_s | x_t) is the token that stands there, of probability `standing`, and
    whether it is that or x^ and no random token: bool [B, S] each.

    With r = a(t) / a(s) and d = a(t) V p(x_t) + 1 - a(t): a random token with probability (1 - r) (1 - a(s)) / d, x_t
    with (a(t) V p(x_t) + r - a(t)) / d, else x^. In the last step a(s) = 1, with finish x^ for certain.
    """
    before, after = remask_schedule.clean_fractions(policy, a.step, a.num_steps)  # [B]
    last = a.step >= a.num_steps - 1
    after = torch.where(last, 1.0, after)
    ratio = torch.where(after > 0, before / after, 1.0)[:, None]
    before, after = before[:, None], after[:, None]
    weight = before * vocabulary * standing.double()
    whole = weight + 1 - before
    noise, keep = (1 - ratio) * (1 - after) / whole, (weight + ratio - before) / whole
    u = a.noise(philox.POSTERIOR)
    drawn = u >= noise
    return drawn & (u < noise + keep) & ~(last & policy.finish)[:, None], drawn


def _choose(
    policy: RemaskPolicy,
    waiting: Tensor,
    usable: Tensor,
    sent_back: Tensor,
    score: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    drawn: Tensor,
    masked: Tensor,
    a: remask_checks.Arguments,
) -> Tensor:
    """The positions that take x^, bool [B, S]: every stretch of sub_block positions is a row of the selection."""
    batch, block = waiting.shape
    size = policy.sub_block or max(block, 1)
    count = max(-(-block // size), 1)  # stretches per row

    def cut(x: Tensor) -> Tensor:  # [B, S] -> [B * count, size]
        return torch.nn.functional.pad(x, (0, count * size - block)).reshape(batch * count, size)

    def each(x: Tensor) -> Tensor:  # [B] -> [B * count]
        return x.repeat_interleave(count)

    length = cut(a.reach if policy.schedule_base == "editable" else a.valid).sum(1)
    due = torch.ones_like(length, dtype=torch.bool)
    if policy.complete_threshold is not None:
        committed = cut(a.valid & ~masked).sum(1)
        whole_length = cut(a.valid).sum(1)
        complete = (committed >= policy.complete_threshold * whole_length.double()).reshape(batch, count)
        due = torch.cat([torch.ones_like(complete[:, :1]), complete[:, :-1]], dim=1).reshape(-1)
    rows = Rows(
        waiting=cut(waiting),
        usable=cut(usable),
        sent_back=cut(sent_back),
        score=cut(score),
        confidence=cut(confidence),
        entropy=cut(entropy),
        drawn=cut(drawn),
        due=due,
        bound=each(a.gate_bound),
        initial=None if a.initial is None else each(a.initial),
        length=length,
        step=each(a.step),
        num_steps=each(a.num_steps),
    )
    return select(policy, rows).reshape(batch, count * size)[:, :block]


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "remask": {
        "tiny": dict(batch=2, block=8, vocab=64),
        "no_rows": dict(batch=0, block=8, vocab=64),
        "one_position": dict(batch=3, block=1, vocab=33),
        "odd": dict(batch=3, block=7, vocab=97, step=2, num_steps=5, masked=0.6),
        "all_committed": dict(batch=2, block=5, vocab=64, masked=0.0),
        "sampled": dict(batch=2, block=8, vocab=257, temperature=0.7, seed=11),
        "sampled_filtered": dict(batch=2, block=8, vocab=257, temperature=0.9, top_k=40, top_p=0.9, seed=12),
        "ragged": dict(batch=3, block=9, vocab=65, valid_lens=[9, 4, 0], masked=0.7),
        "llada": dict(batch=2, block=8, vocab=64, num_steps=4, policy=RemaskPolicy.llada()),
        "dream": dict(batch=2, block=8, vocab=64, num_steps=4, top_p=0.9, policy=RemaskPolicy.dream("margin")),
        "posterior": dict(batch=2, block=8, vocab=64, num_steps=4, temperature=1.0, policy=RemaskPolicy.posterior()),
        "posterior_filtered": dict(
            **dict(batch=2, block=8, vocab=257, step=2, num_steps=4, temperature=0.9, top_p=0.9, seed=13),
            policy=RemaskPolicy.posterior("cosine"),
        ),
        "editing": dict(
            **dict(batch=2, block=8, vocab=64, num_steps=4, masked=0.4),
            policy=RemaskPolicy.llada2(0.6, edit_threshold=0.9, remask_threshold=0.5),
        ),
        "renoise": dict(
            **dict(batch=2, block=8, vocab=64, step=1, num_steps=4, temperature=0.8, seed=14),
            policy=RemaskPolicy.diffusion_gemma(),
        ),
        "whole_sequence": dict(batch=1, block=1500, vocab=33, num_steps=4, masked=0.1, policy=RemaskPolicy.llada()),
        "released_b1": dict(batch=1, block=16, vocab=131072, num_steps=16, policy=RemaskPolicy.twotower(0.8)),
        "released_b64": dict(batch=64, block=16, vocab=131072, num_steps=16, policy=RemaskPolicy.twotower(0.8)),
        "released_b1_sampled": dict(batch=1, block=16, vocab=131072, num_steps=16, temperature=1.0, seed=1),
    }
}


def make_inputs(
    op: str,
    case: str | dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for `remask`: logits [batch, block, vocab] with confidences spread over (0, 1), mask token 3.

    A case gives batch, block, vocab, optionally `masked` (the fraction of positions that wait), `valid_lens`, and any
    number or policy that `remask` takes.
    """
    options = dict(CASES[op][case] if isinstance(case, str) else case)
    batch, block, vocab = (options.pop(key) for key in ("batch", "block", "vocab"))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, block, vocab, generator=generator)
    favourite = torch.randint(4, vocab, (batch, block, 1), generator=generator)
    lead = 1 + 10 * torch.rand(batch, block, 1, generator=generator)
    logits = logits.scatter_add(2, favourite, lead)
    tokens = torch.randint(4, vocab, (batch, block), generator=generator)
    waits = torch.rand(batch, block, generator=generator) < options.pop("masked", 1.0)
    inputs = {
        "logits": logits.to(device, dtype),
        "tokens": torch.where(waits, 3, tokens).to(device),
        "mask_token_id": 3,
        **options,
    }
    if "valid_lens" in inputs:
        inputs["valid_lens"] = torch.tensor(inputs["valid_lens"], device=device)
    return inputs

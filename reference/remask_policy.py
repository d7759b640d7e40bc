"""What a remasking step decides, as data: one frozen dataclass whose orthogonal options express the published rules.

A step has five stages, and every option belongs to one of them:

    propose   a candidate x^ for every position that waits, from the logits without (or with) the mask token
    score     rank the waiting positions: confidence, margin, negative entropy, a random number, or their place
    gate      G, the positions good enough by themselves: a threshold, a bound per rank, an entropy budget, the best
              of a run
    schedule  q, how many positions this step owes, and which: the best q, the window of q from the first mask, or each
              position by its own coin
    combine   G and the schedule into the positions that take x^; the rest waits (or becomes noise)

Sources: Nemotron TwoTower and Megatron's sampler; LLaDA (arXiv:2502.09992), Dream (arXiv:2508.15487), Fast-dLLM
(arXiv:2505.22618), dInfer (arXiv:2510.08666), SDAR (arXiv:2510.06303), BD3-LM (arXiv:2503.09573), E2D2
(arXiv:2510.22852), and the code of JetEngine, LMDeploy, dllm, Diffulex, WeDLM, LLaDA2, vLLM and DiffusionGemma.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from twotower_kernels.reference import remask_schedule
from twotower_kernels.reference.arguments import real, whole

Statistics = Literal["raw", "filtered"]
Score = Literal["confidence", "margin", "neg_entropy", "random", "leftmost"]
Gate = Literal["none", "threshold", "factor", "entropy_sum"]
GateOn = Literal["confidence", "score"]
Schedule = Literal["none", "remaining", "even", "carried", "noise", "truncated", "rounded", "coin", "posterior"]
Base = Literal["masks", "block"]
Alpha = Literal["linear", "cosine", "exponential", "sine", "cosine_floor"]
Combine = Literal["fill", "union", "cap"]
Time = Literal["masked_fraction", "schedule"]

_CHOICES = {
    "statistics": Statistics,
    "score": Score,
    "gate": Gate,
    "gate_on": GateOn,
    "schedule": Schedule,
    "schedule_base": Base,
    "alpha": Alpha,
    "combine": Combine,
    "time": Time,
}


@dataclass(frozen=True)
class RemaskPolicy:
    """The options of a remasking step. The defaults are TwoTower's rule without its threshold.

    In the formulas: n positions wait now, n0 waited at the start of the block, S is the block length, i the step of N,
    r = max(1, N - i), c the confidence (probability of x^), H the entropy, j the rank from 1. All defaults are values
    of the options, so a policy can be varied with `dataclasses.replace`.

    Propose
        suppress_mask: the mask token's logit counts as -inf. Otherwise x^ may be the mask token: a position that takes
            it stays a mask.
        skip_mask_candidates: a position whose x^ is the mask token does not take part (dInfer).
        greedy: x^ is the argmax also at temperature > 0, which then shapes the statistics only.
        statistics: confidence, margin and entropy of the "raw" distribution or of the "filtered" one, that is after
            temperature (where it is not 0), top-k and top-p.
        top_p_first: top-p before top-k (Dream). top_p_tempered: the nucleus is taken after the temperature (not in
            WeDLM). top_p_keep_crossing: the token with which the cumulative probability crosses top_p stays (not in
            BD3-LM, which still always keeps the best).
        temperature_end: the temperature falls linearly from `temperature` at step 0 towards this value at step N.

    Score
        score: "leftmost" is minus the position; "random" a uniform number, or the caller's `rank_noise`.
        position_penalty: subtracted from the score for every position after the first one that waits (WeDLM).

    Gate
        gate: "none"; "threshold": value > gate_bound; "factor": the longest prefix of ranks with
            value >= 1 - gate_bound / (j + 1), rank 1 free; "entropy_sum": the ranks with
            H(1) + ... + H(j) < gate_bound.
        gate_bound: tau, f or gamma of these. remask's argument of that name replaces it, also row by row.
        strict: whether equality fails (of "threshold" and "entropy_sum").
        gate_on: the value is the confidence or the score.
        gate_slack: the threshold is at most the row's largest value - gate_slack, so that something passes (dInfer).
        factor_last_free: if only the last rank fails, it passes too (Fast-dLLM).
        entropy_includes_self: the sum of rank j includes H(j); otherwise it stops at j - 1, so rank 1 has 0.
        run_threshold: the best position of every run of adjacent waiting positions passes if its value > this (dInfer).

    Schedule
        schedule: q is "none": 0; "remaining": ceil(n / r); "even": floor(base / N) + [i < base mod N]; "carried":
            floor((i + 1) n0 / N) minus what was committed so far, so that what is left over is added to the next step;
            "noise": n - min(floor((1 - a(s)) S), n - 1); "truncated": floor(n rho); "rounded": n0 split by rounding
            l rho half to even while l are left, zeros removed; "coin": each position by itself with probability rho;
            "posterior": each by itself, as x^ or mask is drawn from q(x_s | x_t). The grid is
            t = 1 - i (1 - min_t) / N, s = t - (1 - min_t) / N, and rho = (a(s) - a(t)) / (1 - a(t)) is the probability
            of leaving the mask.
        schedule_base: base of "even": n0 ("masks") or S ("block"). spread_remainder: its term [i < base mod N].
        alpha, min_t: the fraction a(t) of clean tokens and the last time. "linear" 1 - t; "cosine" cos(pi t / 2);
            "exponential" (e^-3t - e^-3) / (1 - e^-3); "sine" 1 - sin(pi t / 2) (dllm's cosine); "cosine_floor"
            0.999 cos(pi t / 2) (BD3-LM's cosine).
        long_grid: t = 1 - i / (N - 1), s = t - 1 / N instead (BD3-LM).
        warmup: with i / N < warmup, q is 1 (Megatron's adaptive rule: 0.4).
        min_commits: q is at least this. finish: in the last step (i >= N - 1) all that waits is committed.

    Combine
        window: the schedule means the q positions from the first one that waits, committed ones included, not the best.
        combine: "fill": G if it has q positions, otherwise G and the best others up to q (with window: the window
            alone); "union": G and the schedule's positions; "cap": of the schedule's positions those in G, and the best
            min_commits.
        sub_block: the rule holds for every stretch of this many positions by itself; 0: the whole row.
        complete_threshold: a stretch owes nothing (q = 0) until this fraction of the stretch before is committed.

    Committed tokens
        edit_threshold: a committed token is rewritten to x^ when c > edit_threshold and it differs (LLaDA2.1).
        remask_threshold: committed positions with c < remask_threshold wait too. At least min_commits more positions
            are chosen than were sent back; those not chosen become masks (dInfer).
        renoise: there is no mask token. Every position waits at every step; those not chosen become uniform random
            tokens (DiffusionGemma). With finish, the last step leaves the argmax at every position.

    time: what the denoiser is told, see `model_time`.
    """

    suppress_mask: bool = True
    skip_mask_candidates: bool = False
    greedy: bool = False
    statistics: Statistics = "raw"
    top_p_first: bool = False
    top_p_tempered: bool = True
    top_p_keep_crossing: bool = True
    temperature_end: float | None = None

    score: Score = "confidence"
    position_penalty: float = 0.0

    gate: Gate = "none"
    gate_bound: float = 0.0
    strict: bool = True
    gate_on: GateOn = "confidence"
    gate_slack: float | None = None
    factor_last_free: bool = False
    entropy_includes_self: bool = True
    run_threshold: float | None = None

    schedule: Schedule = "remaining"
    schedule_base: Base = "masks"
    spread_remainder: bool = True
    alpha: Alpha = "linear"
    min_t: float = 0.0
    long_grid: bool = False
    warmup: float = 0.0
    min_commits: int = 1
    finish: bool = True

    window: bool = False
    combine: Combine = "fill"
    sub_block: int = 0
    complete_threshold: float | None = None

    edit_threshold: float | None = None
    remask_threshold: float | None = None
    renoise: bool = False

    time: Time = "masked_fraction"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked_field(field.name, getattr(self, field.name)))
        if self.combine == "cap" and self.gate == "none":
            raise ValueError("combine='cap' needs a gate, got gate='none'")
        if self.renoise and (self.edit_threshold is not None or self.remask_threshold is not None):
            raise ValueError("renoise judges every position anew, so edit_threshold and remask_threshold must be None")
        if self.schedule == "posterior" and not self.suppress_mask:
            raise ValueError("the posterior has its own probability of the mask, so suppress_mask must be True")
        if self.complete_threshold is not None and self.sub_block == 0:
            raise ValueError("complete_threshold compares stretches of a row, so sub_block must be positive, got 0")

    def model_time(
        self, num_masked: int | Tensor, block_size: int, step: int | Tensor, num_steps: int | Tensor
    ) -> Tensor:
        """The time the denoiser is told, float32 in [0, 1], shape of the broadcast arguments (scalars or [B]).

        The masked fraction num_masked / block_size for rules that rank; the schedule's own time t_i for the rules that
        follow a noise schedule (predict-and-noise, posterior).
        """
        if self.time == "masked_fraction":
            t = torch.as_tensor(num_masked).double() / max(block_size, 1)
        else:
            t = remask_schedule.times(self.min_t, self.long_grid, torch.as_tensor(step), torch.as_tensor(num_steps))[0]
        shape = torch.broadcast_shapes(*(torch.as_tensor(x).shape for x in (num_masked, step, num_steps)))
        device = next((x.device for x in (num_masked, step, num_steps) if isinstance(x, Tensor)), t.device)
        return t.to(device).float().clamp(0.0, 1.0).expand(shape)

    # --- presets, named after the system that published the rule ------------------------------------------------------

    @classmethod
    def twotower(cls, threshold: float = 0.8) -> "RemaskPolicy":
        """TwoTower and Megatron's confidence_unmasking: max(1, #{c > threshold}, ceil(n / r)), all in the last step."""
        return cls(gate="threshold", gate_bound=threshold)

    @classmethod
    def llada(cls, score: Score = "confidence") -> "RemaskPolicy":
        """LLaDA, Automodel, Megatron-Bridge: floor(n0 / N) + [i < n0 mod N]. The mask token is not excluded."""
        return cls(score=score, schedule="even", suppress_mask=False, min_commits=0, finish=False)

    @classmethod
    def random(cls) -> "RemaskPolicy":
        """LLaDA's random remasking: the same schedule, ranked by a uniform number."""
        return cls.llada("random")

    @classmethod
    def threshold(cls, tau: float = 0.9, *, strict: bool = False, score: Score = "confidence") -> "RemaskPolicy":
        """Fast-dLLM, dllm, LMDeploy's dynamic, Automodel, Megatron-Bridge: every score >= tau, at least the best."""
        return cls(
            score=score,
            gate="threshold",
            gate_on="score",
            gate_bound=tau,
            strict=strict,
            schedule="none",
            suppress_mask=False,
            finish=False,
        )

    @classmethod
    def sdar(cls, tau: float | None = None, *, greedy: bool = False) -> "RemaskPolicy":
        """SDAR: #{c > tau} if that reaches floor(S / N) + [i < S mod N], else that many; c tempered and filtered.

        Without tau the static strategy. `greedy` takes the argmax, which the original cannot.
        """
        return dataclasses.replace(
            cls.llada(),
            gate="none" if tau is None else "threshold",
            gate_bound=tau or 0.0,
            schedule_base="block",
            statistics="filtered",
            greedy=greedy,
        )

    @classmethod
    def jetengine(
        cls, strategy: str = "low_confidence_dynamic", bound: float = 0.9, *, greedy: bool = False
    ) -> "RemaskPolicy":
        """JetEngine's strategies by name; the dynamic one falls back to the leftmost window. bound: tau or gamma."""
        static = cls.sdar(greedy=greedy)
        strategies = {
            "low_confidence_static": static,
            "low_confidence_dynamic": dataclasses.replace(cls.sdar(bound, greedy=greedy), window=True),
            "sequential": dataclasses.replace(static, window=True),
            "random": dataclasses.replace(static, score="random"),
            "entropy_bounded": dataclasses.replace(cls.entropy_bound(bound), greedy=greedy),
        }
        if strategy not in strategies:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, strategies))}, got {strategy!r}")
        return strategies[strategy]

    @classmethod
    def lmdeploy_static(cls, *, sequential: bool = False) -> "RemaskPolicy":
        """LMDeploy: max(1, floor(S / N)) without remainder; the best, or the window from the first mask on."""
        return dataclasses.replace(
            cls.llada(), schedule_base="block", spread_remainder=False, min_commits=1, window=sequential
        )

    @classmethod
    def llada2(
        cls,
        threshold: float = 0.95,
        *,
        min_commits: int | None = None,
        edit_threshold: float | None = None,
        remask_threshold: float | None = None,
    ) -> "RemaskPolicy":
        """LLaDA2, dllm, vLLM: #{c > threshold} if that reaches the schedule of the block length, else the schedule.

        With min_commits LLaDA2.1's: that number stands in for the schedule. c is tempered and filtered (raw when the
        temperature is 0 and no filter is given).
        """
        return dataclasses.replace(
            cls.sdar(threshold),
            schedule="even" if min_commits is None else "none",
            min_commits=min_commits or 0,
            edit_threshold=edit_threshold,
            remask_threshold=remask_threshold,
        )

    @classmethod
    def fast_dllm_factor(cls, factor: float = 1.0, *, last_free: bool = True) -> "RemaskPolicy":
        """Fast-dLLM (dllm: last_free=False): the longest prefix with c(j) >= 1 - factor / (j + 1); n - 1 becomes n."""
        return dataclasses.replace(cls.threshold(factor), gate="factor", factor_last_free=last_free)

    @classmethod
    def fast_dllm_dream(cls, tau: float = 0.9) -> "RemaskPolicy":
        """Fast-dLLM's Dream: of the n0 / N best and what was left over, the first and those with c >= tau."""
        return dataclasses.replace(cls.threshold(tau), schedule="carried", combine="cap")

    @classmethod
    def dllm(cls, alpha: Alpha = "linear", score: Score = "confidence") -> "RemaskPolicy":
        """dllm's schedulers: n0 split by round-half-even of l (1 - (1 - a(s)) / (1 - a(t))), zeros removed."""
        return dataclasses.replace(cls.llada(score), schedule="rounded", alpha=alpha)

    @classmethod
    def dinfer(cls, tau: float = 0.9) -> "RemaskPolicy":
        """dInfer's threshold: every c >= min(tau, max c - 1e-5), positions that propose the mask token left out."""
        return dataclasses.replace(cls.threshold(tau), skip_mask_candidates=True, gate_slack=1e-5)

    @classmethod
    def dinfer_hierarchy(
        cls, low: float = 0.4, high: float | None = 0.9, *, remask_threshold: float | None = None
    ) -> "RemaskPolicy":
        """dInfer's hierarchy: the best of each run of masks if c > low, every c > high, at least the best one."""
        high = math.inf if high is None else high
        base = cls.threshold(high, strict=True)
        return dataclasses.replace(base, run_threshold=low, remask_threshold=remask_threshold)

    @classmethod
    def entropy_bound(cls, gamma: float = 0.5) -> "RemaskPolicy":
        """JetEngine: the ranks, by least entropy, with H(1) + ... + H(j) < gamma; at least one."""
        return cls(
            score="neg_entropy",
            gate="entropy_sum",
            gate_bound=gamma,
            schedule="none",
            suppress_mask=False,
            statistics="filtered",
            finish=False,
        )

    @classmethod
    def diffusion_gemma(cls, bound: float = 0.1, *, t_min: float | None = 0.4, finish: bool = True) -> "RemaskPolicy":
        """DiffusionGemma: accept the ranks with H(1) + ... + H(j-1) <= bound, renoise the rest.

        The temperature falls from remask's argument (0.8 in the original) to t_min. finish=False keeps the sampled
        canvas also in the last step.
        """
        return dataclasses.replace(
            cls.entropy_bound(bound),
            entropy_includes_self=False,
            strict=False,
            temperature_end=t_min,
            renoise=True,
            finish=finish,
        )

    @classmethod
    def dream(cls, algorithm: str = "maskgit", *, eps: float = 1e-3) -> "RemaskPolicy":
        """Dream: floor(n (1 - s / t)) best by c ("maskgit"), p1 - p2 ("margin") or -H ("entropy"), all in the end.

        "origin": each position by itself with probability 1 - s / t. t = 1 - (1 - eps) i / N.
        """
        scores: dict[str, Score] = {
            "maskgit": "confidence",
            "margin": "margin",
            "entropy": "neg_entropy",
            "origin": "confidence",
        }
        if algorithm not in scores:
            raise ValueError(f"algorithm must be one of {', '.join(map(repr, scores))}, got {algorithm!r}")
        return cls(
            score=scores[algorithm],
            schedule="coin" if algorithm == "origin" else "truncated",
            min_t=eps,
            suppress_mask=False,
            statistics="filtered",
            top_p_first=True,
            min_commits=0,
        )

    @classmethod
    def leftmost(cls, threshold: float | None = None) -> "RemaskPolicy":
        """Left to right: ceil(n / r), or more when more pass c > threshold."""
        gate: Gate = "none" if threshold is None else "threshold"
        return cls(score="leftmost", gate=gate, gate_bound=threshold or 0.0)

    @classmethod
    def first_hitting(cls) -> "RemaskPolicy":
        """BD3-LM's first-hitting sampler: exactly one position, uniformly chosen."""
        return cls(score="random", schedule="none", top_p_keep_crossing=False, finish=False)

    @classmethod
    def predict_and_noise(
        cls,
        score: Score = "confidence",
        alpha: Alpha = "linear",
        *,
        min_t: float = 1e-5,
        threshold: float | None = None,
        adaptive: bool = False,
        finish: bool = True,
    ) -> "RemaskPolicy":
        """Megatron: leave min(floor((1 - a(s)) S), n - 1) masked, none in the end. E2D2 adds every c >= threshold.

        adaptive: Megatron's other count, 1 while i / N < 0.4, then ceil(n / r).
        """
        return cls(
            score=score,
            schedule="remaining" if adaptive else "noise",
            warmup=0.4 if adaptive else 0.0,
            alpha=alpha,
            min_t=min_t,
            gate="none" if threshold is None else "threshold",
            gate_bound=threshold or 0.0,
            strict=False,
            combine="union",
            finish=finish,
            time="schedule",
        )

    @classmethod
    def posterior(cls, alpha: Alpha = "linear", *, min_t: float = 1e-5, long_grid: bool = False) -> "RemaskPolicy":
        """Megatron, E2D2, BD3-LM (long_grid): every position is drawn from q(x_s | x_t); masks may remain."""
        return cls(
            schedule="posterior",
            alpha=alpha,
            min_t=0.0 if long_grid else min_t,
            long_grid=long_grid,
            top_p_keep_crossing=not long_grid,
            min_commits=0,
            finish=False,
            time="schedule",
        )

    @classmethod
    def wedlm(cls, tau: float | None = 0.8, *, position_penalty: float = 0.05) -> "RemaskPolicy":
        """WeDLM's engine: E = H + position_penalty (distance to the first mask); every E < tau, else the smallest."""
        gate: Gate = "none" if tau is None else "threshold"
        base = cls.threshold(-(tau or 0.0), strict=True, score="neg_entropy")
        return dataclasses.replace(base, gate=gate, position_penalty=position_penalty, top_p_tempered=False)

    @classmethod
    def wedlm_hf(cls, tau: float = 0.8) -> "RemaskPolicy":
        """WeDLM's Hugging Face code: argmax, tempered c >= tau, else the best; tau = 0 means one by one."""
        gate: Gate = "threshold" if tau > 0 else "none"
        return dataclasses.replace(cls.threshold(tau), gate=gate, statistics="filtered", greedy=True)

    @classmethod
    def diffulex(
        cls,
        threshold: float = 0.9,
        *,
        block_size: int = 32,
        score: Score = "confidence",
        complete_threshold: float | None = None,
    ) -> "RemaskPolicy":
        """Diffulex: per block every c > threshold, else the one of best score; D2F (complete_threshold): only if the
        block before is that far."""
        base = cls.threshold(threshold, strict=True, score=score)
        return dataclasses.replace(
            base, gate_on="confidence", sub_block=block_size, complete_threshold=complete_threshold
        )


def _checked_field(name: str, value: object) -> object:
    """The value of the field `name`, numbers as Python's; ValueError or TypeError unless the field can have it."""
    if name in _CHOICES:
        choices = get_args(_CHOICES[name])
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value
    default = RemaskPolicy.__dataclass_fields__[name].default
    if default is None and value is None:
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return value
    is_whole = isinstance(default, int)
    kind = "an int" if is_whole else "a number" if default is not None else "a number or None"
    try:
        number = whole(name, value) if is_whole else real(name, value)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, got {value!r}") from None
    if is_whole and not 0 <= number < 2**63:
        raise ValueError(f"{name} must be 0 or larger, got {value}")
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if math.isnan(number) or not low <= number <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value}")
    return number


_RANGES = {
    "temperature_end": (0.0, 1e6),
    "position_penalty": (-1e6, 1e6),
    "gate_slack": (0.0, math.inf),
    "min_t": (0.0, 0.5),
    "warmup": (0.0, 1.0),
    "complete_threshold": (0.0, 1.0),
}

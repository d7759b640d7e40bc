"""The rule of a remasking step as data: a frozen dataclass, its published settings by name, its form for the kernels.

The specification reads the same class and computes by itself what its fields mean; recorded steps of the original
systems judge both (`tests/data/golden/policies`).

Sources: Nemotron TwoTower and Megatron's sampler; LLaDA (arXiv:2502.09992), Dream (arXiv:2508.15487), Fast-dLLM
(arXiv:2505.22618), dInfer (arXiv:2510.08666), SDAR (arXiv:2510.06303), BD3-LM (arXiv:2503.09573), E2D2
(arXiv:2510.22852), SAID (arXiv:2606.04974), BlockGen (arXiv:2606.02241), and the code of JetEngine, LMDeploy, dllm,
Diffulex, WeDLM, LLaDA2, vLLM and DiffusionGemma.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options import remask_systems
from twotower_kernels.options.arguments import whole
from twotower_kernels.options.remask_choices import (
    CHOICES,
    Alpha,
    Base,
    Combine,
    Gate,
    GateOn,
    Renoise,
    Schedule,
    Score,
    Statistics,
    Time,
    checked,
)

# The order of the op's `options` and `bounds`, which csrc/common/remask_policy.h repeats. gate_bound is missing:
# it is a number per row.
OPTIONS = (
    *("suppress_mask", "skip_mask_candidates", "standing", "greedy", "statistics"),
    *("top_p_first", "top_p_tempered", "top_p_keep_crossing"),
    *("score", "gate", "strict", "gate_on", "factor_last_free", "entropy_includes_self"),
    *("schedule", "schedule_base", "spread_remainder", "alpha", "long_grid", "min_commits", "finish"),
    *("window", "combine", "sub_block", "renoise", "renoise_as"),
)
OPTIONAL_BOUNDS = (
    *("temperature_end", "gate_slack", "run_threshold", "complete_threshold", "edit_threshold", "remask_threshold"),
)
BOUNDS = ("position_penalty", "rank_temperature", "min_t", "alpha_floor", "warmup", *OPTIONAL_BOUNDS)


@dataclass(frozen=True)
class RemaskPolicy:
    """What a remasking step does, in five stages: propose, score, gate, schedule, combine.

    The defaults are TwoTower's rule without its threshold. Vary a policy with `dataclasses.replace`. Letters: n
    positions wait now, n0 waited when the block began, S is its length, this is step i of N, r = max(1, N - i); c is
    the confidence (the probability of the candidate x^), H the entropy in nats, j the rank from 1.

    Propose:
        suppress_mask: the mask token cannot be a candidate. Otherwise a position that takes it stays a mask.
        skip_mask_candidates: a position whose candidate is the mask token sits the step out (dInfer).
        standing: the candidate is the token that stands there, mask or not (BlockGen's corrector).
        greedy: the candidate is the argmax at any temperature, which then only shapes the statistics.
        statistics: c, margin and H come from the "raw" softmax or the "filtered" one (after temperature, top-k, top-p).
        top_p_first, top_p_tempered, top_p_keep_crossing: top-p before top-k (Dream); nucleus of the tempered
            distribution (not in WeDLM); the token that crosses top_p belongs to the nucleus (not in BD3-LM). The best
            token always does.
        temperature_end: the temperature falls linearly from its argument at step 0 towards this at step N; None: no.

    Score:
        score: "confidence", "margin" (p1 - p2), "neg_entropy", "random" (a uniform number, or the caller's
            `rank_noise`), "leftmost", "top" (p1), "gap" (log c - log p1).
        position_penalty: taken off the score per position behind the first one that waits (WeDLM).
        rank_temperature: the order of the positions is drawn, without replacement, with chances that are the softmax of
            score / rank_temperature (Dream's alg_temp); as it falls to 0, the score's own order. 0: off.

    Gate, the set G of positions that are good enough by themselves:
        gate: "none"; "threshold" (value > gate_bound); "factor" (the longest run of ranks with
            value >= 1 - gate_bound / (j + 1), rank 1 free); "entropy_sum" (ranks with H(1) + ... + H(j) < gate_bound);
            "prefix" (the longest run of ranks with value > gate_bound).
        gate_bound: the bound; `remask`'s argument of this name overrides it.
        strict: whether a value equal to the bound fails ("threshold", "entropy_sum", "prefix").
        gate_on: the value is the confidence or the score.
        gate_slack: the threshold is at most the row's best value less this (dInfer); None: no such limit.
        factor_last_free: when only the last rank fails, it passes (Fast-dLLM).
        entropy_includes_self: whether the sum of rank j ends with H(j) or H(j - 1).
        run_threshold: the best of each run of adjacent positions that wait passes above this (dInfer); None: no.

    Schedule, the number q of positions due in this step:
        schedule: "none" 0; "remaining" ceil(n / r); "even" floor(base / N) + [i < base mod N]; "carried" what is
            missing from floor((i + 1) n0 / N); "noise" n - min(floor((1 - a(s)) S), n - 1); "truncated" floor(n rho);
            "rounded" n0 split by rounding l rho to even while l are left, without the zeros; "coin" each position with
            probability rho; "posterior" each as x^ or the mask, drawn from q(x_s | x_t); "uniform" each as x^, as the
            token that stands there or as a random one, drawn from the uniform-state q(x_s | x_t), where a(s) = 1 in the
            last step (BlockGen, with renoise); "corrupt" n - max(1, round((1 - a(s)) S)).
            t = 1 - i (1 - min_t) / N, s = t - (1 - min_t) / N, rho = (a(s) - a(t)) / (1 - a(t)).
        schedule_base: base of "even", n0 ("masks") or S ("block", "editable"). spread_remainder: its bracket. n and n0
            count `editable` positions alone, so that a stage of some positions (SAID) has its own schedule from n0; S
            is the whole length, or with "editable" that of the editable positions, in "noise" too.
        alpha, min_t: the fraction a of clean tokens over time, and the last time. "linear" 1 - t; "cosine"
            cos(pi t / 2); "exponential" (e^-3t - e^-3) / (1 - e^-3); "sine" 1 - sin(pi t / 2) (dllm's cosine);
            "cosine_floor" 0.999 cos(pi t / 2) (BD3-LM's cosine).
        alpha_floor: e in a = e + (1 - e) times that (BlockGen).
        long_grid: t = 1 - i / (N - 1), s = max(0, t - 1 / N) (BD3-LM).
        warmup: q is 1 while i / N is below this (0.4 in Megatron's adaptive rule).
        min_commits: q is at least this. finish: the last step (i >= N - 1) commits all that wait.

    Combine:
        window: the q positions are those from the first that waits on, instead of the best.
        combine: "fill" (G, and the best others up to q; with window G if it has q, else the window); "union"; "cap"
            (scheduled positions within G, and the best min_commits).
        sub_block: every stretch of this many positions is a row of its own; 0: no stretches.
        complete_threshold: nothing of a stretch is due until this fraction of the one before is committed; None: no.

    Committed tokens:
        edit_threshold: one with c above this becomes its candidate, if that differs (LLaDA2.1); None: no.
        remask_threshold: one with c below this waits too, and becomes a mask if not chosen (dInfer); None: no. That
            many more are chosen.
        renoise: all positions wait in every step, and those not chosen become uniform random tokens, in the last step
            with finish their argmax (DiffusionGemma). No mask is needed. renoise_as: "mask" instead.

    time: see `model_time`.

    Raises:
        ValueError: a value outside its range or a combination without meaning. TypeError: a value of the wrong type.
    """

    suppress_mask: bool = True
    skip_mask_candidates: bool = False
    standing: bool = False
    greedy: bool = False
    statistics: Statistics = "raw"
    top_p_first: bool = False
    top_p_tempered: bool = True
    top_p_keep_crossing: bool = True
    temperature_end: float | None = None

    score: Score = "confidence"
    position_penalty: float = 0.0
    rank_temperature: float = 0.0

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
    alpha_floor: float = 0.0
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
    renoise_as: Renoise = "random"

    time: Time = "masked_fraction"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field.name, field.default, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.combine == "cap" and self.gate == "none":
            raise ValueError("combine: expected a gate with 'cap', got gate='none'")
        if self.renoise and (self.edit_threshold is not None or self.remask_threshold is not None):
            raise ValueError("renoise: expected edit_threshold and remask_threshold None, as all positions wait anyway")
        if self.schedule == "posterior" and not self.suppress_mask:
            raise ValueError("suppress_mask: expected True with the posterior, which gives the mask its probability")
        if self.schedule == "uniform" and (not self.renoise or self.renoise_as != "random" or self.standing):
            raise ValueError("schedule: expected renoise to random tokens and no standing ones with 'uniform'")
        if not self.renoise and (self.standing or self.renoise_as == "mask"):
            raise ValueError("renoise: expected True with standing tokens, and with renoise_as='mask'")
        if self.complete_threshold is not None and self.sub_block == 0:
            raise ValueError("sub_block: expected a positive length with complete_threshold, got 0")
        if self.rank_temperature > 0:
            for name, wrong in (("score", "random"), ("gate_on", "score"), ("schedule", "coin posterior uniform")):
                if (value := getattr(self, name)) in wrong.split():
                    raise ValueError(f"rank_temperature: expected 0 with {name}={value!r}, as noise is for ranks alone")
        object.__setattr__(self, "_encoded", self._encode())

    def model_time(
        self, num_masked: int | Tensor, block_size: int, step: int | Tensor, num_steps: int | Tensor
    ) -> Tensor:
        """The time the denoiser is given: num_masked / block_size, or t of the schedule (`time="schedule"`).

        Args:
            num_masked, step, num_steps: numbers or integer tensors of any shapes that broadcast.
            block_size: length of the block.

        Returns:
            float32 in [0, 1] of the broadcast shape.
        """
        given, block_size = (num_masked, step, num_steps), whole("block_size", block_size)
        devices = [x.device for x in given if isinstance(x, Tensor)]
        device = devices[0] if devices else torch.device("cpu")
        # A sum, for the sake of torch.compile: it makes a graph for each number that becomes a tensor otherwise.
        zero = torch.zeros((), dtype=torch.float64, device=device)
        masked, i, n = (x.to(device).double() if isinstance(x, Tensor) else zero + x for x in given)
        if self.time == "masked_fraction":
            t = masked / max(block_size, 1)
        else:
            i = torch.minimum(i, n - 1)
            t = 1 - i / (n - 1).clamp(min=1) if self.long_grid else (n - i + i * self.min_t) / n
        return t.float().clamp(0.0, 1.0).expand(torch.broadcast_shapes(masked.shape, i.shape, n.shape))

    def encoded(self) -> tuple[list[int], list[float]]:
        """The policy as the op takes it: numbers in the order of OPTIONS, with whether each of OPTIONAL_BOUNDS is
        given, and of BOUNDS. The lists are the policy's own, which are made once."""
        encoded: tuple[list[int], list[float]] = self.__dict__["_encoded"]
        return encoded

    def _encode(self) -> tuple[list[int], list[float]]:
        options = []
        for name in OPTIONS:
            value = getattr(self, name)
            options.append(CHOICES[name].index(value) if name in CHOICES else int(value))
        options += [int(getattr(self, name) is not None) for name in OPTIONAL_BOUNDS]
        return options, [float(getattr(self, name) or 0.0) for name in BOUNDS]

    @staticmethod
    def named(system: str, strategy: str | None = None, **arguments: Any) -> "RemaskPolicy":
        """The policy of a published program in that program's own words: docs/policies.md lists them all.

            RemaskPolicy.named("sdar", "low_confidence_dynamic", confidence_threshold=0.85)
            RemaskPolicy.named("dream", alg="entropy", alg_temp=0.2)

        Args:
            system: its name; case, spaces, dots, hyphens and underscores do not matter.
            strategy: of the system, its default if not given; also by the program's own keyword.
            arguments: of the strategy. What `remask` takes (temperature, top-k, top-p, numbers of steps) is not among
                them. None is as good as not given for an argument that another strategy of the system takes.

        Raises:
            ValueError: an unknown system or strategy, or a value out of its range. TypeError: an unknown or missing
                argument, or a value of the wrong type. Each says what there is.
        """
        policy: RemaskPolicy = remask_systems.build(RemaskPolicy, system, strategy, arguments)
        return policy

    # --- presets, named after the systems whose rules they are --------------------------------------------------------

    @classmethod
    def twotower(cls, threshold: float = 0.8) -> "RemaskPolicy":
        """TwoTower, Megatron's confidence_unmasking: max(1, #{c > threshold}, ceil(n / r)), all in the last step."""
        return cls(gate="threshold", gate_bound=threshold)

    @classmethod
    def llada(cls, score: Score = "confidence") -> "RemaskPolicy":
        """LLaDA, Automodel: floor(n0 / N), one more in the first n0 mod N steps; the mask may be proposed."""
        return cls(score=score, schedule="even", suppress_mask=False, min_commits=0, finish=False)

    @classmethod
    def random(cls) -> "RemaskPolicy":
        """LLaDA with random remasking."""
        return cls.llada("random")

    @classmethod
    def threshold(cls, tau: float = 0.9, *, strict: bool = False, score: Score = "confidence") -> "RemaskPolicy":
        """Fast-dLLM, dllm, LMDeploy's dynamic, Automodel: every score >= tau, at least the best one."""
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
        """SDAR: those with tempered c > tau if they are as many as S's even share, else that share;
        without tau always the share."""
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
        """JetEngine's strategies by their names there; bound is tau, or gamma of "entropy_bounded"."""
        share = cls.sdar(greedy=greedy)
        if strategy == "low_confidence_static":
            return share
        if strategy == "low_confidence_dynamic":
            return dataclasses.replace(cls.sdar(bound, greedy=greedy), window=True)
        if strategy == "sequential":
            return dataclasses.replace(share, window=True)
        if strategy == "random":
            return dataclasses.replace(share, score="random")
        if strategy == "entropy_bounded":
            return dataclasses.replace(cls.entropy_bound(bound), greedy=greedy)
        known = "'low_confidence_static', 'low_confidence_dynamic', 'sequential', 'random', 'entropy_bounded'"
        raise ValueError(f"strategy: expected one of {known}, got {strategy!r}")

    @classmethod
    def lmdeploy_static(cls, *, sequential: bool = False) -> "RemaskPolicy":
        """LMDeploy: max(1, floor(S / N)), the best, or with `sequential` the window from the first mask on."""
        share = dataclasses.replace(cls.llada(), schedule_base="block", spread_remainder=False, min_commits=1)
        return dataclasses.replace(share, window=sequential)

    @classmethod
    def llada2(
        cls,
        threshold: float = 0.95,
        *,
        min_commits: int | None = None,
        edit_threshold: float | None = None,
        remask_threshold: float | None = None,
    ) -> "RemaskPolicy":
        """LLaDA2, dllm, vLLM: SDAR's rule; with min_commits LLaDA2.1's, where that number replaces the share."""
        return dataclasses.replace(
            cls.sdar(threshold),
            schedule="even" if min_commits is None else "none",
            min_commits=min_commits or 0,
            edit_threshold=edit_threshold,
            remask_threshold=remask_threshold,
        )

    @classmethod
    def fast_dllm_factor(cls, factor: float = 1.0, *, last_free: bool = True) -> "RemaskPolicy":
        """Fast-dLLM (dllm: last_free=False): ranks with c >= 1 - factor / (j + 1); last_free: n - 1 of n become n."""
        return dataclasses.replace(cls.threshold(factor), gate="factor", factor_last_free=last_free)

    @classmethod
    def fast_dllm_dream(cls, tau: float = 0.9) -> "RemaskPolicy":
        """Fast-dLLM for Dream: of n0's share and what earlier steps left of it, those with c >= tau; at least one."""
        return dataclasses.replace(cls.threshold(tau), schedule="carried", combine="cap")

    @classmethod
    def dllm(cls, alpha: Alpha = "linear", score: Score = "confidence") -> "RemaskPolicy":
        """dllm: n0 split by rounding what the noise schedule releases in each step."""
        return dataclasses.replace(cls.llada(score), schedule="rounded", alpha=alpha)

    @classmethod
    def dinfer(cls, tau: float = 0.9) -> "RemaskPolicy":
        """dInfer: c >= min(tau, best c - 1e-5), positions that propose the mask left out."""
        return dataclasses.replace(cls.threshold(tau), skip_mask_candidates=True, gate_slack=1e-5)

    @classmethod
    def dinfer_hierarchy(
        cls, low: float = 0.4, high: float | None = 0.9, *, remask_threshold: float | None = None
    ) -> "RemaskPolicy":
        """dInfer's hierarchy: the best of each run of masks above low, all above high, at least one."""
        above = cls.threshold(math.inf if high is None else high, strict=True)
        return dataclasses.replace(above, run_threshold=low, remask_threshold=remask_threshold)

    @classmethod
    def entropy_bound(cls, gamma: float = 0.5) -> "RemaskPolicy":
        """JetEngine's entropy bound: by rising H, while their sum stays below gamma; at least one."""
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
        """DiffusionGemma: by rising H, while the sum before stays at most bound; the rest becomes noise."""
        return dataclasses.replace(
            cls.entropy_bound(bound),
            entropy_includes_self=False,
            strict=False,
            temperature_end=t_min,
            renoise=True,
            finish=finish,
        )

    @classmethod
    def dream(cls, algorithm: str = "maskgit", *, eps: float = 1e-3, alg_temp: float | None = None) -> "RemaskPolicy":
        """Dream: floor(n (1 - s / t)) best by c, "margin" or "entropy", drawn with alg_temp; "origin": a coin each."""
        scores: dict[str, Score] = {
            "maskgit": "confidence",
            "margin": "margin",
            "entropy": "neg_entropy",
            "origin": "confidence",
        }
        if algorithm not in scores:
            raise ValueError(f"algorithm: expected one of {', '.join(map(repr, scores))}, got {algorithm!r}")
        return cls(
            score=scores[algorithm],
            schedule="coin" if algorithm == "origin" else "truncated",
            min_t=eps,
            suppress_mask=False,
            statistics="filtered",
            top_p_first=True,
            min_commits=0,
            rank_temperature=alg_temp or 0.0,
        )

    @classmethod
    def leftmost(cls, threshold: float | None = None) -> "RemaskPolicy":
        """From left to right: ceil(n / r), or as many as have c > threshold."""
        return cls(score="leftmost", gate="none" if threshold is None else "threshold", gate_bound=threshold or 0.0)

    @classmethod
    def prefix(cls, threshold: float = 0.8) -> "RemaskPolicy":
        """From left to right as far as c > threshold without a gap, at least one; all in the last step."""
        return cls(score="leftmost", gate="prefix", gate_bound=threshold, schedule="none")

    @classmethod
    def first_hitting(cls) -> "RemaskPolicy":
        """BD3-LM's first-hitting sampler: one position, each as likely."""
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
        """Megatron, E2D2: min(floor((1 - a(s)) S), n - 1) stay, less those with c >= threshold.

        adaptive: one per step while i / N < 0.4, ceil(n / r) after it.
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
        """Megatron, E2D2, BD3-LM (long_grid): q(x_s | x_t) at every position; masks may remain."""
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
        """WeDLM's engine: every H + position_penalty · distance to the first mask below tau, at least the smallest."""
        below = cls.threshold(-(tau or 0.0), strict=True, score="neg_entropy")
        gate = "none" if tau is None else below.gate
        return dataclasses.replace(below, gate=gate, position_penalty=position_penalty, top_p_tempered=False)

    @classmethod
    def wedlm_hf(cls, tau: float = 0.8) -> "RemaskPolicy":
        """WeDLM in Transformers: the argmax, every tempered c >= tau, at least one; tau = 0: one at a time."""
        above = cls.threshold(tau)
        return dataclasses.replace(above, gate=above.gate if tau > 0 else "none", statistics="filtered", greedy=True)

    @classmethod
    def diffulex(
        cls,
        threshold: float = 0.9,
        *,
        block_size: int = 32,
        score: Score = "confidence",
        complete_threshold: float | None = None,
    ) -> "RemaskPolicy":
        """Diffulex: in each block every c > threshold, else the best score; D2F with complete_threshold."""
        above = dataclasses.replace(cls.threshold(threshold, strict=True, score=score), gate_on="confidence")
        return dataclasses.replace(above, sub_block=block_size, complete_threshold=complete_threshold)

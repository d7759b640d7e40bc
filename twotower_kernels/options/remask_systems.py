"""The catalogue of published un-masking rules by their systems' own words: which strategies a system has, which
arguments each takes there, and the policy that they come to. `RemaskPolicy.named` reads it, docs/policies.md shows it.

An argument that has no default here must be given. Temperatures, top-k, top-p and numbers of steps are arguments of
`remask` in every system.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

REQUIRED = object()  # in the place of a default

Build = Callable[..., Any]  # from the class of policies and the arguments to a policy


@dataclass(frozen=True)
class Strategy:
    """One rule of a system: what makes the policy, the arguments with their defaults, and which of those that have
    another default may be None."""

    build: Build
    arguments: Mapping[str, Any] = field(default_factory=dict)
    may_be_none: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A published program.

    strategies: the first is the default. keywords: the arguments by which the program takes a strategy's name. aliases:
    other names of strategies. note: where the policies differ from the program on purpose.
    """

    source: str
    strategies: Mapping[str, Strategy]
    keywords: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def arguments(self) -> set[str]:
        """Of all strategies."""
        return {name for strategy in self.strategies.values() for name in strategy.arguments}


# --- what arguments come to -----------------------------------------------------------------------------------------


def _one_of(name: str, value: Any, known: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return known[value]


def _either(**given: Any) -> None:
    """ValueError if several are given."""
    names = [name for name, value in given.items() if value is not None and value is not False]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected at most one of them")


_SCORES = {
    **{"margin_confidence": "margin", "neg_entropy": "neg_entropy"},
    **{"confidence_based_noising": "confidence", "confidence_margin_based_noising": "margin"},
}
_ALPHAS = {name: name for name in ("linear", "cosine", "exponential")}
_BD3LM = {"loglinear": "linear", "cosine": "cosine_floor"}
_DLLM = {"LinearAlphaScheduler": "linear", "CosineAlphaScheduler": "sine"}


def _score(otherwise: str, **given: Any) -> str:
    """The score that one of some flags asks for, each named after one."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    _either(**given)
    asked = next((name for name, value in given.items() if value), "")
    return _SCORES.get(asked, otherwise)


def _transfer(score: str, last_free: bool = True) -> Build:
    """`get_transfer_index` of LLaDA and those after it: a threshold, a factor, else the schedule."""

    def build(P: Any, threshold: Any = None, factor: Any = None, neg_entropy: Any = False) -> Any:
        _either(threshold=threshold, factor=factor)
        scored = _score(score, neg_entropy=neg_entropy)
        if factor is not None:
            if score == "random":
                raise ValueError("factor: expected None with random remasking, as ranks have no confidence")
            return P.fast_dllm_factor(factor, last_free=last_free)
        return P.llada(scored) if threshold is None else P.threshold(threshold, score=scored)

    return build


def _remasking(arguments: Mapping[str, Any], last_free: bool = True) -> dict[str, Strategy]:
    scores = {"low_confidence": "confidence", "random": "random"}
    return {name: Strategy(_transfer(score, last_free), arguments) for name, score in scores.items()}


def _dllm(score: str) -> Build:
    def build(P: Any, scheduler: Any, threshold: Any, factor: Any) -> Any:
        alpha = _one_of("scheduler", scheduler, _DLLM)
        if threshold is None and factor is None:
            return P.dllm(alpha, score)
        return _transfer(score, last_free=False)(P, threshold, factor)

    return build


def _predict_and_noise(finish: bool) -> Build:
    def build(
        P: Any,
        min_t: Any,
        noise_schedule: Any = "linear",
        adaptive_unmasking: Any = False,
        confidence_threshold: Any = None,
        **noising: Any,
    ) -> Any:
        if not isinstance(adaptive_unmasking, bool):
            raise TypeError(f"adaptive_unmasking: expected True or False, got {adaptive_unmasking!r}")
        return P.predict_and_noise(
            _score("random", **noising),
            _one_of("noise_schedule", noise_schedule, _ALPHAS),
            min_t=min_t,
            threshold=confidence_threshold,
            adaptive=adaptive_unmasking,
            finish=finish,
        )

    return build


def _posterior(P: Any, min_t: Any, noise_schedule: Any = "linear") -> Any:
    return P.posterior(_one_of("noise_schedule", noise_schedule, _ALPHAS), min_t=min_t)


def _hierarchy(P: Any, low_threshold: Any, threshold: Any, remask_threshold: Any = None) -> Any:
    return P.dinfer_hierarchy(low_threshold, threshold, remask_threshold=remask_threshold)


def _diffulex(P: Any, accept_threshold: Any, block_size: Any, complete_threshold: Any = None, **scores: Any) -> Any:
    score = _score("confidence", **scores)
    return P.diffulex(accept_threshold, block_size=block_size, score=score, complete_threshold=complete_threshold)


def _dream(algorithm: str) -> Build:
    return lambda P, eps, alg_temp=None: P.dream(algorithm, eps=eps, alg_temp=alg_temp)


def _blockgen(noise: Any, eps: Any) -> dict[str, Any]:
    """What all of BlockGen's rules share: its clock, and p after the temperature."""
    alpha = _one_of("noise", noise, {"log-linear": "linear", "cosine": "sine"})
    shared = {"statistics": "filtered", "min_commits": 0, "time": "schedule"}
    return shared | {"alpha": alpha, "alpha_floor": eps, "min_t": 1e-5}


def _blockgen_uniform(P: Any, noise: Any, eps: Any, noise_removal: Any) -> Any:
    greedy = _one_of("noise_removal", noise_removal, {"ancestral": "", "greedy": "greedy"})
    return P(schedule="uniform", renoise=True, finish=bool(greedy), **_blockgen(noise, eps))


def _blockgen_corrector(
    P: Any, diffusion_type: Any, corruption_mode: Any, diffusion_metric: Any, ar_metric: Any, noise: Any, eps: Any
) -> Any:
    of_diffusion = {"entropy": "neg_entropy", "confidence": "top", "margin": "margin"}
    of_ar = {"nll": "confidence", "gap_to_top1": "gap", "entropy": "neg_entropy"}
    scores = {
        "random": "random",
        "divergence": "random",  # of numbers that the caller makes of the two distributions
        "diffusion_metric": _one_of("diffusion_metric", diffusion_metric, of_diffusion),
        "ar_metric": _one_of("ar_metric", ar_metric, of_ar),
    }
    return P(
        schedule="corrupt",
        score=_one_of("corruption_mode", corruption_mode, scores),
        standing=True,
        renoise=True,
        renoise_as=_one_of("diffusion_type", diffusion_type, {"uniform": "random", "absorbing": "mask"}),
        finish=False,
        **_blockgen(noise, eps),
    )


# --- the systems ----------------------------------------------------------------------------------------------------

_MIN_T = {"min_t": 1e-5}
_NOISING = {"confidence_based_noising": True, "confidence_margin_based_noising": False}
_EPS = {"eps": 1e-3}
_COSINE = {"noise": "cosine", "eps": 1e-3}
_LOW_HIGH = {"low_threshold": 0.4, "threshold": 0.9}
_ACCEPT = {"accept_threshold": 0.9, "block_size": 32}
_DREAM = {
    "origin": Strategy(_dream("origin"), _EPS),
    "maskgit_plus": Strategy(_dream("maskgit"), _EPS | {"alg_temp": None}),
    "topk_margin": Strategy(_dream("margin"), _EPS | {"alg_temp": None}),
    "entropy": Strategy(_dream("entropy"), _EPS | {"alg_temp": None}),
}
_OF_ROWS = "The original's quota is one for the whole batch: a row with fewer masks has committed tokens masked again."
_REWRITES = (
    "The original's quota is a share of the block's length. Where fewer masks than that are left, as in a block that "
    "begins with the end of a prompt or where a threshold let more through before, it rewrites committed tokens. Here "
    "masks alone take a token."
)

SYSTEMS: dict[str, System] = {
    "twotower": System(
        "NVIDIA Nemotron TwoTower, generate_mask_diffusion",
        {
            "confidence_unmasking": Strategy(
                lambda P, confidence_threshold: P.twotower(confidence_threshold), {"confidence_threshold": 0.8}
            )
        },
        aliases={"unmask": "confidence_unmasking"},
    ),
    "megatron": System(
        "NVIDIA/Megatron-LM, MaskDiffusionProcess.sample_block",
        {
            "predict_and_noise": Strategy(
                _predict_and_noise(finish=True),
                _NOISING | _MIN_T | {"noise_schedule": "linear", "adaptive_unmasking": False},
            ),
            "posterior": Strategy(_posterior, _MIN_T | {"noise_schedule": "linear"}),
            "confidence_unmasking": Strategy(
                lambda P, confidence_threshold: P.twotower(confidence_threshold), {"confidence_threshold": 1e6}
            ),
        },
        keywords=("sampling_strategy",),
    ),
    "e2d2": System(
        "kuleshov-group/e2d2, generate",
        {
            "predict_and_noise": Strategy(
                _predict_and_noise(finish=False),
                dict.fromkeys(_NOISING, False) | _MIN_T | {"confidence_threshold": 1e6},
            ),
            "posterior": Strategy(_posterior, _MIN_T),
        },
        keywords=("sampling_strategy",),
    ),
    "bd3lm": System(
        "kuleshov-group/bd3lms, _ddpm_caching_update",
        {
            "first_hitting": Strategy(lambda P: P.first_hitting()),
            "posterior": Strategy(
                lambda P, noise: P.posterior(_one_of("noise", noise, _BD3LM), long_grid=True), {"noise": "loglinear"}
            ),
        },
        note="At the last time point, t = 0, the original divides by zero and masks become token 0. Here what waits is "
        "drawn (loglinear) or stays (cosine).",
    ),
    "llada": System(
        "ML-GSAI/LLaDA, generate; with threshold or factor as NVlabs/Fast-dLLM has it in the same function",
        _remasking({"threshold": None, "factor": None}),
        keywords=("remasking",),
    ),
    "fast_dllm": System(
        "NVlabs/Fast-dLLM, generate for LLaDA and diffusion_generate for Dream (confidence_threshold)",
        {
            **_remasking({"threshold": None, "factor": None}),
            "threshold": Strategy(lambda P, threshold: P.threshold(threshold), {"threshold": 0.9}),
            "factor": Strategy(lambda P, factor: P.fast_dllm_factor(factor), {"factor": 1.0}),
            "confidence_threshold": Strategy(lambda P, threshold: P.fast_dllm_dream(threshold), {"threshold": 0.9}),
            **_DREAM,
        },
        keywords=("remasking", "alg"),
        note="Rows without a mask make the original's factor fail. Here they are left alone.",
    ),
    "dream": System("DreamLM/Dream, diffusion_generate", _DREAM, keywords=("alg",), note=_OF_ROWS),
    "said": System(
        "TH-AI-Lab-PKU/SAID, a stage of its loop (positions of the stage are `editable`, num_steps its own)",
        _remasking({}),
        keywords=("remasking",),
    ),
    "blockgen": System(
        "jdeschena/blockgen, its samplers: ancestral steps of both diffusions, and the corrector of ARPC (for "
        "divergence the caller's `rank_noise` says where the two distributions agree, in [0, 1), larger is better; for "
        "ar_metric the logits are the autoregressive ones)",
        {
            "uniform": Strategy(_blockgen_uniform, _COSINE | {"noise_removal": "ancestral"}),
            "absorbing": Strategy(
                lambda P, noise, eps: P(schedule="coin", finish=True, **_blockgen(noise, eps)), _COSINE
            ),
            "corrector": Strategy(
                _blockgen_corrector,
                {
                    **{"diffusion_type": "uniform", "corruption_mode": "divergence"},
                    **{"diffusion_metric": "entropy", "ar_metric": "nll"},
                    **_COSINE,
                },
            ),
        },
    ),
    "dllm": System(
        "ZHZisZZ/dllm, MDLMSampler; with threshold or factor its fastdllm sampler",
        {
            name: Strategy(_dllm(score), {"scheduler": "LinearAlphaScheduler", "threshold": None, "factor": None})
            for name, score in (("low_confidence", "confidence"), ("random", "random"))
        },
        keywords=("remasking",),
    ),
    "automodel": System(
        "NVIDIA-NeMo/Automodel, get_transfer_index", _remasking({"threshold": None}), keywords=("remasking",)
    ),
    "megatron_bridge": System(
        "NVIDIA-NeMo/Megatron-Bridge, get_transfer_index",
        _remasking({"threshold": None, "neg_entropy": False}),
        keywords=("remasking",),
    ),
    "sdar": System(
        "JetAstra/SDAR, block_diffusion_generate",
        {
            "low_confidence_dynamic": Strategy(
                lambda P, confidence_threshold: P.sdar(confidence_threshold), {"confidence_threshold": 0.85}
            ),
            "low_confidence_static": Strategy(lambda P: P.sdar()),
            "sequential": Strategy(lambda P: P.jetengine("sequential")),
        },
        keywords=("remasking_strategy",),
        note=_REWRITES,
    ),
    "jetengine": System(
        "Labman42/JetEngine, Scheduler.postprocess",
        {
            "low_confidence_dynamic": Strategy(
                lambda P, dynamic_threshold: P.jetengine("low_confidence_dynamic", dynamic_threshold),
                {"dynamic_threshold": 0.9},
            ),
            "low_confidence_static": Strategy(lambda P: P.jetengine("low_confidence_static")),
            "sequential": Strategy(lambda P: P.jetengine("sequential")),
            "random": Strategy(lambda P: P.jetengine("random")),
            "entropy_bounded": Strategy(
                lambda P, eb_threshold: P.jetengine("entropy_bounded", eb_threshold), {"eb_threshold": REQUIRED}
            ),
        },
        keywords=("remasking_strategy",),
        note="Its postprocess_loop takes the most confident, as SDAR, where a step misses its quota, and rewrites "
        "committed tokens as SDAR does.",
    ),
    "lmdeploy": System(
        "InternLM/lmdeploy, UnmaskingProcessor",
        {
            "low_confidence_dynamic": Strategy(
                lambda P, confidence_threshold: P.threshold(confidence_threshold), {"confidence_threshold": 0.85}
            ),
            "low_confidence_static": Strategy(lambda P: P.lmdeploy_static()),
            "sequential": Strategy(lambda P: P.lmdeploy_static(sequential=True)),
        },
        keywords=("unmasking_strategy",),
    ),
    "llada2": System(
        "inclusionAI's LLaDA2MoeModelLM.generate (its minimal_topk shortens num_steps)",
        {"threshold_or_schedule": Strategy(lambda P, threshold: P.llada2(threshold), {"threshold": 0.95})},
        note=_REWRITES,
    ),
    "llada21": System(
        "LLaDA2.1's LLaDA2MoeModelLM.generate",
        {
            "threshold_with_editing": Strategy(
                lambda P, threshold, editing_threshold, num_to_transfer: P.llada2(
                    threshold, min_commits=num_to_transfer, edit_threshold=editing_threshold
                ),
                {"threshold": REQUIRED, "editing_threshold": REQUIRED, "num_to_transfer": 1},
            )
        },
    ),
    "vllm_dllm_plugin": System(
        "vllm-project/dllm-plugin, Llada2DefaultRemaskingPolicy",
        {
            "threshold_or_schedule": Strategy(
                lambda P, commit_confidence_threshold, num_transfer: P.llada2(
                    commit_confidence_threshold, min_commits=num_transfer
                ),
                {"commit_confidence_threshold": 0.95, "num_transfer": None},
            )
        },
    ),
    "dinfer": System(
        "inclusionAI/dInfer, its parallel decoders",
        {
            "threshold": Strategy(lambda P, threshold: P.dinfer(threshold), {"threshold": 0.9}),
            "hierarchy": Strategy(_hierarchy, _LOW_HIGH, may_be_none=("threshold",)),
            "hierarchy_remask": Strategy(
                _hierarchy, _LOW_HIGH | {"remask_threshold": REQUIRED}, may_be_none=("threshold",)
            ),
            "cache": Strategy(
                lambda P, threshold, minimal_topk: replace(P.threshold(threshold), min_commits=minimal_topk),
                {"threshold": 0.9, "minimal_topk": 1},
            ),
        },
        keywords=("parallel_decoding",),
        aliases={"ThresholdParallelDecoder": "threshold", "HierarchyDecoder": "hierarchy"},
        note="Where too few positions wait for its quota, the original's hierarchy_remask overwrites confident tokens "
        "or fails. Here what waits is taken.",
    ),
    "wedlm": System(
        "Tencent/WeDLM, its engine's Sampler and the code for Transformers (hf_confidence)",
        {
            "entropy_position": Strategy(
                lambda P, entropy_threshold, pos_penalty_factor: P.wedlm(
                    entropy_threshold, position_penalty=pos_penalty_factor
                ),
                {"entropy_threshold": None, "pos_penalty_factor": 0.05},
            ),
            "hf_confidence": Strategy(
                lambda P, confidence_threshold: P.wedlm_hf(confidence_threshold), {"confidence_threshold": REQUIRED}
            ),
        },
    ),
    "diffulex": System(
        "zhijie-group/Diffulex, its samplers",
        {
            "d2f": Strategy(
                _diffulex, _ACCEPT | {"complete_threshold": REQUIRED, "margin_confidence": False, "neg_entropy": False}
            ),
            "fast_dllm_v2": Strategy(_diffulex, _ACCEPT),
        },
        keywords=("decoding_strategy",),
    ),
    "diffusion_gemma": System(
        "transformers, EntropyBoundSampler (its t_max is the temperature)",
        {
            "entropy_bound": Strategy(
                lambda P, entropy_bound, t_min: P.diffusion_gemma(entropy_bound, t_min=t_min, finish=False),
                {"entropy_bound": 0.1, "t_min": 0.4},
                may_be_none=("t_min",),
            )
        },
    ),
}


# --- looking up -----------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """Names are the same whatever the case and the signs between words: "Fast-dLLM", "LLaDA2.1"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _found(what: str, given: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(given, str):
        raise TypeError(f"{what}: expected a name, got {given!r}")
    for name, value in names.items():
        if _plain(name) == _plain(given):
            return value
    raise ValueError(f"{what}: expected one of {', '.join(map(repr, names))}, got {given!r}")


_OF_REMASK = "numbers of steps, temperatures and filters are arguments of remask"


def build(policies: Any, system: Any, strategy: Any, arguments: dict[str, Any]) -> Any:
    """The policy of `RemaskPolicy.named`; policies is that class."""
    name = _found("system", system, {name: name for name in SYSTEMS})
    entry = SYSTEMS[name]
    for keyword in entry.keywords:
        if keyword in arguments:
            if strategy is not None:
                raise TypeError(f"{keyword}: expected the strategy once, got {strategy!r} as well")
            strategy = arguments.pop(keyword)
    names = {known: known for known in entry.strategies} | dict(entry.aliases)
    chosen = next(iter(entry.strategies)) if strategy is None else _found(f"strategy of {name}", strategy, names)
    rule = entry.strategies[chosen]
    values = dict(rule.arguments)
    for argument, value in arguments.items():
        if argument not in values:
            if value is None and argument in entry.arguments:  # as good as not given
                continue
            raise TypeError(f"{argument}: {name}'s {chosen} takes {', '.join(values) or 'nothing'}; {_OF_REMASK}")
        if value is None and values[argument] is not None and argument not in rule.may_be_none:
            raise TypeError(f"{argument}: expected a value for {name}'s {chosen}, got None")
        values[argument] = value
    for argument, value in values.items():
        if value is REQUIRED:
            raise TypeError(f"{argument}: expected a value, as {name}'s {chosen} has no default for it")
    return rule.build(policies, **values)

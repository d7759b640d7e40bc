"""`RemaskPolicy.named`: each system's own words come to the policy that its recorded steps are replayed with."""

import dataclasses
import re
from typing import Any

import pytest

import twotower_kernels as tt
from tests.paths import GOLDEN, ROOT
from tests.replay_policies import Case, load, policy_of
from twotower_kernels.options.remask_systems import REQUIRED, SYSTEMS

P = tt.RemaskPolicy
CASES = {case.name: case for case in load(GOLDEN / "policies")}

# --- the recordings -------------------------------------------------------------------------------------------------

WORDS = {"threshold": "commit_confidence_threshold"}  # what vllm_dllm_plugin calls it
MIXED = "jetengine.mixed"  # a strategy per row
LOOP = "jetengine.low_confidence_dynamic_loop"  # SDAR's rule, see the catalogue's note


def in_its_own_words(case: Case) -> tuple[str, str | None, dict[str, Any]]:
    """System, strategy and arguments of a recorded case, from its recorded parameters."""
    system, rule = case.rule.split(".")
    p = dict(case.parameters)
    entry = SYSTEMS[system]
    strategy = next((p[keyword] for keyword in reversed(entry.keywords) if keyword in p), None)
    if strategy is None:
        words = rule.removesuffix("_sampled").removesuffix("_greedy").removesuffix("_renoise").removesuffix("_fast_v2")
        known = [name for name in entry.strategies if words.startswith(name)]
        strategy = max(known, key=len) if known else None
    if system == "dllm" and rule == "threshold_or_schedule":
        return "llada2", None, {"threshold": p["threshold"]}
    if system == "dinfer" and rule == "credit":
        strategy = "threshold"  # of logits with credit
    if system == "vllm_dllm_plugin":
        p = {WORDS.get(name, name): value for name, value in p.items()}
    if strategy is None:
        strategy = next(iter(entry.strategies))
    taken = entry.strategies[strategy].arguments
    flags = {name: bool(p[name]) for name in p if taken.get(name) is False}  # recorded by name in places
    return system, strategy, {name: value for name, value in (p | flags).items() if name in taken}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith((MIXED, LOOP))])
def test_recorded_parameters_name_the_policy_that_replays_them(name: str) -> None:
    case = CASES[name]
    system, strategy, arguments = in_its_own_words(case)
    named, replayed = P.named(system, strategy, **arguments), policy_of(case, case.parameters, P)
    greedy = {"greedy": True} if replayed.greedy and system in ("sdar", "jetengine") else {}
    assert dataclasses.replace(named, **greedy) == replayed


def test_every_system_that_was_recorded_is_named() -> None:
    assert {case.rule.split(".")[0] for case in CASES.values()} <= set(SYSTEMS)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "policy"),
    [
        (P.named("twotower"), P.twotower(0.8)),
        (P.named("TwoTower", "confidence-unmasking", confidence_threshold=0.5), P.twotower(0.5)),
        (P.named("LLaDA"), P.llada()),
        (P.named("llada", remasking="random"), P.random()),
        (P.named("llada", "low_confidence", threshold=0.9), P.threshold(0.9)),
        (P.named("Fast-dLLM", factor=1.5), P.fast_dllm_factor(1.5)),
        (P.named("fast_dllm", alg="confidence_threshold", threshold=0.7), P.fast_dllm_dream(0.7)),
        (P.named("sdar", "low_confidence_dynamic", confidence_threshold=0.6), P.sdar(0.6)),
        (P.named("SDAR"), P.sdar(0.85)),
        (P.named("sdar", "low_confidence_static", confidence_threshold=None), P.sdar()),
        (P.named("sdar", remasking_strategy="sequential"), P.jetengine("sequential")),
        (P.named("dream"), P.dream("origin")),
        (P.named("dream", alg="entropy", eps=0.01), P.dream("entropy", eps=0.01)),
        (P.named("dream", "topk_margin", alg_temp=0.2), P.dream("margin", alg_temp=0.2)),
        (P.named("dream", "maskgit_plus", alg_temp=0), P.dream()),
        (P.named("dream", "origin", alg_temp=None), P.dream("origin")),
        (P.named("LLaDA2", threshold=0.9), P.llada2(0.9)),
        (
            P.named("LLaDA2.1", threshold=0.7, editing_threshold=0.9, num_to_transfer=2),
            P.llada2(0.7, min_commits=2, edit_threshold=0.9),
        ),
        (P.named("dInfer", "ThresholdParallelDecoder", threshold=0.3), P.dinfer(0.3)),
        (P.named("dinfer", "hierarchy", threshold=None, low_threshold=0.2), P.dinfer_hierarchy(0.2, None)),
        (P.named("megatron"), P.predict_and_noise("confidence")),
        (P.named("wedlm", entropy_threshold=0.5), P.wedlm(0.5)),
        (P.named("diffusion_gemma", t_min=None), P.diffusion_gemma(t_min=None, finish=False)),
    ],
)
def test_names(named: tt.RemaskPolicy, policy: tt.RemaskPolicy) -> None:
    assert named == policy


def test_every_strategy_makes_a_policy() -> None:
    needed = {"eb_threshold": 0.4, "remask_threshold": 0.3, "complete_threshold": 0.9, "confidence_threshold": 0.8}
    needed |= {"threshold": 0.7, "editing_threshold": 0.9}
    for system, entry in SYSTEMS.items():
        for strategy, rule in entry.strategies.items():
            given = {name: needed[name] for name, default in rule.arguments.items() if default is REQUIRED}
            assert isinstance(P.named(system, strategy, **given), P)
        assert set(entry.aliases.values()) <= set(entry.strategies)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments", "error", "message"),
    [
        (("gpt",), {}, ValueError, "system: expected one of 'twotower', .*'diffusion_gemma'.*, got 'gpt'"),
        ((3,), {}, TypeError, "system: expected a name, got 3"),
        (("sdar", "random"), {}, ValueError, "strategy of sdar: expected one of 'low_confidence_dynamic', .* 'random'"),
        (("dream",), {"alg": "best"}, ValueError, "strategy of dream: expected one of 'origin', .*, got 'best'"),
        (("dream", "entropy"), {"alg": "entropy"}, TypeError, "alg: expected the strategy once, got 'entropy' as well"),
        (("sdar",), {"tau": 0.5}, TypeError, "tau: sdar's low_confidence_dynamic takes confidence_threshold; numbers"),
        (("sdar",), {"tau": None}, TypeError, "tau: sdar's low_confidence_dynamic takes confidence_threshold; numbers"),
        (("sdar", "sequential"), {"confidence_threshold": 0.5}, TypeError, "sdar's sequential takes nothing; numbers"),
        (("sdar",), {"confidence_threshold": None}, TypeError, "confidence_threshold: expected a value for sdar's low"),
        (("dream", "entropy"), {"temperature": 0.2}, TypeError, "temperature: dream's entropy takes eps, alg_temp"),
        (("dream", "entropy"), {"alg_temp": -1.0}, ValueError, r"rank_temperature: expected a number in \[0, 1e\+06\]"),
        (("llada",), {"threshold": 0.9, "factor": 1.0}, ValueError, "threshold and factor: expected at most one"),
        (("llada", "random"), {"factor": 1.0}, ValueError, "factor: expected None with random remasking"),
        (("llada",), {"threshold": "high"}, TypeError, "gate_bound: expected a number, got 'high'"),
        (("megatron",), {"noise_schedule": "log"}, ValueError, "noise_schedule: expected one of 'linear', .*'log'"),
        (("megatron",), {"adaptive_unmasking": 1}, TypeError, "adaptive_unmasking: expected True or False, got 1"),
        (("megatron",), {"confidence_margin_based_noising": True}, ValueError, "noising: expected at most one of them"),
        (("llada2_1",), {}, TypeError, "threshold: expected a value, as llada21's threshold_with_editing has no"),
    ],
)  # fmt: skip
def test_what_is_refused(words: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        P.named(*words, **arguments)


# --- the page -------------------------------------------------------------------------------------------------------


def table() -> str:
    """The catalogue as docs/policies.md has it."""
    lines = ["| system | strategy | its arguments |", "|---|---|---|"]
    for system, entry in SYSTEMS.items():
        for n, (strategy, rule) in enumerate(entry.strategies.items()):
            taken = [name if value is REQUIRED else f"{name}={value!r}" for name, value in rule.arguments.items()]
            arguments = ", ".join(f"`{argument}`" for argument in taken)
            lines.append(f"| {f'`{system}`' if n == 0 else ''} | `{strategy}` | {arguments} |")
    lines += ["", "| system | program | takes the strategy by |", "|---|---|---|"]
    for system, entry in SYSTEMS.items():
        lines.append(f"| `{system}` | {entry.source} | {', '.join(f'`{k}`' for k in entry.keywords)} |")
    lines += ["", "| system | where its policies are better than the program |", "|---|---|"]
    lines += [f"| `{system}` | {entry.note} |" for system, entry in SYSTEMS.items() if entry.note]
    return "\n".join(lines)


PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/policies.md", "exec"), {})


def test_the_page_shows_the_catalogue() -> None:
    begin, end = "<!-- the catalogue -->\n", "\n<!-- end of the catalogue -->"
    assert PAGE.split(begin)[1].split(end)[0] == table()

"""Replay the recorded un-masking steps of other systems through `remask`.

    python -m tests.replay_policies FOLDER [--impl reference|package]

FOLDER holds `cases.json` and one safetensors file per case (format: README.md in tests/data/golden/policies). Every
step is replayed by itself: logits, tokens, parameters and the numbers that the original drew go in; tokens and, where
they were recorded, candidates, confidences, entropies and counts must come out. A sampled candidate is given to the
op, so what is tested is everything after the draw. Exit status 1 if a case disagrees.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CLOSE = 4e-6  # the recordings agree with float64 to 2e-6, and float32 statistics do too


@dataclasses.dataclass
class Case:
    """One recorded run: its rule, parameters and tensors."""

    name: str
    rule: str
    parameters: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def sampled(self) -> bool:
        return "draw.gumbel" in self.tensors or "draw.uniform_token" in self.tensors

    def at(self, name: str, t: int) -> Tensor | None:
        return self.tensors[name][t] if name in self.tensors else None


def load(folder: Path) -> list[Case]:
    """All cases of a folder."""
    listed = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    return [Case(c["name"], c["rule"], c["parameters"], load_file(folder / c["file"])) for c in listed]


def implementation(name: str) -> SimpleNamespace:
    """`remask` and `RemaskPolicy` of the specification ("reference") or of the kernels ("package")."""
    if name == "reference":
        module = importlib.import_module("twotower_kernels.reference.remask")
        return SimpleNamespace(remask=module.remask, RemaskPolicy=module.RemaskPolicy)
    package = importlib.import_module("twotower_kernels")
    return SimpleNamespace(remask=package.remask, RemaskPolicy=package.RemaskPolicy)


# --- the rules, from the recorded parameters to a policy --------------------------------------------------------------

ALPHAS = {
    "linear": "linear",
    "cosine": "cosine",
    "exponential": "exponential",
    "LinearAlphaScheduler": "linear",
    "CosineAlphaScheduler": "sine",
}
BD3LM = {"loglinear": "linear", "cosine": "cosine_floor"}
DREAM = {"maskgit_plus": "maskgit", "topk_margin": "margin", "entropy": "entropy", "origin": "origin"}


def _score(p: dict[str, Any]) -> str:
    if p.get("neg_entropy"):
        return "neg_entropy"
    if p.get("margin_confidence"):
        return "margin"
    return "random" if p.get("remasking") == "random" else "confidence"


def _noising(p: dict[str, Any]) -> str:
    if p.get("confidence_margin_based_noising"):
        return "margin"
    return "confidence" if p.get("confidence_based_noising") else "random"


def _predict_and_noise(P: Any, p: dict[str, Any], e2d2: bool) -> Any:
    return P.predict_and_noise(
        _noising(p),
        ALPHAS[p.get("noise_schedule", "linear")],
        min_t=p.get("min_t", 1e-5),
        threshold=p.get("confidence_threshold", 1e6) if e2d2 else None,
        adaptive=bool(p.get("adaptive_unmasking")),
        finish=not e2d2,
    )


def _jetengine(P: Any, p: dict[str, Any], greedy: bool) -> Any:
    strategy = p["remasking_strategy"]
    if p.get("function") == "postprocess_loop" and strategy == "low_confidence_dynamic":
        return P.sdar(p["dynamic_threshold"], greedy=greedy)
    bound = p.get("eb_threshold") if strategy == "entropy_bounded" else p.get("dynamic_threshold")
    return P.jetengine(strategy, 0.9 if bound is None else bound, greedy=greedy)


def _sdar(P: Any, p: dict[str, Any], greedy: bool) -> Any:
    if p["remasking_strategy"] == "sequential":
        return P.jetengine("sequential", greedy=greedy)
    return P.sdar(p.get("confidence_threshold") if "dynamic" in p["remasking_strategy"] else None, greedy=greedy)


def _lmdeploy(P: Any, p: dict[str, Any]) -> Any:
    if p["unmasking_strategy"] == "low_confidence_dynamic":
        return P.threshold(p["confidence_threshold"])
    return P.lmdeploy_static(sequential=p["unmasking_strategy"] == "sequential")


def policy_of(case: Case, p: dict[str, Any], P: Any) -> Any:
    """The policy that expresses the rule of the case with parameters p; KeyError if the rule is not known."""
    greedy = not case.sampled
    rules: dict[str, Callable[[], Any]] = {
        "twotower.unmask": lambda: P.twotower(p["confidence_threshold"]),
        "megatron.confidence_unmasking": lambda: P.twotower(p["confidence_threshold"]),
        "megatron.predict_and_noise": lambda: _predict_and_noise(P, p, e2d2=False),
        "e2d2.predict_and_noise": lambda: _predict_and_noise(P, p, e2d2=True),
        "megatron.posterior": lambda: P.posterior(ALPHAS[p["noise_schedule"]], min_t=p["min_t"]),
        "e2d2.posterior": lambda: P.posterior(ALPHAS[p["noise_schedule"]], min_t=p["min_t"]),
        "bd3lm.posterior": lambda: P.posterior(
            {"loglinear": "linear", "cosine": "cosine_floor"}[p["noise"]], long_grid=True
        ),
        "bd3lm.first_hitting": lambda: P.first_hitting(),
        "llada.": lambda: P.llada(_score(p)),
        "automodel.low_confidence": lambda: P.llada(_score(p)),
        "megatron_bridge.neg_entropy_schedule": lambda: P.llada(_score(p)),
        "megatron_bridge.": lambda: P.threshold(p["threshold"], score=_score(p)),
        "automodel.threshold": lambda: P.threshold(p["threshold"], score=_score(p)),
        "fast_dllm.threshold": lambda: P.threshold(p["threshold"], score=_score(p)),
        "dllm.threshold_or_schedule": lambda: P.llada2(p["threshold"]),
        "dllm.threshold": lambda: P.threshold(p["threshold"], score=_score(p)),
        "fast_dllm.factor": lambda: P.fast_dllm_factor(p["factor"]),
        "dllm.factor": lambda: P.fast_dllm_factor(p["factor"], last_free=False),
        "dllm.alpha_schedule": lambda: P.dllm(ALPHAS[p["scheduler"]], _score(p)),
        "fast_dllm.dream_confidence_threshold": lambda: P.fast_dllm_dream(p["threshold"]),
        "dream.": lambda: P.dream(
            DREAM[p["alg"]], eps=p["eps"], alg_temp=None if p["alg"] == "origin" else p.get("alg_temp")
        ),
        "sdar.": lambda: _sdar(P, p, greedy),
        "jetengine.": lambda: _jetengine(P, p, greedy),
        "lmdeploy.": lambda: _lmdeploy(P, p),
        "llada2.": lambda: P.llada2(p["threshold"]),
        "vllm_dllm_plugin.": lambda: P.llada2(p["threshold"], min_commits=p.get("num_transfer")),
        "llada21.": lambda: P.llada2(
            p["threshold"], min_commits=p["num_to_transfer"], edit_threshold=p["editing_threshold"]
        ),
        "dinfer.threshold": lambda: P.dinfer(p["threshold"]),
        "dinfer.credit": lambda: P.dinfer(p["threshold"]),
        "dinfer.cache": lambda: dataclasses.replace(P.threshold(p["threshold"]), min_commits=p["minimal_topk"]),
        "dinfer.hierarchy": lambda: P.dinfer_hierarchy(
            p["low_threshold"], p.get("threshold"), remask_threshold=p.get("remask_threshold")
        ),
        "wedlm.entropy_position": lambda: P.wedlm(p["entropy_threshold"], position_penalty=p["pos_penalty_factor"]),
        "wedlm.hf_confidence": lambda: P.wedlm_hf(p["confidence_threshold"]),
        "diffulex.": lambda: P.diffulex(
            p["accept_threshold"],
            block_size=p["block_size"],
            score=_score(p),
            complete_threshold=p.get("complete_threshold"),
        ),
        "diffusion_gemma.": lambda: P.diffusion_gemma(p["entropy_bound"], t_min=p["t_min"], finish=False),
    }
    known = [prefix for prefix in rules if case.rule.startswith(prefix)]
    if not known:
        raise KeyError(f"no policy for the rule {case.rule}")
    return rules[max(known, key=len)]()


# --- one step ---------------------------------------------------------------------------------------------------------


def arguments(case: Case, p: dict[str, Any], policy: Any, t: int) -> dict[str, Any]:
    """The arguments of `remask` at step t, all but logits and tokens."""
    before = case.tensors["tokens_before"]
    batch, block = before.shape[1:]
    clock = case.tensors["step"]  # [T], or [T, B] where rows keep their own
    step = clock[t] if clock.ndim > 1 else int(clock[t])
    editable = torch.ones(batch, block, dtype=torch.bool)
    for name in ("editable", "active", "finished_before"):
        if (where := case.at(name, t)) is not None:
            editable &= (where if where.ndim == 2 else where[:, None]) ^ (name == "finished_before")
    mask = p.get("mask_token_id")
    steps = (
        p.get("steps_per_block") or p.get("num_steps") or p.get("denoising_steps") or p.get("max_denoising_steps") or 1
    )
    if "minimal_topk" in p and case.rule.endswith(("threshold_or_schedule", "threshold_or_schedule_sampled")):
        steps = min(steps, block // p["minimal_topk"])
    arguments = {"mask_token_id": mask, "policy": policy, "step": step, "num_steps": steps, "editable": editable}
    if mask is not None:
        start = max(u for u in range(t + 1) if u == 0 or (clock[u] == 0).all())
        arguments["initial_num_masked"] = ((before[start] == mask) & editable).sum(1)
    arguments["temperature"] = p.get("t_max", p.get("temperature", 1.0 if case.sampled else 0.0))
    if case.sampled or not case.rule.startswith("llada2"):  # greedy, LLaDA2 looks at the unfiltered distribution
        arguments |= {"top_k": p.get("top_k") or 0, "top_p": p.get("top_p") or 1.0}
    if case.rule.startswith("dream.") and policy.schedule == "truncated":
        waiting = (before[t] == p["mask_token_id"]).sum(1)
        if waiting.unique().numel() > 1:  # one quota for the whole batch: where rows differ, only the caller knows it
            leave = 1 / (steps / (1 - p["eps"]) - step) if step < steps - 1 else 1.0
            quota = int(waiting.double().mean() * leave)
            arguments["policy"] = dataclasses.replace(policy, schedule="none", min_commits=quota, finish=False)
    if "suppress_tokens" in p:
        arguments["suppress_ids"] = p["suppress_tokens"]
    if "begin_suppress_tokens" in p:
        arguments["confidence_suppress_ids"] = p["begin_suppress_tokens"]
    return arguments | _draws(case, p, arguments, t)


def _draws(case: Case, p: dict[str, Any], arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """What the original drew, as `candidates` and `rank_noise`."""
    if case.rule.startswith("diffusion_gemma"):
        vocab = case.tensors["logits"].shape[3]
        canvas = case.tensors["draw.random_canvas"][t]
        return {"candidates": case.tensors["candidate"][t], "rank_noise": (canvas.double() + 0.5) / vocab}
    if case.sampled and ("posterior" in case.rule or case.rule.startswith("bd3lm")):
        return _bd3lm_and_posterior(case, p, arguments, t)
    draws = {"candidates": case.tensors["candidate"][t]} if case.sampled else {}
    if (noise := case.at("draw.uniform_rank", t)) is not None:
        draws["rank_noise"] = noise
    return draws


def _bd3lm_and_posterior(case: Case, p: dict[str, Any], arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """The best token of the recorded draw, and the number that decides between it and the mask as the draw did.

    With noise g the mask wins when l_mask / T + g_mask > M = max (l_v / T + g_v). M minus A = log sum exp (l_v / T) is
    Gumbel noise as well, so the difference of the two is logistic and its sigmoid a uniform number u: the mask wins
    when u > sigmoid(A - l_mask / T), which is the probability of a token.
    """
    mask, temperature = p["mask_token_id"], float(arguments["temperature"])
    logits = case.tensors["logits"][case.tensors["logits_index"][t]].double()
    probability = logits.index_fill(2, torch.tensor([mask]), -torch.inf).softmax(-1)
    if (gumbel := case.at("draw.gumbel", t)) is not None:
        noise, tiny = gumbel.double(), 1e-10
    else:
        noise, tiny = -torch.log(1e-10 - torch.log(case.tensors["draw.uniform_token"][t].double() + 1e-10)), 0.0
    if (nucleus := p.get("nucleus_p", 1.0)) < 1:  # BD3-LM: the crossing token is dropped, the best one stays
        ordered, at = probability.sort(-1, descending=True)
        dropped = (ordered.cumsum(-1) > nucleus) & (torch.arange(ordered.shape[-1]) > 0)
        probability = probability.masked_fill(dropped.gather(2, at.argsort(-1)), 0.0)
        probability = probability / probability.sum(-1, keepdim=True)
    if case.rule.startswith("bd3lm.first_hitting"):
        masks = case.tensors["tokens_before"][t] == mask  # [1, S]
        index = int(case.tensors["draw.uniform_rank"][t, 0, 0].double() * masks.sum())
        place = masks.nonzero()[index, 1]
        rank_noise = torch.zeros(masks.shape).index_fill(1, place, 0.5)
        return {"candidates": (probability.log() + noise).argmax(-1), "rank_noise": rank_noise}
    stays = _stays_masked(case, p, arguments["step"], t)
    scaled = torch.log(probability * (1 - stays) + tiny) / temperature  # [B, S, V]
    scaled[..., mask] = torch.log(stays + tiny) / temperature
    if top_k := p.get("top_k"):
        scaled = torch.where(scaled >= scaled.topk(top_k, -1).values[..., -1:], scaled, -torch.inf)
    of_mask = noise[..., mask].clone()  # [B, S]
    in_race = scaled[..., mask].isfinite()
    scaled[..., mask] = -torch.inf
    best = (scaled + noise).max(-1)
    u = torch.sigmoid(of_mask - best.values + scaled.logsumexp(-1)).clamp(max=1 - 2**-53)
    return {"candidates": best.indices, "rank_noise": torch.where(in_race, u, 0.0)}


def _stays_masked(case: Case, p: dict[str, Any], step: int, t: int) -> Tensor:
    """q(mask) of the posterior: as recorded, or from the linear schedule where E2D2 recorded none."""
    if (stays := case.at("mask_prob", t)) is not None:
        return stays
    if (alpha_s := case.at("alpha_s", t)) is not None:
        return (1 - alpha_s.double()) / (1 - case.tensors["alpha_t"][t].double())
    rest = 1 - torch.arange(step, step + 2).double() * (1 - p["min_t"]) / p["num_steps"]
    return rest[1] / rest[0]


def _rows(case: Case) -> list[tuple[slice, dict[str, Any]]]:
    """JetEngine's parameters may differ from row to row; all others hold for the whole batch."""
    p, batch = case.parameters, case.tensors["tokens_before"].shape[1]
    listed = [k for k, v in p.items() if isinstance(v, list) and case.rule.startswith("jetengine")]
    if not listed:
        return [(slice(0, batch), p)]
    return [(slice(b, b + 1), p | {k: p[k][b] for k in listed}) for b in range(batch)]


def _with_credit(case: Case) -> Tensor:
    """The logits of every step; for dInfer's credit with alpha log(K + 1), K being the caller's state."""
    logits = case.tensors["logits"][case.tensors["logits_index"]]  # [T, B, S, V]
    if case.rule != "dinfer.credit":
        return logits
    p, credit, out = case.parameters, torch.zeros_like(logits[0]), []
    for t, z in enumerate(logits):
        credit = credit * (p["decay_beta"] if int(case.tensors["step"][t]) else 0.0)
        best = z.softmax(-1).max(-1, keepdim=True)
        boost = best.values ** p["boost_gamma"] * (case.tensors["tokens_before"][t] == p["mask_token_id"])[..., None]
        credit = credit.scatter_add(2, best.indices, boost)
        out.append(z + p["credit_alpha"] * torch.log(credit + 1))
    return torch.stack(out)


def replay(case: Case, impl: SimpleNamespace) -> list[str]:
    """The disagreements of a case, one line each; empty if every step agrees. KeyError: the rule is not known."""
    wrong: list[str] = []
    logits = _with_credit(case)
    for rows, p in _rows(case):
        policy = policy_of(case, p, impl.RemaskPolicy)
        for t in range(len(logits)):
            given = arguments(case, p, policy, t)
            for name, value in given.items():
                if isinstance(value, Tensor):
                    given[name] = value[rows]
            before = case.tensors["tokens_before"][t, rows]
            result = impl.remask(logits[t, rows], before, **given)
            recorded = {k: v[t, rows] for k, v in case.tensors.items() if v.ndim > 2 and len(v) == len(logits)}
            recorded |= {"num_committed": case.tensors["num_committed"][t, rows]}
            wrong += [f"step {t}: {line}" for line in compare(result, before, given, recorded)]
            if "argmax_canvas" in recorded:
                canvas = impl.remask(logits[t, rows], before, **{**given, "temperature": 0.0, "candidates": None})
                live = given["editable"]
                wrong += _differ(f"step {t}: argmax", canvas.candidate[live], recorded["argmax_canvas"][live])
    return wrong


def compare(result: Any, before: Tensor, given: dict[str, Any], recorded: dict[str, Tensor]) -> list[str]:
    """What of a step does not agree with the recording."""
    policy, mask, live = given["policy"], given["mask_token_id"], given["editable"]
    wrong = _differ("tokens", result.tokens, recorded["tokens_after"])
    left = result.transfer_mask if policy.renoise else (before == mask) & (result.tokens != mask)
    wrong += _differ("num_committed", left.sum(1)[live.any(1)], recorded["num_committed"][live.any(1)])
    for name, got in {
        "accepted": result.transfer_mask,
        "edited": result.transfer_mask & (before != mask),
        # "selected" is all that the original wrote, also masks; what it notes for a row without work means nothing
        "selected": result.transfer_mask | (result.tokens != before),
    }.items():
        if name in recorded:
            at = live if policy.renoise else live & ((before == mask).any(1, keepdim=True) | (result.tokens != before))
            wrong += _differ(name, got[at], recorded[name][at])
    at = live & (recorded["candidate"] >= 0) & (result.candidate >= 0) if "candidate" in recorded else live
    if "candidate" in recorded:
        if policy.schedule == "posterior":  # there the mask itself may be the recorded candidate
            at = at & (recorded["candidate"] != mask)
        wrong += _differ("candidate", result.candidate[at], recorded["candidate"][at])
        missing = live & (before == mask) & (recorded["candidate"] >= 0) & (result.candidate < 0)
        wrong += [f"no candidate at {missing.nonzero().tolist()}"] if missing.any() else []
    shown = {"confidence": result.confidence, "neg_entropy": -result.entropy}.get(policy.score)
    pairs = {"entropy": result.entropy, "argmax_probability": result.confidence}
    if policy.score == "neg_entropy" and (policy.gate_on == "score" or policy.schedule == "even"):
        pairs["confidence"] = -result.entropy  # Megatron-Bridge calls what it ranks by the confidence
    elif policy.score != "random":
        pairs["confidence"] = result.confidence
    if shown is not None and not policy.position_penalty:
        pairs["score"] = shown
    for name, got in pairs.items():
        if name in recorded:
            want = recorded[name].double()
            where = live & want.isfinite() & ((before == mask) | (name == "argmax_probability"))
            far = where & ~((got.double() - want).abs() <= CLOSE * want.abs().clamp(min=1.0))
            if far.any():
                b, s = far.nonzero()[0].tolist()
                wrong.append(
                    f"{name} at row {b} position {s}: {got[b, s].item():.8g}, recorded {want[b, s].item():.8g}"
                )
    return wrong


def _differ(what: str, got: Tensor, want: Tensor) -> list[str]:
    return [] if torch.equal(got.to(want.dtype), want) else [f"{what} {got.tolist()}, recorded {want.tolist()}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--impl", choices=("reference", "package"), default="reference")
    options = parser.parse_args()
    impl, cases = implementation(options.impl), load(options.folder)
    agree, disagree = 0, 0
    for case in cases:
        try:
            wrong = replay(case, impl)
        except KeyError as error:
            print(f"not expressed: {case.name}: {error.args[0]}")
            continue
        agree, disagree = agree + (not wrong), disagree + bool(wrong)
        if wrong:
            print(f"disagrees: {case.name}: {len(wrong)} differences, the first: {wrong[0]}")
    print(f"{agree} of {len(cases)} agree")
    return 1 if disagree else 0


if __name__ == "__main__":
    raise SystemExit(main())

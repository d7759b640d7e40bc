"""Every published rule three times: as recorded from the original, as `remask` has it, and in plain Python floats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paths import GOLDEN
from tests.replay_policies import Case, arguments, implementation, load, policy_of, replay
from tests.specification import slow_policies
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.remask import remask

CASES = {case.name: case for case in load(GOLDEN / "policies")}
MASK = 3


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_come_out(name):
    assert replay(CASES[name], implementation("reference")) == []


def slow_step(case, p, given_arguments, logits, t):
    """The step by `slow_policies`, row by row: int64 [B, S]."""
    after = []
    for b, tokens in enumerate(case.tensors["tokens_before"][t].tolist()):
        if "draw.random_canvas" in case.tensors:
            u = case.tensors["draw.random_canvas"][t, b].tolist()
        else:
            u = case.tensors["draw.uniform_rank"][t, b].tolist() if "draw.uniform_rank" in case.tensors else None
        row = slow_policies.Row(
            p=p | {"num_steps": given_arguments["num_steps"]},
            z=logits[b].tolist(),
            tokens=tokens,
            i=given_arguments["step"],
            initial=int(given_arguments["initial_num_masked"][b]) if "initial_num_masked" in given_arguments else 0,
            writable=given_arguments["editable"][b].tolist(),
            given=given_arguments["candidates"][b].tolist() if "candidates" in given_arguments else None,
            u=u,
        )
        after.append(slow_policies.step(case.rule, row))
    return torch.tensor(after)


def test_dream_has_one_quota_for_rows_that_drifted_apart():
    """6 and 4 masks, step 2 of 4: floor(5 / 2.004) = 2 in both rows, where each by itself would commit 2 and 1."""
    tokens = torch.full((1, 2, 6), MASK)
    tokens[0, 1, :2] = 5
    logits = torch.zeros(1, 1, 2, 6, 8)
    logits[..., 7] = torch.arange(6.0) + 3  # the best are on the right
    after = tokens.clone()
    after[..., 4:] = 7
    tensors = {"logits": logits[0], "tokens_before": tokens, "tokens_after": after, "step": torch.tensor([2])}
    tensors |= {"logits_index": torch.tensor([0]), "num_committed": torch.tensor([[2, 2]])}
    p = {"mask_token_id": MASK, "num_steps": 4, "temperature": 0.0, "alg": "maskgit_plus", "eps": 0.001}
    assert replay(Case("drift", "dream.maskgit_plus", p, tensors), implementation("reference")) == []


DRAWN_PER_TOKEN = ("posterior_sampled", "first_hitting")  # tested as distributions in test_remask
STATEFUL = ("dinfer.credit", "jetengine.mixed")  # logits that depend on earlier steps; a rule per row


@pytest.mark.parametrize("name", [n for n in CASES if not any(word in n for word in DRAWN_PER_TOKEN + STATEFUL)])
def test_the_words_describe_the_recording(name):
    """The slow version, which the property below trusts, is right about the originals too."""
    case = CASES[name]
    policy = policy_of(case, case.parameters, RemaskPolicy)
    for t, index in enumerate(case.tensors["logits_index"].tolist()):
        given_arguments = arguments(case, case.parameters, policy, t)
        want = slow_step(case, case.parameters, given_arguments, case.tensors["logits"][index], t)
        assert want.equal(case.tensors["tokens_after"][t]), f"step {t}"


unit = st.floats(0.05, 0.95)
steps = st.integers(1, 9)
flag = st.booleans()
noise = st.sampled_from(["linear", "cosine", "exponential"])
remasking = st.sampled_from(["low_confidence", "random"])
temperature = st.sampled_from([0.6, 1.0, 1.3])
filters = {"top_k": st.sampled_from([0, 2, 5]), "top_p": st.sampled_from([0.5, 0.8, 1.0])}

PARAMETERS = {
    "twotower.unmask": {"num_steps": steps, "confidence_threshold": unit},
    "megatron.predict_and_noise": {
        "num_steps": steps,
        "min_t": st.sampled_from([1e-5, 1e-3, 0.1]),
        "noise_schedule": noise,
        "confidence_based_noising": flag,
        "confidence_margin_based_noising": flag,
        "adaptive_unmasking": flag,
    },
    "e2d2.predict_and_noise": {
        "num_steps": steps,
        "min_t": st.just(1e-5),
        "noise_schedule": st.just("linear"),
        "confidence_based_noising": flag,
        "confidence_margin_based_noising": flag,
        "confidence_threshold": unit,
    },
    "megatron.posterior_greedy": {"num_steps": steps, "min_t": st.sampled_from([1e-5, 0.1]), "noise_schedule": noise},
    "llada.low_confidence": {"num_steps": steps, "remasking": remasking},
    "megatron_bridge.neg_entropy_schedule": {"num_steps": steps, "neg_entropy": st.just(True)},
    "megatron_bridge.neg_entropy_threshold": {"threshold": st.floats(-2.0, -0.1), "neg_entropy": st.just(True)},
    "fast_dllm.threshold": {"threshold": unit, "remasking": remasking},
    "fast_dllm.factor": {"factor": st.floats(0.1, 2.0)},
    "dllm.factor": {"factor": st.floats(0.1, 2.0)},
    "dllm.alpha_schedule": {
        "num_steps": steps,
        "scheduler": st.sampled_from(["LinearAlphaScheduler", "CosineAlphaScheduler"]),
        "remasking": remasking,
        "suppress_tokens": st.sampled_from([[], [MASK], [MASK, 5]]),
        "begin_suppress_tokens": st.sampled_from([[], [1, 4]]),
    },
    "dream.any": {
        "num_steps": steps,
        "eps": st.sampled_from([1e-3, 0.05]),
        "alg": st.sampled_from(["maskgit_plus", "topk_margin", "entropy", "origin"]),
        "alg_temp": st.sampled_from([None, 0.0, 0.1, 1.0]),
        "temperature": temperature,
        **filters,
    },
    "fast_dllm.dream_confidence_threshold": {"num_steps": steps, "threshold": unit},
    "sdar.any": {
        "num_steps": steps,
        "remasking_strategy": st.sampled_from(["low_confidence_static", "low_confidence_dynamic"]),
        "confidence_threshold": unit,
        "temperature": temperature,
        **filters,
    },
    "jetengine.any": {
        "num_steps": steps,
        "remasking_strategy": st.sampled_from(
            ["low_confidence_static", "low_confidence_dynamic", "sequential", "random", "entropy_bounded"]
        ),
        "dynamic_threshold": unit,
        "eb_threshold": st.floats(0.05, 4.0),
        "temperature": temperature,
        "function": st.sampled_from(["postprocess", "postprocess_loop"]),
    },
    "lmdeploy.any": {
        "denoising_steps": steps,
        "unmasking_strategy": st.sampled_from(["low_confidence_static", "low_confidence_dynamic", "sequential"]),
        "confidence_threshold": unit,
    },
    "llada2.threshold_or_schedule": {
        "num_steps": steps,
        "threshold": unit,
        "minimal_topk": st.just(1),
        "temperature": temperature,
        **filters,
    },
    "vllm_dllm_plugin.threshold_or_schedule": {
        "num_steps": steps,
        "threshold": unit,
        "num_transfer": st.sampled_from([None, 1, 3]),
    },
    "llada21.threshold_with_editing": {
        "threshold": unit,
        "editing_threshold": unit,
        "num_to_transfer": st.integers(1, 3),
    },
    "dinfer.threshold": {"threshold": unit},
    "dinfer.cache": {"threshold": unit, "minimal_topk": st.integers(0, 4)},
    "dinfer.hierarchy": {"threshold": st.floats(0.5, 0.95), "low_threshold": st.floats(0.05, 0.5)},
    "dinfer.hierarchy_remask": {
        "threshold": st.floats(0.5, 0.95),
        "low_threshold": st.floats(0.05, 0.5),
        "remask_threshold": unit,
    },
    "wedlm.entropy_position": {
        "entropy_threshold": st.none() | st.floats(0.1, 2.0),
        "pos_penalty_factor": st.sampled_from([0.0, 0.05, 0.3]),
        "temperature": temperature,
        **filters,
    },
    "wedlm.hf_confidence": {"confidence_threshold": st.just(0.0) | unit, "temperature": temperature},
    "diffulex.d2f": {
        "block_size": st.integers(1, 5),
        "accept_threshold": unit,
        "complete_threshold": unit,
        "margin_confidence": flag,
        "neg_entropy": flag,
    },
    "diffulex.fast_dllm_v2": {"block_size": st.integers(1, 5), "accept_threshold": unit},
    "diffusion_gemma.entropy_bound_renoise": {
        "max_denoising_steps": steps,
        "entropy_bound": st.floats(0.0, 4.0),
        "t_min": st.just(0.4),
        "t_max": st.just(0.8),
    },
}
CAN_SAMPLE = ("twotower", "megatron.pre", "e2d2", "llada.", "dream", "sdar", "jetengine", "llada2.", "wedlm.entropy")


def synthetic(rule, p, seed, step, sampled):
    """A case of two steps in the form of the recordings: the block's start, and the step to look at."""
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if rule.startswith("dream.") else 2  # Dream's quota is one for the batch: see the test of drifting rows
    block, vocab = int(torch.randint(1, 13, (), generator=generator)), 9

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def integers(*shape):
        return torch.randint(0, vocab, shape, generator=generator)

    logits = torch.randn(1, batch, block, vocab, generator=generator, dtype=torch.float64)
    logits = logits.scatter_add(3, integers(1, batch, block, 1), 7 * uniform(1, batch, block, 1))
    committed = integers(batch, block)
    start = torch.where(uniform(batch, block) < 0.8, MASK, committed)
    now = torch.where(uniform(batch, block) < 0.7, start, committed)
    tensors = {
        "logits": logits,
        "tokens_before": torch.stack([start, now]),
        "step": torch.tensor([0, step]),
        "editable": uniform(2, batch, block) < 0.85,
        "draw.uniform_rank": uniform(2, batch, block),
    }
    if rule.startswith("diffusion_gemma"):
        tensors |= {"draw.random_canvas": integers(2, batch, block)}
    if sampled or rule.startswith("diffusion_gemma"):
        tensors |= {"draw.gumbel": torch.empty(2, 0), "candidate": integers(2, batch, block)}
    p = p if rule.startswith("diffusion_gemma") else p | {"mask_token_id": MASK}
    return Case("synthetic", rule, p, tensors)


@pytest.mark.parametrize("rule", PARAMETERS)
@settings(max_examples=25)
@given(data=st.data())
def test_the_op_does_what_the_words_say(rule, data):
    p = data.draw(st.fixed_dictionaries(PARAMETERS[rule]))
    count = p.get("num_steps") or p.get("denoising_steps") or p.get("max_denoising_steps") or 1
    step = data.draw(st.integers(0, count - 1))
    sampled = rule.startswith(CAN_SAMPLE) and p.get("alg") != "origin" and data.draw(flag)
    if not sampled and rule.startswith(("dream", "llada2.", "wedlm.entropy")):
        p["temperature"] = 0.0  # with one the op would draw by itself
    case = synthetic(rule, p, data.draw(st.integers(0, 2**32)), step, sampled)
    policy = policy_of(case, case.parameters, RemaskPolicy)
    given_arguments = arguments(case, case.parameters, policy, 1)
    logits, before = case.tensors["logits"][0], case.tensors["tokens_before"][1]
    got = remask(logits, before, **given_arguments)
    assert got.tokens.tolist() == slow_step(case, case.parameters, given_arguments, logits, 1).tolist()

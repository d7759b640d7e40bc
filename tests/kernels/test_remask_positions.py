"""Which positions take their candidates: ranks that are drawn (Dream's alg_temp), stages of some positions (SAID)."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from tests.kernels.remask_cases import MASK
from twotower_kernels.reference import philox
from twotower_kernels.reference import remask as specification
from twotower_kernels.reference.remask import make_inputs

PROGRAMS = {"specification": specification.remask, "package": tt.remask}
P = tt.RemaskPolicy


@pytest.fixture(params=PROGRAMS)
def remask(request: pytest.FixtureRequest) -> Any:
    return PROGRAMS[request.param]


# --- ranks that are drawn -------------------------------------------------------------------------------------------


def best_two(temperature: float, score: str = "confidence") -> tt.RemaskPolicy:
    """Two positions in a step, ranked as in Dream."""
    drawn = P.dream("maskgit", alg_temp=temperature)
    return dataclasses.replace(drawn, score=score, schedule="none", min_commits=2, finish=False)


@pytest.mark.parametrize("algorithm", ["maskgit", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-12])
def test_as_the_temperature_falls_the_best_are_taken(remask: Any, algorithm: str, temperature: float) -> None:
    case = dict(batch=5, block=9, vocab=40, num_steps=4, seed=3, masked=0.8)
    want = remask(**make_inputs("remask", case | {"policy": P.dream(algorithm)}))
    got = remask(**make_inputs("remask", case | {"policy": P.dream(algorithm, alg_temp=temperature)}))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True)) and want.transfer_mask.any()


def test_as_it_grows_all_are_as_likely(remask: Any) -> None:
    case = dict(batch=3000, block=4, vocab=5, num_steps=4, seed=torch.arange(3000), policy=best_two(1e6))
    taken = remask(**make_inputs("remask", case)).transfer_mask.double().mean(0)
    assert taken.sub(0.5).abs().max() < 5 * math.sqrt(0.25 / 3000)


def test_pairs_are_drawn_without_replacement_by_their_scores(remask: Any) -> None:
    """Every pair as often as drawing one and then another of the rest, with chances softmax(confidence / T)."""
    rows, temperature = 6000, 0.3
    logits = torch.zeros(rows, 4, 6)
    logits[:, :, 5] = torch.tensor([0.0, 1.5, 2.5, 4.0])
    tokens = torch.full((rows, 4), MASK)
    given = dict(mask_token_id=MASK, policy=best_two(temperature), seed=torch.arange(rows))
    taken = remask(logits, tokens, **given).transfer_mask
    assert taken.sum(1).eq(2).all()
    weight = (logits[0].double().softmax(-1).amax(-1) / temperature).exp()
    chance = (weight / weight.sum()).tolist()
    statistic = 0.0
    for a, b in itertools.combinations(range(4), 2):
        expected = rows * chance[a] * chance[b] * (1 / (1 - chance[a]) + 1 / (1 - chance[b]))
        found = int((taken[:, a] & taken[:, b]).sum())
        statistic += (found - expected) ** 2 / expected
    assert statistic < 25.7  # chi-square with 5 degrees of freedom: 1 in 10^4


@pytest.mark.parametrize("score", ["confidence", "margin", "neg_entropy", "leftmost"])
def test_the_noise_is_the_one_written_down(remask: Any, score: str) -> None:
    """Gumbel noise of the position's ranking word; the caller's numbers instead, if there are any."""
    case = dict(batch=4, block=7, vocab=30, seed=11, offset=5, step=2, num_steps=9, policy=best_two(0.5, score))
    inputs = make_inputs("remask", case)
    z = inputs["logits"].double()
    p = z.softmax(-1)
    best = p.topk(2, -1).values
    scores = {
        "confidence": best[..., 0],
        "margin": best[..., 0] - best[..., 1],
        "neg_entropy": -torch.special.entr(p).sum(-1),
        "leftmost": -torch.arange(7.0).double().expand(4, 7),
    }
    rows = [torch.tensor([n] * 4) for n in (11, 5, 2)]
    own, callers = philox.uniform(philox.position_words(*rows, 7, 2**32 - 1)), torch.rand(4, 7, dtype=torch.float64)
    for given, u in ((None, own), (callers, callers)):
        noisy = scores[score] / 0.5 - torch.log(-torch.log1p(-u))
        want = torch.zeros(4, 7, dtype=torch.bool).scatter(1, noisy.topk(2, 1).indices, True)
        assert remask(**inputs, rank_noise=given).transfer_mask.equal(want)


def test_noise_moves_no_threshold(remask: Any) -> None:
    """The gate asks for the confidence itself, and the noise decides who comes beside it."""
    policy = dataclasses.replace(P.threshold(0.7), gate_on="confidence", rank_temperature=3.0, min_commits=4)
    inputs = make_inputs("remask", dict(batch=50, block=8, vocab=20, seed=torch.arange(50), policy=policy))
    got = remask(**inputs)
    good = got.confidence >= 0.7
    assert got.transfer_mask[good].all() and (got.transfer_mask.sum(1) == good.sum(1).clamp(min=4)).all()
    plain = remask(**inputs | {"policy": dataclasses.replace(policy, rank_temperature=0.0)})
    assert not got.transfer_mask.equal(plain.transfer_mask)


# --- stages of editable positions -----------------------------------------------------------------------------------


def said_stage(logits: list[Any], tokens: list[int], stage: list[int], steps: int) -> list[int]:
    """SAID (arXiv:2606.04974): LLaDA's loop on the positions of a stage, whose masks alone are counted and shared out
    evenly; logits [steps][S][V]."""
    tokens = list(tokens)
    total = sum(tokens[s] == MASK for s in stage)
    for i in range(steps):
        quota = total // steps + (i < total % steps)
        confidence = {}
        for s in (s for s in stage if tokens[s] == MASK):
            weights = [math.exp(z) for z in logits[i][s]]
            confidence[s] = max(weights) / sum(weights)
        for s in sorted(confidence, key=lambda s: (-confidence[s], s))[:quota]:
            tokens[s] = logits[i][s].index(max(logits[i][s]))
    return tokens


@pytest.mark.parametrize("given_start", [False, True])
def test_stages_count_their_own_masks(remask: Any, given_start: bool) -> None:
    """Three stages of SAID's partition, one after the other, to their ends; also where n0 is inferred."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.full((1, 20), MASK)
    tokens[0, [0, 3, 9]] = 6
    stages = [range(0, 20, 4), range(2, 20, 4), range(1, 20, 2)]
    want = tokens[0].tolist()
    for stage, steps in zip(stages, (4, 3, 2), strict=True):
        logits = 3 * torch.randn(steps, 1, 20, 11, generator=generator)
        logits[..., MASK] = -9  # the mask never wins
        want = said_stage(logits[:, 0].double().tolist(), want, list(stage), steps)
        editable = torch.zeros(1, 20, dtype=torch.bool)
        editable[0, list(stage)] = True
        start = {"initial_num_masked": int((tokens[editable] == MASK).sum())} if given_start else {}
        for i in range(steps):
            given = dict(mask_token_id=MASK, policy=P.named("said"), step=i, num_steps=steps, editable=editable)
            result = remask(logits[i], tokens, **given, **start)
            tokens = result.tokens
        assert tokens[0].tolist() == want and result.done.all()  # no mask is left within the stage
    assert (tokens != MASK).all()


@pytest.mark.parametrize("schedule", ["even", "noise"])
def test_the_length_can_count_editable_positions_alone(remask: Any, schedule: str) -> None:
    """12 positions of which 6 are editable, 4 steps: shares of 3 of the whole length, and of 2 and 1 of the editable;
    what the noise schedule leaves is 9 of 12, or 4 of 6."""
    base = P.sdar() if schedule == "even" else P.predict_and_noise()
    inputs = make_inputs("remask", dict(batch=2, block=12, vocab=20, num_steps=4))
    inputs["editable"] = (torch.arange(12) % 2 == 0).expand(2, -1)
    taken = {}
    for which in ("block", "editable"):
        policy = dataclasses.replace(base, schedule_base=which)
        taken[which] = [int(remask(**inputs | {"policy": policy, "step": i}).transfer_mask[0].sum()) for i in (0, 3)]
    assert taken == (
        {"block": [3, 3], "editable": [2, 1]} if schedule == "even" else {"block": [1, 6], "editable": [2, 6]}
    )


def test_schedules_from_the_start_infer_it_whatever_their_base(remask: Any) -> None:
    inputs = make_inputs("remask", dict(batch=2, block=8, vocab=20, num_steps=4, step=1, masked=0.7))
    for preset in (P.fast_dllm_dream(0.5), P.dllm()):
        want = remask(**inputs, policy=preset)
        got = remask(**inputs, policy=dataclasses.replace(preset, schedule_base="block"))
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


# --- whose noise it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}, {"temperature": 1.4, "top_k": 20, "top_p": 0.9}])
def test_by_sequence_a_token_draws_the_same_in_every_block(remask: Any, sampling: dict[str, float]) -> None:
    """As autoregression draws it: alone, in a first step, with its number in the text as offset."""
    generator, rows, length = torch.Generator().manual_seed(0), 3, 9
    logits = torch.randn(rows, length, 70, generator=generator)
    numbers, seeds = torch.tensor([0, 5, 2**32 - 4]), torch.tensor([1, 2, -3])
    masks = torch.full((rows, length), MASK)
    given = dict(mask_token_id=MASK, policy=P(suppress_mask=False), seed=seeds, **sampling)
    alone = [
        remask(logits[:, i : i + 1], masks[:, :1], offset=(numbers + i) % 2**32, **given).candidate
        for i in range(length)
    ]
    want = torch.cat(alone, dim=1)
    for begin, end in ((0, 9), (0, 4), (4, 9), (3, 3)):
        block = dict(given, offset=(numbers + begin) % 2**32, noise="sequence", num_steps=4)
        for step in (0, 2):
            got = remask(logits[:, begin:end], masks[:, begin:end], step=step, **block)
            assert got.candidate.equal(want[:, begin:end])
    by_block = remask(logits, masks, offset=numbers, **given).candidate
    assert by_block.equal(want) == (not sampling)  # its default draws by place and step


def test_numbers_of_positions_are_drawn_by_block(remask: Any) -> None:
    """Random ranks change from step to step, whatever numbers the draws of tokens."""
    policy = P(score="random", schedule="none", min_commits=3, finish=False)
    case = dict(batch=4, block=9, vocab=12, num_steps=4, seed=torch.arange(4), masked=1.0, policy=policy)
    inputs = make_inputs("remask", case)
    taken = [
        [remask(**inputs | {"noise": noise, "step": step}).transfer_mask for step in (0, 1)]
        for noise in ("block", "sequence")
    ]
    assert taken[0][0].equal(taken[1][0]) and taken[0][1].equal(taken[1][1]) and not taken[0][0].equal(taken[0][1])


# --- a certain beginning --------------------------------------------------------------------------------------------


def test_a_prefix_ends_where_confidence_does(remask: Any) -> None:
    """From the first mask on, over tokens that are given, up to the first doubt; at least one; all in the last step."""
    sure, unsure = 9.0, 0.5
    logits = torch.zeros(3, 6, 8)
    logits[0, :, 5] = torch.tensor([sure, sure, unsure, sure, sure, sure])
    logits[1, :, 5] = torch.tensor([unsure, sure, sure, sure, sure, sure])
    logits[2, :, 5] = sure
    tokens = torch.tensor([[MASK, 7, MASK, MASK, MASK, MASK], [MASK] * 6, [7, MASK, 7, MASK, MASK, 7]])
    given = dict(mask_token_id=MASK, policy=P.prefix(0.8))
    wanted = [[0], [0], [1, 3, 4]]
    for step, expected in ((0, wanted), (1, wanted), (2, [[0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 3, 4]])):
        taken = remask(logits, tokens, step=step, num_steps=3, **given).transfer_mask
        assert [row.nonzero()[:, 0].tolist() for row in taken] == expected
    bound = remask(logits, tokens, **given).confidence[2, 1]  # whether it passes itself is the policy's choice
    for strict, count in ((True, 1), (False, 3)):
        policy = dataclasses.replace(P.prefix(), strict=strict)
        taken = remask(logits, tokens, num_steps=2, mask_token_id=MASK, policy=policy, gate_bound=float(bound))
        assert int(taken.transfer_mask[2].sum()) == count

"""BlockGen (arXiv:2606.02241): the uniform-state posterior against its definition, the corrector against a slow one."""

import math
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from twotower_kernels.reference import philox
from twotower_kernels.reference import remask as specification

PROGRAMS = {"specification": specification.remask, "package": tt.remask}
P = tt.RemaskPolicy
VOCABULARY, FLOOR, LAST_TIME = 6, 1e-3, 1e-5


@pytest.fixture(params=PROGRAMS)
def remask(request: pytest.FixtureRequest) -> Any:
    return PROGRAMS[request.param]


def clean(noise: str, step: int, steps: int) -> tuple[float, float]:
    """The fractions of clean tokens before and after a step."""

    def alpha(t: float) -> float:
        base = 1 - t if noise == "log-linear" else 1 - math.cos(math.pi / 2 * (1 - t))
        return FLOOR + (1 - FLOOR) * base

    t, s = (1 + (LAST_TIME - 1) * i / steps for i in (step, step + 1))
    return alpha(t), alpha(s) if step < steps - 1 else 1.0


def posterior(p: list[float], standing: int, before: float, after: float) -> list[float]:
    """q(x_s | x_t) by Bayes' rule, p in the place of x_0: a token stays with probability a, else any is as likely."""
    v = len(p)
    ratio = before / after
    joint = [
        (after * p[x] + (1 - after) / v) * (ratio * (x == standing) + (1 - ratio) / v) for x in range(v)
    ]  # fmt: skip
    assert math.isclose(sum(joint), before * p[standing] + (1 - before) / v)
    return [x / sum(joint) for x in joint]


@pytest.mark.parametrize("noise", ["log-linear", "cosine"])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_draws_follow_the_uniform_state_posterior(remask: Any, noise: str, step: int) -> None:
    """Each of the tokens that may stand there, at a temperature, by chi-square over many seeds."""
    rows, temperature = 3000, 0.7
    z = torch.tensor([0.0, 1.0, 2.5, 0.5, 1.5, -0.5])
    tokens = torch.arange(VOCABULARY).expand(rows, -1)
    policy = P.named("blockgen", "uniform", noise=noise)
    given = dict(mask_token_id=None, policy=policy, step=step, num_steps=4, temperature=temperature)
    got = remask(z.expand(rows, VOCABULARY, -1), tokens, seed=torch.arange(rows), **given)
    p = (z.double() / temperature).softmax(0).tolist()
    statistic, terms = 0.0, 0
    for standing in range(VOCABULARY):
        chance = posterior(p, standing, *clean(noise, step, 4))
        found = torch.bincount(got.tokens[:, standing], minlength=VOCABULARY)
        for n, q in zip(found.tolist(), chance, strict=True):
            statistic += (n - rows * q) ** 2 / (rows * q)
            terms += 1
    freedom = terms - VOCABULARY
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert got.done.all() == (step == 3)


@pytest.mark.parametrize("step", [1, 3])
def test_a_number_decides_between_three_outcomes(remask: Any, step: int) -> None:
    """The caller's number, from 0 on: a random token of the op's own, the one that stands there, the proposal."""
    logits, tokens = torch.randn(1, 5, 9), torch.tensor([[0, 4, 7, 8, 2]])
    before, after = clean("cosine", step, 4)
    p = logits[0].double().softmax(-1)
    u = torch.rand(1, 5, dtype=torch.float64)
    given = dict(mask_token_id=None, policy=P.named("blockgen", "uniform"), step=step, num_steps=4, seed=3)
    for numbers in (u, u * 0.02, 1 - u * 0.02):
        got = remask(logits, tokens, rank_noise=numbers, **given)
        rows = [torch.tensor([n]) for n in (3, 0, step)]
        noisy = (philox.uniform(philox.position_words(*rows, 5, 2**32 - 3)) * 9).long()[0].tolist()
        for s, token in enumerate(tokens[0].tolist()):
            weight = before * 9 * float(p[s, token])
            whole, ratio = weight + 1 - before, before / after
            noise, keep = (1 - ratio) * (1 - after) / whole, (weight + ratio - before) / whole
            x = float(numbers[0, s])
            want = noisy[s] if x < noise else token if x < noise + keep else int(p[s].argmax())
            assert int(got.tokens[0, s]) == want
            assert bool(got.transfer_mask[0, s]) == (x >= noise)


def test_greedy_removal_ends_with_the_argmax(remask: Any) -> None:
    logits, tokens = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    policy = P.named("blockgen", "uniform", noise_removal="greedy")
    got = remask(logits, tokens, mask_token_id=None, policy=policy, step=3, num_steps=4, temperature=1.0)
    assert got.tokens.equal(logits.argmax(-1)) and got.done.all() and not got.num_masked.any()


def test_absorbing_steps_unmask_with_their_probability(remask: Any) -> None:
    rows = 4000
    logits, tokens = torch.zeros(rows, 4, 5), torch.full((rows, 4), 3)
    for step in (1, 3):
        before, after = clean("cosine", step, 4)
        given = dict(mask_token_id=3, policy=P.named("blockgen", "absorbing"), step=step, num_steps=4)
        share = float(remask(logits, tokens, seed=torch.arange(rows), **given).transfer_mask.double().mean())
        chance = (after - before) / (1 - before)
        assert abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / (4 * rows))


# --- the corrector --------------------------------------------------------------------------------------------------


def badness(mode: str, measure: str, ar: list[float], diffusion: list[float], token: int) -> float:
    """BlockGen's score of a position, larger where it should be generated again."""
    if mode == "divergence":
        if measure == "tvd":
            return 0.5 * sum(abs(a - b) for a, b in zip(ar, diffusion, strict=True))
        first, second = (ar, diffusion) if measure == "kld" else (diffusion, ar)
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(first, second, strict=True))
    p = diffusion if mode == "diffusion_metric" else ar
    high, second, *_ = sorted(p, reverse=True)
    return {
        "entropy": -sum(x * math.log(x) for x in p),
        "confidence": -high,
        "margin": second - high,
        "nll": -math.log(p[token]),
        "gap_to_top1": math.log(high) - math.log(p[token]),
    }[measure]


MEASURES = [
    *(("divergence", measure) for measure in ("kld", "reverse_kld", "tvd")),
    *(("diffusion_metric", measure) for measure in ("entropy", "confidence", "margin")),
    *(("ar_metric", measure) for measure in ("nll", "gap_to_top1", "entropy")),
]


@pytest.mark.parametrize("diffusion_type", ["uniform", "absorbing"])
@pytest.mark.parametrize(("mode", "measure"), MEASURES)
def test_the_corrector_noises_the_worst(remask: Any, mode: str, measure: str, diffusion_type: str) -> None:
    generator = torch.Generator().manual_seed(8)
    diffusion, ar = (2 * torch.randn(3, 8, 11, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 11, (3, 8), generator=generator)
    editable = (torch.arange(8) >= 2).expand(3, -1)  # a prompt's end
    words = {} if mode == "divergence" else {mode: measure}
    mask = 10 if diffusion_type == "absorbing" else None
    policy = P.named("blockgen", "corrector", diffusion_type=diffusion_type, corruption_mode=mode, **words)
    logits = ar if mode == "ar_metric" else diffusion
    if mask is not None:
        diffusion[..., mask] = ar[..., mask] = -60.0
        tokens[tokens == mask] = 1
    of_ar, of_diffusion = ar.double().softmax(-1).tolist(), diffusion.double().softmax(-1).tolist()
    bad = [
        [badness(mode, measure, of_ar[b][s], of_diffusion[b][s], int(tokens[b, s])) for s in range(8)]
        for b in range(3)
    ]  # fmt: skip
    agreement = torch.exp(-torch.tensor(bad, dtype=torch.float64)) * (1 - 2**-53)
    numbers = {"rank_noise": agreement} if mode == "divergence" else {}
    for step in range(3):
        given = dict(mask_token_id=mask, policy=policy, step=step, num_steps=4, editable=editable, seed=4)
        got = remask(logits, tokens, **given, **numbers)
        count = max(1, round((1 - clean("cosine", step, 4)[1]) * 8))
        for b in range(3):
            worst = sorted(range(2, 8), key=lambda s, b=b: (-bad[b][s], -s))[:count]
            assert [s for s in range(2, 8) if not got.transfer_mask[b, s]] == sorted(worst)
            assert int(got.num_masked[b]) == len(worst)
            for s in range(8):
                if s not in worst:
                    assert int(got.tokens[b, s]) == int(tokens[b, s])
                elif mask is not None:
                    assert int(got.tokens[b, s]) == mask


def test_what_is_no_token_stays(remask: Any) -> None:
    """A padding number, whose probability nobody knows."""
    logits, tokens = torch.randn(1, 3, 9), torch.tensor([[-100, 4, 9]])
    for words in (("blockgen", "uniform"), ("blockgen", "corrector")):
        got = remask(logits, tokens, mask_token_id=None, policy=P.named(*words), num_steps=4, temperature=1.0)
        assert got.tokens[0, [0, 2]].tolist() == [-100, 9] and got.candidate[0, [0, 2]].tolist() == [-1, -1]
        assert got.confidence[0, [0, 2]].isnan().all() and got.confidence[0, 1] > 0


def test_what_has_no_meaning_is_refused(remask: Any) -> None:
    with pytest.raises(ValueError, match="schedule: expected renoise to random tokens and no standing ones"):
        P(schedule="uniform")
    with pytest.raises(ValueError, match="renoise: expected True with standing tokens"):
        P(standing=True)
    with pytest.raises(ValueError, match=r"renoise: expected True with .* renoise_as='mask'"):
        P(renoise_as="mask")
    policy = P.named("blockgen", "corrector", diffusion_type="absorbing")
    with pytest.raises(ValueError, match="mask_token_id: expected a token"):
        remask(torch.zeros(1, 2, 5), torch.zeros(1, 2).long(), mask_token_id=None, policy=policy)

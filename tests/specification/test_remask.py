"""`remask` beyond the published rules: what holds for every policy, the draws, the edges, the errors."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import philox
from twotower_kernels.reference.remask import CASES, make_inputs, remask
from twotower_kernels.reference.remask_schedule import infer_initial, quota, spent

MASK = 3
POLICIES = {
    name: preset()
    for name in vars(RemaskPolicy)
    if inspect.ismethod(preset := getattr(RemaskPolicy, name)) and name != "named"
} | {
    "default": RemaskPolicy(),
    "llada2_editing": RemaskPolicy.llada2(0.6, min_commits=1, edit_threshold=0.5),
    "llada2_remask": RemaskPolicy.llada2(0.3, remask_threshold=0.5),
    "hierarchy_remask": RemaskPolicy.dinfer_hierarchy(remask_threshold=0.4),
    "sdar_dynamic": RemaskPolicy.sdar(0.5),
    "jetengine_random": RemaskPolicy.jetengine("random"),
    "dream_margin": RemaskPolicy.dream("margin"),
    "dream_origin": RemaskPolicy.dream("origin"),
    "dream_drawn": RemaskPolicy.dream("entropy", alg_temp=0.4),
    "editable_share": dataclasses.replace(RemaskPolicy.sdar(), schedule_base="editable"),
    "e2d2": RemaskPolicy.predict_and_noise("margin", threshold=0.7, finish=False),
    "adaptive": RemaskPolicy.predict_and_noise("random", adaptive=True),
    "posterior_long_grid": RemaskPolicy.posterior("cosine_floor", long_grid=True),
    "d2f": RemaskPolicy.diffulex(block_size=3, complete_threshold=0.5),
    "untempered_nucleus": RemaskPolicy(statistics="filtered", top_p_tempered=False, top_p_keep_crossing=False),
}
JUDGES_COMMITTED = ("llada2_editing", "llada2_remask", "hierarchy_remask", "diffusion_gemma")
# at least one candidate is taken in every step of a row that holds masks
PROGRESS = (
    *("default", "twotower", "leftmost", "first_hitting", "predict_and_noise", "adaptive", "e2d2", "lmdeploy_static"),
    *("threshold", "fast_dllm_factor", "fast_dllm_dream", "dinfer_hierarchy", "hierarchy_remask", "entropy_bound"),
    *("llada2_editing", "wedlm", "wedlm_hf", "diffulex", "d2f"),
)
# no mask is left after the last step, whatever the logits
FINISHES = ("default", "twotower", "leftmost", "predict_and_noise", "adaptive", "untempered_nucleus")

every_policy = pytest.mark.parametrize("name", POLICIES)
few = settings(max_examples=15)
seeds = st.integers(0, 2**32)


def block(seed, batch=3, size=7, vocab=11, masked=0.6, dtype=torch.float64):
    """Random logits with confidences all over (0, 1), and tokens some of which are masks."""
    generator = torch.Generator().manual_seed(seed)
    lead = 8 * torch.rand(batch, size, 1, generator=generator, dtype=torch.float64)
    favourite = torch.randint(0, vocab, (batch, size, 1), generator=generator)
    logits = torch.randn(batch, size, vocab, generator=generator, dtype=torch.float64).scatter_add(2, favourite, lead)
    tokens = torch.randint(0, vocab, (batch, size), generator=generator)
    masks = torch.rand(batch, size, generator=generator) < masked
    return logits.to(dtype), torch.where(masks, MASK, tokens)


def call(name, logits, tokens, **options):
    """One step in the middle of four, sampled with a filter, unless the options say otherwise."""
    defaults = {"step": 1, "num_steps": 4, "temperature": 0.9, "top_k": 6, "top_p": 0.95, "seed": 5}
    return remask(logits, tokens, mask_token_id=MASK, policy=POLICIES[name], **{**defaults, **options})


def same(a, b, rows=slice(None)):
    """Every field of result b equals that of a (its `rows`), NaN where NaN."""
    for field, x, y in zip(a._fields, a, b, strict=True):
        torch.testing.assert_close(y, x[rows], rtol=0, atol=0, equal_nan=True, msg=lambda text, f=field: f"{f}: {text}")


# --- what holds for every policy -------------------------------------------------------------------------------------


@every_policy
@few
@given(seed=seeds, step=st.integers(0, 5), temperature=st.sampled_from([0.0, 0.8]))
def test_writes_only_where_it_may(name, seed, step, temperature):
    logits, tokens = block(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    editable = torch.rand(tokens.shape, generator=generator) < 0.7
    lengths = torch.randint(0, 8, (3,), generator=generator)
    kept = logits.clone(), tokens.clone()
    result = call(name, *kept, step=step, temperature=temperature, editable=editable, valid_lens=lengths)
    assert kept[0].equal(logits) and kept[1].equal(tokens)
    reach = editable & (torch.arange(7) < lengths[:, None])
    may = reach if name in JUDGES_COMMITTED else reach & (tokens == MASK)
    assert result.tokens[~may].equal(tokens[~may])
    assert not result.transfer_mask[~may].any()
    assert (result.candidate[~may] == -1).all() and (result.confidence[~may] == 0).all()
    assert (result.candidate[may] >= 0).all() and (result.entropy[may] >= 0).all()
    taken = result.transfer_mask
    assert result.tokens[taken].equal(result.candidate[taken])
    if POLICIES[name].renoise:
        assert result.num_masked.equal((reach & ~taken).sum(1))
        assert result.done.tolist() == [step >= 3] * 3
    else:
        assert result.num_masked.equal((reach & (result.tokens == MASK)).sum(1))
        assert result.done.equal(result.num_masked == 0)


@pytest.mark.parametrize("name", PROGRESS)
@few
@given(seed=seeds, step=st.integers(0, 5))
def test_makes_progress(name, seed, step):
    logits, tokens = block(seed)
    result = call(name, logits, tokens, step=step)
    had_work = (tokens == MASK).any(1)
    assert result.transfer_mask.any(1)[had_work].all()
    if name == "hierarchy_remask":  # candidates that are the mask leave a mask, all others make one less
        tokens_only = logits.index_fill(2, torch.tensor([MASK]), -50.0)
        after = call(name, tokens_only, tokens, step=step, temperature=0.0, top_k=0, top_p=1.0)
        assert (after.num_masked < (tokens == MASK).sum(1))[had_work].all()


@pytest.mark.parametrize("name", FINISHES)
@few
@given(seed=seeds, temperature=st.sampled_from([0.0, 0.8]))
def test_finishes_in_the_last_step(name, seed, temperature):
    result = call(name, *block(seed), step=3, temperature=temperature)
    assert result.done.all() and not (result.tokens == MASK).any()


@every_policy
@few
@given(seed=seeds)
def test_a_row_alone_is_the_row_in_a_batch(name, seed):
    """Every parameter differs from row to row, and each row gets what it gets alone with its own numbers."""
    logits, tokens = block(seed)
    rows = {
        "step": [0, 2, 1],
        "num_steps": [3, 3, 5],
        "temperature": [0.0, 0.7, 1.2],
        "top_k": [0, 4, 2],
        "top_p": [0.7, 1.0, 0.9],
        "seed": [1, -(2**63), 2**63 - 1],
        "offset": [0, 7, 2**32 - 1],
        "gate_bound": [0.3, 0.6, 0.9],
        "initial_num_masked": [7, 6, 7],
        "valid_lens": [7, 5, 0],
    }
    tensors = {key: torch.tensor(value) for key, value in rows.items()}
    tensors |= {key: torch.tensor(rows[key], dtype=torch.float64) for key in ("temperature", "top_p", "gate_bound")}
    batch = call(name, logits, tokens, **tensors)
    for b in range(3):
        alone = {key: value[b] for key, value in rows.items()} | {"valid_lens": torch.tensor([rows["valid_lens"][b]])}
        same(batch, call(name, logits[b : b + 1], tokens[b : b + 1], **alone), slice(b, b + 1))


@every_policy
@few
@given(seed=seeds, length=st.integers(0, 6))
def test_what_lies_beyond_a_row_s_length_does_not_exist(name, seed, length):
    logits, tokens = block(seed, batch=1)
    cut = call(name, logits[:, :length], tokens[:, :length])
    logits[:, length:] = torch.nan
    whole = call(name, logits, tokens, valid_lens=torch.tensor([length], dtype=torch.int32))
    assert whole.tokens[:, length:].equal(tokens[:, length:])
    same(whole._replace(**{f: getattr(whole, f)[:, :length] for f in whole._fields[:5]}), cut)


@every_policy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_logits_commit_nothing(name, bad):
    """NaN or +inf at one token, or only -inf: the position keeps its token and says NaN; other rows do not notice."""
    logits, tokens = block(1, masked=1.0)
    logits[1, 2, 4 if bad != -math.inf else slice(None)] = bad
    for step in (1, 3):
        result = call(name, logits, tokens, step=step)
        assert result.tokens[1, 2] == MASK and not result.transfer_mask[1, 2] and result.candidate[1, 2] == -1
        assert result.confidence.isnan().nonzero().tolist() == [[1, 2]]
        assert result.entropy.isnan().nonzero().tolist() == [[1, 2]]
        assert POLICIES[name].renoise or not result.done[1]
        others = torch.tensor([0, 2])
        same(call(name, *block(1, masked=1.0), step=step), result._make(x[others] for x in result), others)


def test_a_suppressed_token_s_logit_is_never_read():
    logits, tokens = block(2)
    want = call("twotower", logits, tokens, suppress_ids=[5])
    logits[..., 5], logits[..., MASK] = torch.nan, torch.inf
    same(want, call("twotower", logits, tokens, suppress_ids=torch.tensor([5])))
    assert not (want.candidate == 5).any() and not (want.candidate == MASK).any()


@every_policy
def test_sizes_at_the_edge(name):
    for batch, size, vocab in [(0, 4, 8), (2, 0, 8), (1, 1, 4), (2, 1, 5), (0, 0, 4)]:
        result = call(name, *block(0, batch, size, vocab, masked=1.0))
        assert result.tokens.shape == result.confidence.shape == (batch, size)
        assert result.num_masked.shape == result.done.shape == (batch,)


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_read_exactly(name, dtype):
    """The logits are widened once: the same numbers in float32 give the same step, in float64 the same statistics."""
    logits, tokens = block(3, dtype=dtype)
    result = call(name, logits, tokens, temperature=0.0)
    assert result.confidence.dtype == result.entropy.dtype == torch.float32
    same(call(name, logits.float(), tokens, temperature=0.0), result)
    exact = call(name, logits.double(), tokens, temperature=0.0)
    assert exact.confidence.dtype == torch.float64
    torch.testing.assert_close(result.confidence.double(), exact.confidence, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(result.entropy.double(), exact.entropy, rtol=2e-6, atol=1e-6)


def test_strides_and_integer_types_do_not_matter():
    logits, tokens = block(4)
    want = call("dream_margin", logits, tokens)
    permuted = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    spread = torch.stack([tokens, tokens], dim=2).transpose(0, 1)[..., 0].transpose(0, 1)
    assert not permuted.is_contiguous() and not spread.is_contiguous()
    same(want, call("dream_margin", permuted, spread))
    narrow = call("dream_margin", logits, tokens.int())
    assert narrow.tokens.dtype == torch.int32
    same(want, narrow._replace(tokens=narrow.tokens.long()))


# --- ties, counts, statistics ----------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_token_and_the_leftmost_position():
    logits = torch.zeros(1, 6, 8)
    tokens = torch.tensor([[1, MASK, MASK, 2, MASK, MASK]])
    for name, policy in POLICIES.items():
        if policy.suppress_mask and policy.schedule == "remaining" and policy.score != "random":
            result = call(name, logits, tokens, step=0, num_steps=2, temperature=0.0, gate_bound=0.9)
            assert result.candidate.tolist() == [[-1, 0, 0, -1, 0, 0]], name
            assert result.transfer_mask.tolist() == [[False, True, True, False, False, False]], name
    same_noise = torch.full((1, 6), 0.25)
    result = call("first_hitting", logits, tokens, temperature=0.0, rank_noise=same_noise)
    assert result.transfer_mask.nonzero().tolist() == [[0, 1]]
    kept = call("untempered_nucleus", logits, tokens, temperature=0.0, top_k=3, top_p=1.0)
    assert kept.confidence[0, 1].item() == pytest.approx(1 / 7)  # all seven tie with the third


def test_twotower_by_hand():
    """c = 0.9, 0.6, 0.5, 0.4 of two tokens each; 4 masks, 4 steps: the threshold, the schedule and the floor."""
    c = torch.tensor([[0.9, 0.6, 0.5, 0.4]], dtype=torch.float64)
    logits = torch.full((1, 4, 6), -torch.inf, dtype=torch.float64)
    logits[..., 5], logits[..., 1] = torch.where(c > 0.45, c, 1 - c).log(), torch.where(c > 0.45, 1 - c, c).log()
    logits[0, 3, 0] = torch.tensor(0.35).log()  # 0.6 becomes 0.6 of 1.35
    tokens = torch.full((1, 4), MASK)
    for threshold, step, count in [(0.8, 0, 1), (0.55, 0, 2), (0.95, 0, 1), (0.95, 2, 2), (0.95, 3, 4), (0.0, 0, 4)]:
        policy = RemaskPolicy.twotower(threshold)
        result = remask(logits, tokens, mask_token_id=MASK, policy=policy, step=step, num_steps=4)
        assert result.transfer_mask.tolist() == [[s < count for s in range(4)]]
        assert result.num_masked.tolist() == [4 - count]
    assert remask(logits, tokens, mask_token_id=MASK, gate_bound=0.9).confidence[0, 0].item() == pytest.approx(0.9)


def test_equality_with_a_bound():
    """c is exactly 1/2 at one position and H exactly 0 at another: strict rules refuse what others accept."""
    logits = torch.full((1, 3, 6), -torch.inf)
    logits[0, 0, 5] = logits[0, 1, :2] = logits[0, 2, 4:] = 0.0  # c = 1, 1/2, 1/2
    masks, committed = torch.full((1, 3), MASK), torch.tensor([[1, MASK, 2]])

    def written(policy, tokens=masks, **options):
        return remask(logits, tokens, mask_token_id=MASK, policy=policy, num_steps=9, **options).transfer_mask.tolist()[
            0
        ]

    every, first = [True, True, True], [True, False, False]
    assert written(RemaskPolicy.twotower(0.5)) == first and written(RemaskPolicy.twotower(0.49)) == every
    for strict in (RemaskPolicy.llada2(0.5, min_commits=1), RemaskPolicy.diffulex(0.5), RemaskPolicy.leftmost(0.5)):
        assert written(strict) == first
    assert written(RemaskPolicy.threshold(0.5)) == written(RemaskPolicy.wedlm_hf(0.5)) == every
    bounds = RemaskPolicy.fast_dllm_factor(1.5, last_free=False)  # rank 1 free, then 1/2, then 5/8
    assert written(bounds) == [True, True, False]
    assert written(dataclasses.replace(bounds, factor_last_free=True)) == every
    assert written(RemaskPolicy.dinfer(0.5)) == every and written(RemaskPolicy.dinfer(0.51)) == first
    assert written(RemaskPolicy.predict_and_noise(threshold=0.5)) == every
    one_by_one = RemaskPolicy.threshold(0.5, strict=True)
    assert written(RemaskPolicy.dinfer_hierarchy(0.5, 1.0)) == first == written(one_by_one)
    certain = torch.full((1, 3, 6), -torch.inf)
    certain[..., 5] = 0.0
    logits = certain
    assert written(RemaskPolicy.entropy_bound(0.0)) == first  # 0 < 0 fails, and one is always taken
    assert written(dataclasses.replace(RemaskPolicy.diffusion_gemma(0.0), renoise=False)) == every
    assert written(RemaskPolicy.wedlm(0.0, position_penalty=0.0)) == first
    assert written(RemaskPolicy.llada2(2.0, min_commits=1, edit_threshold=1.0), committed) == [False, True, False]
    assert written(RemaskPolicy.llada2(2.0, min_commits=1, edit_threshold=0.99), committed) == every
    sent_back = remask(
        logits, committed, mask_token_id=MASK, policy=RemaskPolicy.llada2(2.0, min_commits=1, remask_threshold=1.0)
    )
    assert sent_back.tokens.tolist() == [[1, 5, 2]]


@few
@given(steps=st.integers(1, 60), multiple=st.integers(1, 4))
def test_products_that_are_whole_are_not_lost_to_rounding(steps, multiple):
    """With min_t = 0 the linear schedules divide evenly, in the last digit too."""
    step, num_steps = torch.arange(steps), torch.full((steps,), steps)
    n = multiple * (num_steps - step)
    noise = RemaskPolicy.predict_and_noise(min_t=0.0)
    assert (quota(noise, n, None, multiple * num_steps, step, num_steps) == multiple).all()
    assert (quota(RemaskPolicy.dream(eps=0.0), n, None, n, step, num_steps) == multiple).all()
    assert (quota(RemaskPolicy.dllm(), n, multiple * num_steps, n, step, num_steps) == multiple).all()


@pytest.mark.parametrize("schedule", ["even", "carried", "rounded"])
@settings(max_examples=20)
@given(initial=st.integers(0, 20), length=st.integers(0, 6), steps=st.integers(1, 9))
def test_schedules_from_the_start_spend_everything_and_are_inferred(schedule, initial, length, steps):
    """q over all steps sums to n0, with n0 given; without it, n0 is inferred so that nothing remains either."""
    policy = RemaskPolicy(schedule=schedule, alpha="sine")
    size, num_steps = torch.tensor([initial + length]), torch.tensor([steps])
    for known in (torch.tensor([initial]), None):
        n = torch.tensor([initial])
        for i in range(steps):
            step = torch.tensor([i])
            q = quota(policy, n, known, size, step, num_steps)
            assert q >= 0
            if known is not None and schedule != "carried":
                assert spent(policy, known, step, num_steps) + n == initial
            guess = infer_initial(policy, n, size, step, num_steps)
            assert n <= guess <= size
            n = n - torch.minimum(q, n)
        assert n == 0


@few
@given(seed=seeds)
def test_suppression_in_the_confidence_only(seed):
    logits, tokens = block(seed, masked=1.0)
    plain = call("dllm", logits, tokens, temperature=0.0)
    result = call("dllm", logits, tokens, temperature=0.0, confidence_suppress_ids=[0, 1])
    assert result.candidate.equal(plain.candidate)
    p = logits.index_fill(2, torch.tensor([0, 1]), -torch.inf).softmax(-1)
    torch.testing.assert_close(result.confidence, p.gather(2, plain.candidate[..., None])[..., 0])
    assert (result.confidence[plain.candidate < 2] == 0).all()


def test_candidates_of_the_caller_stand():
    logits, tokens = block(6, masked=1.0)
    given_ids = torch.full(tokens.shape, -1)
    given_ids[:, 0], given_ids[:, 3] = 9, MASK
    own, result = (call("twotower", logits, tokens, step=3, candidates=c) for c in (None, given_ids))
    assert (result.tokens[:, 0] == 9).all() and (result.tokens[:, 3] == MASK).all()
    assert (result.confidence[:, 3] == 0).all() and result.num_masked.tolist() == [1, 1, 1]
    assert result.tokens[:, 4:].equal(own.tokens[:, 4:])


# --- draws -----------------------------------------------------------------------------------------------------------


def chi_square(counts, probability):
    """Pearson's statistic in standard deviations from its mean; `probability` may hold zeros, which must not occur."""
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probability[possible]
    free = int(possible.sum()) - 1
    return float((((counts[possible] - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_follow_the_tempered_and_filtered_softmax(dtype):
    rows = 20000
    z = torch.tensor([0.3, -0.5, 1.1, 2.0, 0.9, -2.0, 0.1], dtype=dtype)
    for options, support in [
        ({"temperature": 1.0}, [0, 1, 2, 4, 5, 6]),
        ({"temperature": 0.6}, [0, 1, 2, 4, 5, 6]),
        ({"temperature": 1.3, "top_k": 3}, [0, 2, 4]),
        ({"temperature": 0.8, "top_p": 0.8}, [0, 2, 4]),  # 0.46, 0.36 of it, then 0.17 crosses 0.8
    ]:
        p = torch.zeros(7, dtype=torch.float64)
        p[support] = (z[support].double() / options["temperature"]).softmax(0)
        result = remask(
            z.expand(rows, 2, 7), torch.full((rows, 2), MASK), mask_token_id=MASK, seed=torch.arange(rows), **options
        )
        first, second = (torch.bincount(result.candidate[:, s], minlength=7).double() for s in (0, 1))
        assert abs(chi_square(first, p)) < 5 and abs(chi_square(second, p)) < 5
        both = torch.bincount(7 * result.candidate[:, 0] + result.candidate[:, 1], minlength=49).double()
        assert abs(chi_square(both, (p[:, None] * p).flatten())) < 5  # positions draw independently


def exact_sample(z, temperature, words):
    """argmax z / T + g in Python floats, the first of equal ones."""
    noisy = [x / temperature - math.log(-math.log1p(-(w + 0.5) / 2**32)) for x, w in zip(z, words, strict=True)]
    return noisy.index(max(noisy))


@few
@given(seed=st.integers(-(2**63), 2**63 - 1), offset=st.integers(0, 2**32 - 1), step=st.integers(0, 2**20), tie=seeds)
def test_the_draw_is_the_one_written_down(seed, offset, step, tie):
    """Token for token the argmax with exact noise, also where two candidates are nearer than float32 can tell."""
    logits, tokens = block(tie, batch=1, size=4, vocab=13, masked=1.0, dtype=torch.float32)
    numbers = [torch.tensor([x]) for x in (seed, offset, step)]
    words = philox.vocabulary_words(*numbers, 4, 13)
    noise = philox.gumbel(words, torch.float64)
    logits[:, 2:, 4:] = -30.0  # in half of the positions tokens 0 and 1 end in a near tie
    logits[:, 2:, 2] = -30.0
    logits[:, 2:, 0] = 0.7 * (5 - noise[:, 2:, 0]).float()
    logits[:, 2:, 1] = 0.7 * (5 - noise[:, 2:, 1]).float()
    options = {"seed": seed, "offset": offset, "step": step, "num_steps": step + 4, "temperature": 0.7}
    result = remask(logits, tokens, mask_token_id=MASK, **options)
    z = logits.index_fill(2, torch.tensor([MASK]), -torch.inf)[0].tolist()
    assert result.candidate[0].tolist() == [exact_sample(z[s], 0.7, words[0, s].tolist()) for s in range(4)]


def test_the_same_seed_draws_the_same_and_others_do_not():
    logits, tokens = torch.zeros(1, 16, 1000), torch.full((1, 16), MASK)

    def draw(**options):
        return remask(logits, tokens, mask_token_id=MASK, temperature=1.0, **options).candidate

    assert draw(seed=1).equal(draw(seed=1)) and draw(seed=-1).equal(draw(seed=2**64 - 1))
    other = [draw(seed=1), draw(seed=2), draw(seed=1 << 32), draw(seed=1, offset=1), draw(seed=1, step=1)]
    for i, a in enumerate(other):
        assert len(set(a[0].tolist())) > 8  # positions differ
        for b in other[:i]:
            assert (a == b).float().mean() < 0.2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_posterior_keeps_the_mask_with_its_probability(temperature):
    """At T = 1 with probability (1 - a_s) / (1 - a_t), otherwise that of the tempered q."""
    rows, z = 20000, torch.tensor([1.0, 0.0, 0.5, 9.0, -1.0])
    policy, step, steps = RemaskPolicy.posterior("cosine", min_t=1e-3), 1, 3
    t, s = (1 - i * (1 - 1e-3) / steps for i in (step, step + 1))
    a_t, a_s = math.cos(math.pi * t / 2), math.cos(math.pi * s / 2)
    q = z.double().index_fill(0, torch.tensor([MASK]), -torch.inf).softmax(0) * (a_s - a_t) / (1 - a_t)
    q[MASK] = (1 - a_s) / (1 - a_t)
    tempered = (q.log() / temperature).softmax(0)
    logits, tokens, seed = z.expand(rows, 1, 5), torch.full((rows, 1), MASK), torch.arange(rows)
    options = {"mask_token_id": MASK, "policy": policy, "step": step, "num_steps": steps, "seed": seed}
    after = remask(logits, tokens, temperature=temperature, **options).tokens
    assert abs(chi_square(torch.bincount(after[:, 0], minlength=5).double(), tempered)) < 5
    filtered = torch.where(tempered >= tempered.topk(2).values[-1], tempered, 0)  # the mask is one of the two
    after = remask(logits, tokens, temperature=temperature, top_k=2, **options).tokens
    assert filtered[MASK] > 0
    assert abs(chi_square(torch.bincount(after[:, 0], minlength=5).double(), filtered / filtered.sum())) < 5


def test_positions_are_drawn_evenly():
    rows = 8000
    logits, tokens = torch.zeros(rows, 6, 40), torch.full((rows, 6), MASK)
    tokens[:, 4] = 7
    options = {"mask_token_id": MASK, "seed": torch.arange(rows), "step": 1, "num_steps": 4}
    hit = remask(logits, tokens, policy=RemaskPolicy.first_hitting(), **options).transfer_mask
    evenly = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.0, 0.2], dtype=torch.float64)
    assert (hit.sum(1) == 1).all() and abs(chi_square(hit.sum(0).double(), evenly)) < 5
    eps = 1e-3
    rho = 1 - (1 - 2 * (1 - eps) / 4) / (1 - (1 - eps) / 4)
    moved = remask(logits, tokens, policy=RemaskPolicy.dream("origin", eps=eps), **options).transfer_mask
    coins = moved[:, [0, 1, 2, 3, 5]].double()
    counts = torch.stack([coins.sum(), (1 - coins).sum()])
    assert abs(chi_square(counts, torch.tensor([rho, 1 - rho], dtype=torch.float64))) < 5
    canvas = remask(logits, tokens, policy=RemaskPolicy.diffusion_gemma(0.0), temperature=0.8, **options)
    noise = canvas.tokens[~canvas.transfer_mask]
    flat = torch.full((40,), 1 / 40, dtype=torch.float64)
    assert abs(chi_square(torch.bincount(noise, minlength=40).double(), flat)) < 5


def test_renoise_ends_with_the_argmax():
    logits, tokens = block(9)
    policy = RemaskPolicy.diffusion_gemma()
    options = {"policy": policy, "num_steps": 4, "temperature": 0.8}
    result = remask(logits, tokens, mask_token_id=None, step=3, **options)
    assert result.tokens.equal(logits.argmax(-1)) and result.done.all()
    assert not remask(logits, tokens, mask_token_id=None, step=2, **options).done.any()


@pytest.mark.parametrize("case", [case for case in CASES["remask"] if not case.startswith("released")])
def test_inputs_are_reproducible(case):
    one, two = make_inputs("remask", case, seed=4), make_inputs("remask", case, dtype=torch.bfloat16, seed=4)
    assert one["tokens"].equal(two["tokens"]) and one["logits"].bfloat16().equal(two["logits"])
    result = remask(**one)
    assert result.tokens.shape == one["tokens"].shape and not result.confidence.isnan().any()

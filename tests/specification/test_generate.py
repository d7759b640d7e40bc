"""Generation: the recorded programs' tokens, calls and traces; and what must hold for any model, mode and rule."""

import copy
import dataclasses
import functools
import inspect
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tests.model.small_model import MASK, VOCAB, small_model
from tests.paths import GOLDEN
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import philox
from twotower_kernels.reference.generate import MODES, GenerateResult, StepEvent, generate
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.remask import remask


def with_logits(value: float) -> TwoTower:
    """The small model with all logits equal to 0, or NaN."""
    model = copy.deepcopy(small_model())
    for tower in (model.context_tower, model.denoiser_tower):
        nn.init.constant_(tower.norm_f.weight, value)
    return model


def run(prompts: Any, **options: Any) -> GenerateResult:
    return generate(small_model(), prompts, **options)


def lists(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [t.tolist() for t in tensors]


tokens = st.integers(MASK + 1, VOCAB - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=3)
sampling = st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}])
modes = st.sampled_from(MODES)
BY_BLOCKS = [
    mode for mode in MODES if mode != "speculative"
]  # whose events and calls tests/model/test_speculative.py has
blocks = st.sampled_from([{"block_size": s, "steps_per_block": t} for s, t in ((1, 1), (4, 4), (5, 2), (3, 8))])

# Every preset with its defaults, and the variants that end differently.
PRESETS = {name: preset for name in vars(RemaskPolicy) if inspect.ismethod(preset := getattr(RemaskPolicy, name))}
POLICIES = {name: preset() for name, preset in PRESETS.items()} | {
    "llada2_editing": RemaskPolicy.llada2(0.6, min_commits=1, edit_threshold=0.5),
    "llada2_remask": RemaskPolicy.llada2(0.3, remask_threshold=0.3),
    "sdar_dynamic": RemaskPolicy.sdar(0.5),
    "jetengine_leftmost": RemaskPolicy.jetengine("sequential"),
    "dream_origin": RemaskPolicy.dream("origin"),
    "hierarchy_remask": RemaskPolicy.dinfer_hierarchy(remask_threshold=0.4),
    "posterior_cosine": RemaskPolicy.posterior("cosine"),
    "posterior_long_grid": RemaskPolicy.posterior(long_grid=True),
    "adaptive": RemaskPolicy.predict_and_noise(adaptive=True),
    "d2f": RemaskPolicy.diffulex(block_size=3, complete_threshold=1.0),
}
UNMASKING = {name: policy for name, policy in POLICIES.items() if not policy.renoise}


# --- the recorded programs ------------------------------------------------------------------------------------------


RECORDED = [(name, index) for name in ("tiny", "grouped_router") for index in range(6)]
TIE = ("tiny", 2)


class RecordedTime(nn.Module):
    """The time embedding as the machine of the recordings rounded it.

    Frequencies are float32 exponentials, and those of two math libraries differ in a last digit here and there, which
    1000·t magnifies. The recorded logits show which: all are the rounded exact value, but f_12, 0.48 of a unit in the
    last place below it, was rounded up. In float64 this leaves nothing to chance.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.mlp = embedder.mlp
        self.f = torch.exp((-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128).double()).float()
        self.f[12] = torch.nextafter(self.f[12], torch.tensor(1.0))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = (1000 * t.float())[:, None] * self.f
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).double())


@functools.cache
def recorded(name: str, dtype: torch.dtype) -> tuple[TwoTower, list[dict[str, Any]], dict[str, torch.Tensor]]:
    folder = GOLDEN / name
    arguments = json.loads((folder / "generations.json").read_text(encoding="utf-8"))
    model = TwoTower.from_pretrained(folder, dtype=dtype)
    if dtype == torch.float64:
        model.t_embedder = RecordedTime(model.t_embedder)
    return model, arguments, load_file(folder / "io.safetensors")


def replay(name: str, index: int, dtype: torch.dtype) -> tuple[GenerateResult, torch.Tensor]:
    """A recorded generation again, and every block as it entered the denoiser, [NFE, S]."""
    model, arguments, data = recorded(name, dtype)
    options = {key: value for key, value in arguments[index].items() if key != "nfe"}
    events: list[StepEvent] = []
    result = generate(model, data[f"gen.{index}.prompt"], on_step=events.append, **options)
    return result, torch.cat([event.before for event in events if not event.committed] or [torch.empty(0)])


@pytest.mark.parametrize(
    ("name", "index", "dtype"),
    [(*case, torch.float64) for case in RECORDED] + [(*case, torch.float32) for case in RECORDED if case != TIE],
)
def test_generates_what_was_recorded(name: str, index: int, dtype: torch.dtype) -> None:
    """Output tokens, and for diffusion the block as it entered each denoiser call, and the number of calls: equal."""
    result, trace = replay(name, index, dtype)
    _, arguments, data = recorded(name, dtype)
    assert result.sequences[0].tolist() == data[f"gen.{index}.output"][0].tolist()
    if arguments[index]["mode"] == "mask_diffusion":
        assert torch.equal(trace, data[f"gen.{index}.trace"])
        assert result.nfe == [arguments[index]["nfe"]]
        assert result.tokens_per_nfe == arguments[index]["max_new_tokens"] / result.nfe[0]


def test_the_one_recorded_tie() -> None:
    """One decision of the recordings is closer than float32 can tell: the two positions' confidences differ by 1e-6.

    Up to there the float32 trace is the recorded one; if it goes on differently, then in these two positions alone.
    """
    name, index = TIE
    model, _, data = recorded(name, torch.float32)
    want, output = data[f"gen.{index}.trace"], data[f"gen.{index}.output"]
    _, trace = replay(name, index, torch.float32)
    call, pair = 4, [3, 7]  # the second step of the second block of 8, after a prompt of 11
    assert torch.equal(trace[: call + 1], want[: call + 1])
    assert set((trace[call + 1] != want[call + 1]).nonzero().flatten().tolist()) <= set(pair)
    with torch.no_grad():
        logits = model.denoise(want[None, call], model.prefill(output[:, :19]), 5 / 8)[0]
    logits[:, MASK] = -torch.inf
    one, other = logits.softmax(-1).amax(-1)[pair].tolist()
    assert abs(one - other) < 2e-5


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_autoregressive_modes_are_their_definition(mode: str) -> None:
    """Token by token without any carried state: the last logits of the whole text so far."""
    model = small_model()
    prompt = [5, 9, 4]
    text = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(6):
            if mode == "ar":
                logits = model.forward_ar(text)[:, -1]
            else:
                logits = model.denoise(text[:, -1:], model.prefill(text[:, :-1]))[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert run([prompt], mode=mode, max_new_tokens=6).sequences[0].tolist() == text[0].tolist()


# --- a batch is its rows --------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(rows=prompts, mode=modes, sampler=sampling, block=blocks, new=st.integers(0, 8), eos=st.none() | tokens)
def test_a_ragged_batch_is_each_prompt_alone(rows, mode, sampler, block, new, eos) -> None:  # type: ignore[no-untyped-def]
    """Tokens, calls and finish reasons. Row b draws from seed and b: alone, it is the last of b + 1 rows."""
    options = {"mode": mode, "max_new_tokens": new, "eos_token_id": eos, "seed": 7, **sampler, **block}
    batch = run(rows, **options)
    for b, row in enumerate(rows):
        # Greedy rows do not draw, so the row may really be alone.
        alone = run([[VOCAB - 1]] * b + [row] if sampler else [row], **options)
        assert alone.sequences[-1].tolist() == batch.sequences[b].tolist()
        assert alone.nfe[-1] == batch.nfe[b]
        assert alone.finish_reason[-1] == batch.finish_reason[b]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("mode", BY_BLOCKS)
def test_rows_that_are_done_cost_nothing(mode: str, ends: bool) -> None:
    """The model is called with the rows that still need it, and never after the last block."""
    model = small_model()
    rows = [[5], [6, 7, 8], [9, 10]]
    full = run(rows, mode=mode, max_new_tokens=12, block_size=4)
    eos = int(full.new_tokens[1][2]) if ends else None
    sizes: dict[str, list[int]] = {"denoise": [], "commit": []}

    class Watched:
        config, parameters, prefill = model.config, model.parameters, model.prefill

        def denoise(self, ids, state, t=None):  # type: ignore[no-untyped-def]
            sizes["denoise"].append(len(ids))
            return model.denoise(ids, state, t)

        def commit(self, ids, state):  # type: ignore[no-untyped-def]
            sizes["commit"].append(ids.numel())
            return model.commit(ids, state)

    result = generate(Watched(), rows, mode=mode, max_new_tokens=12, block_size=4, eos_token_id=eos)  # type: ignore[arg-type]
    assert ("eos" in result.finish_reason) == ends
    assert sum(sizes["denoise"]) == (0 if mode == "ar" else sum(result.nfe))
    block = 4 if mode == "mask_diffusion" else 1
    assert sum(sizes["commit"]) == sum((math.ceil(len(new) / block) - 1) * block for new in result.new_tokens)


# --- lengths and ends -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(rows=prompts, mode=modes, sampler=sampling, block=blocks, short=st.integers(0, 6), more=st.integers(0, 4))
def test_a_shorter_request_is_a_prefix(rows, mode, sampler, block, short, more) -> None:  # type: ignore[no-untyped-def]
    options = {"mode": mode, "seed": 3, **sampler, **block}
    long = run(rows, max_new_tokens=short + more, **options)
    for new, whole in zip(run(rows, max_new_tokens=short, **options).new_tokens, long.new_tokens, strict=True):
        assert len(whole) == short + more
        assert new.tolist() == whole.tolist()[:short]


@settings(max_examples=25)
@given(rows=prompts, mode=modes, sampler=sampling, block=blocks, eos=tokens)
def test_with_eos_is_without_and_cut(rows, mode, sampler, block, eos) -> None:  # type: ignore[no-untyped-def]
    options = {"mode": mode, "max_new_tokens": 9, **sampler, **block}
    free = run(rows, **options)
    ended = run(rows, eos_token_id=eos, **options)
    for b, new in enumerate(lists(free.new_tokens)):
        want = new[: new.index(eos) + 1] if eos in new else new
        assert ended.new_tokens[b].tolist() == want
        assert ended.sequences[b].tolist() == rows[b] + want
        assert ended.finish_reason[b] == ("eos" if eos in new else "length")
        assert ended.nfe[b] <= free.nfe[b]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_asked_costs_nothing(mode: str) -> None:
    result = run([[5], [6, 7]], mode=mode, max_new_tokens=0)
    assert lists(result.sequences) == [[5], [6, 7]]
    assert result.nfe == [0, 0]
    assert result.tokens_per_nfe == 0


@pytest.mark.parametrize("mode", MODES)
def test_prompts_may_be_a_tensor_or_rows_of_any_kind(mode: str) -> None:
    as_tensor = run(torch.tensor([[5, 6], [7, 8]]), mode=mode, max_new_tokens=5)
    as_rows = run([torch.tensor([5, 6], dtype=torch.int32), [7, 8]], mode=mode, max_new_tokens=5)
    assert lists(as_tensor.sequences) == lists(as_rows.sequences)
    assert all(row.dtype == torch.int64 and row.ndim == 1 for row in as_rows.sequences)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", UNMASKING)
def test_every_rule_ends_without_a_mask(name: str, temperature: float) -> None:
    size, steps = 6, 3
    options = {"max_new_tokens": 2 * size, "block_size": size, "steps_per_block": steps, "policy": UNMASKING[name]}
    rows = [[9, 4, 7], [5]]
    result = run(rows, temperature=temperature, **options)
    assert all(len(new) == 2 * size and MASK not in new for new in result.new_tokens)
    assert all(2 <= nfe <= 2 * (size + 1) for nfe in result.nfe)
    alone = run(rows[:1], temperature=temperature, **options)
    assert alone.sequences[0].tolist() == result.sequences[0].tolist()
    assert alone.nfe[0] == result.nfe[0]


@pytest.mark.parametrize(("size", "steps"), [(4, 2), (2, 5)])
def test_a_rule_that_stalls_is_finished(monkeypatch: pytest.MonkeyPatch, size: int, steps: int) -> None:
    """A denoiser that always proposes the mask, under a rule that lets it: one call more than the block could need."""
    model = copy.deepcopy(small_model())
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    logits[MASK], logits[7] = 9.0, 5.0
    monkeypatch.setattr(model, "denoise", lambda ids, state, t=None: logits.expand(*ids.shape, VOCAB))
    options = {"max_new_tokens": size, "block_size": size, "steps_per_block": steps}
    result = generate(model, [[5]], policy=RemaskPolicy.llada(), **options)
    assert result.new_tokens[0].tolist() == [7] * size
    assert result.nfe == [max(size, steps) + 1]


def test_remasking_is_told_how_the_block_began(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def spy(logits: torch.Tensor, tokens: torch.Tensor, **options: Any) -> Any:
        told.append(tuple(options[key] for key in ("offset", "step", "num_steps", "initial_num_masked")))
        return remask(logits, tokens, **options)

    monkeypatch.setattr("twotower_kernels.reference.generate.remask", spy)
    run([[5]], max_new_tokens=6, block_size=3, steps_per_block=2, policy=RemaskPolicy.first_hitting())
    assert told == [(block, step, max(2, step + 1), 3) for block in range(2) for step in range(3)]


def test_a_rule_without_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="renoise"):
        run([[5]], max_new_tokens=4, policy=RemaskPolicy.diffusion_gemma())


def test_the_denoiser_is_told_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked fraction of each row for rules that rank; the schedule's own time for predict-and-noise."""
    model, told = small_model(), []
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda ids, state, t=None: (told.append((ids, t)), denoise(ids, state, t))[1])
    options = {"max_new_tokens": 8, "block_size": 8, "steps_per_block": 4}
    run([[5], [6, 7], [8]], **options)
    assert all(torch.equal(t.double(), (ids == MASK).double().mean(1)) for ids, t in told)
    assert len({float(x) for _, t in told for x in t}) > 2
    told.clear()
    run([[5]], policy=RemaskPolicy.predict_and_noise(min_t=0.0), **options)
    assert [float(t) for _, t in told] == [1.0, 0.75, 0.5, 0.25][: len(told)]
    run([[5]], mode="mock_ar", max_new_tokens=1)
    assert told[-1][1] is None


@settings(max_examples=25)
@given(rows=prompts, threshold=st.floats(0, 1), block=blocks, temperature=st.sampled_from([0.0, 1.0]))
def test_the_twotower_rule_keeps_its_schedule(rows, threshold, block, temperature) -> None:  # type: ignore[no-untyped-def]
    """At least one call per block, at most min(T, S)."""
    options = {"confidence_threshold": threshold, "temperature": temperature, **block}
    result = run(rows, max_new_tokens=2 * block["block_size"], **options)
    most = 2 * min(block["steps_per_block"], block["block_size"])
    assert all(2 <= nfe <= most for nfe in result.nfe)
    named = run(
        rows,
        max_new_tokens=2 * block["block_size"],
        policy=RemaskPolicy.twotower(threshold=threshold),
        **{**options, "confidence_threshold": 0.123},
    )
    assert lists(named.sequences) == lists(result.sequences)  # a policy replaces the threshold


# --- randomness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides(mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 12, "temperature": 2.0, "block_size": 4}
    row = [5, 6]
    one, two, other = (run([row, row], seed=seed, **options) for seed in (1, 1, 2))
    assert lists(one.sequences) == lists(two.sequences)
    assert lists(one.sequences) != lists(other.sequences)
    assert one.sequences[0].tolist() != one.sequences[1].tolist()  # rows draw apart
    greedy = run([row], mode=mode, max_new_tokens=12)
    assert lists(run([row], mode=mode, max_new_tokens=12, temperature=2.0, top_k=1).sequences) == lists(
        greedy.sequences
    )


@pytest.mark.parametrize("mode", MODES)
def test_draws_are_the_documented_ones(mode: str) -> None:
    """On equal logits a token is the best of the noise at (token, position, step, block), keyed by seed and row."""
    size, new = 4, 8
    options = {"mode": mode, "max_new_tokens": new, "block_size": size, "steps_per_block": 1, "temperature": 1.0}
    result = generate(with_logits(0.0), [[5], [6, 7]], seed=11, **options)
    zero = torch.zeros(1, dtype=torch.int64)
    for b, got in enumerate(lists(result.new_tokens)):
        key = torch.tensor([philox.sequence_seed(11, b)])
        if mode == "mask_diffusion":
            words = [philox.vocabulary_words(key, zero + block, zero, size, VOCAB)[0] for block in range(new // size)]
        else:
            words = [philox.vocabulary_words(key, zero + index, zero, 1, VOCAB)[0] for index in range(new)]
        drawn = torch.cat(words)  # [new, V]; the Gumbel noise falls as its word grows
        if mode == "mask_diffusion":
            drawn[:, MASK] = 2**32
        assert got == drawn.argmin(-1).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_ends_leaves_the_draws_of_others_alone(mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 12, "block_size": 3, "steps_per_block": 2, "temperature": 1.5}
    rows = [[5], [6, 7], [8]]
    free = run(rows, **options)
    first, *others = lists(free.new_tokens)
    eos = next(token for token in first if not any(token in other for other in others))
    ended = run(rows, eos_token_id=eos, **options)
    assert ended.finish_reason == ["eos", "length", "length"]
    assert lists(ended.new_tokens)[1:] == others


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_autoregressive_modes_may_write_any_token(mode: str) -> None:
    """On equal logits the lowest token wins. (The mask token is one like the others there: a recording has it.)"""
    assert generate(with_logits(0.0), [[5, MASK]], mode=mode, max_new_tokens=3).new_tokens[0].tolist() == [0] * 3


# --- events ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    rows=prompts,
    mode=st.sampled_from(BY_BLOCKS),
    sampler=sampling,
    block=blocks,
    new=st.integers(1, 9),
    eos=st.none() | tokens,
)
def test_events_tell_the_whole_story(rows, mode, sampler, block, new, eos) -> None:  # type: ignore[no-untyped-def]
    events: list[StepEvent] = []
    result = run(rows, mode=mode, max_new_tokens=new, eos_token_id=eos, on_step=events.append, **sampler, **block)
    told: list[list[int]] = [[] for _ in rows]
    current: dict[int, list[int]] = {}
    calls = [0] * len(rows)
    for event in events:
        for i, b in enumerate(event.rows.tolist()):
            before, after = event.before[i].tolist(), event.after[i].tolist()
            if not event.committed:
                assert before == current.get(b, [MASK] * block["block_size"])
                assert event.num_masked[i] == after.count(MASK) < before.count(MASK)
                current[b] = after
                calls[b] += 1
            elif mode == "mask_diffusion":
                assert after == current.pop(b)
                assert event.nfe[i] == calls[b]
            if event.committed:
                assert event.num_masked[i] == 0
                assert event.block * len(after) == len(told[b])
                told[b] += after
    for b, row in enumerate(result.new_tokens):
        assert told[b][: len(row)] == row.tolist()
        assert len(row) == new or row[-1] == eos
    if mode == "mask_diffusion":
        assert calls == result.nfe


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_model_is_reported(mode: str) -> None:
    with pytest.raises(FloatingPointError, match="row 0"):
        generate(with_logits(math.nan), [[5], [6, 7]], mode=mode, max_new_tokens=4)


def test_a_block_larger_than_trained_is_warned_about(recwarn: Any) -> None:
    model = copy.deepcopy(small_model())
    model.config = dataclasses.replace(model.config, block_size=4)
    generate(model, [[5]], max_new_tokens=4, block_size=4)
    assert not recwarn
    with pytest.warns(UserWarning, match="block_size 8 is larger than the 4"):
        generate(model, [[5]], max_new_tokens=4, block_size=8)

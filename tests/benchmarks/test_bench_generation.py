"""The measurements of generation: what is saved adds up, and is what the events say."""

import json

import pytest
import torch

import twotower_kernels as tt
from tests.benchmarks.test_pictures import saved
from twotower_kernels.bench import generation, thresholds
from twotower_kernels.bench.measure import shares, watched
from twotower_kernels.bench.report.generation import markdown

CONFIG = tt.TwoTowerConfig(
    vocab_size=64,
    hidden_size=32,
    hybrid_override_pattern="M*E",
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=1,
    conv_kernel=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)


@pytest.fixture(scope="module")
def shipped() -> tt.TwoTowerModel:
    return tt.TwoTowerModel.from_pretrained(tt.demo_path())


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion"])
def test_a_generation_is_counted_as_its_events_say(shipped: tt.TwoTowerModel, mode: str) -> None:
    blocks, size = (3, 16) if mode == "mask_diffusion" else (5, 1)
    row, events = watched.generated(shipped, torch.arange(4, 24).view(2, 10), mode=mode, max_new_tokens=blocks * size)
    ends = [event for event in events if event.committed]
    assert len(ends) == blocks and all(event.after.shape == (2, size) for event in ends)
    assert row["tokens per second"] == pytest.approx(2 * size / row["block seconds"])
    calls = int((ends[-1].nfe - ends[0].nfe).sum())
    assert row["tokens per NFE"] == pytest.approx((blocks - 1) * size * 2 / calls)
    assert row["prefill seconds"] > 0 and (row["step seconds"] is None) == (mode != "mask_diffusion")
    assert row["bytes"] is None or row["bytes"] > 10 * 2**20
    assert "prefill" not in vars(shipped), "the model is as it was"


def test_one_block_says_nothing(shipped: tt.TwoTowerModel) -> None:
    with pytest.raises(ValueError, match="expected two blocks at least, got 1"):
        watched.generated(shipped, torch.tensor([[5, 6]]), max_new_tokens=16)


def test_the_random_model_commits_four_tokens_a_call_whatever_its_context() -> None:
    rows = list(generation.random((40, 70), CONFIG, blocks=2))
    assert {(row["mode"], row["batch"], row["context"]) for row in rows} == {
        (mode, batch, context) for mode in generation.MODES for batch in (1, 4, 16) for context in (40, 70)
    }
    for row in rows:
        diffusion = row["mode"] == "mask_diffusion"
        assert row["tokens per NFE"] == (4 if diffusion else 1)
        if diffusion:
            at, step, commit = row["tokens per second at"], row["step seconds"], row["commit seconds"]
            assert at["2"] == pytest.approx(row["batch"] * 16 / (8 * step + commit))
    text = markdown(saved(random=json.loads(json.dumps(rows))))
    assert "| mask_diffusion | 16 | 70 |" in text and "at 4 per NFE" in text


def test_a_reusable_state_is_read_alike_after_a_generation() -> None:
    model = tt.TwoTowerModel(CONFIG, dtype=torch.bfloat16)
    state, ids = generation.reusable_state(model, 2, 20, 32), torch.arange(10).view(2, 5)
    before = model.denoise(ids, state, 0.5)
    model.commit(ids, state.replaced())
    assert state.lengths.tolist() == [20, 20] and state.k[1].shape[1] == 52
    assert torch.equal(model.denoise(ids, state, 0.5), before)


def test_the_parts_of_a_step_are_its_time() -> None:
    (step,) = shares.over_context((32,), CONFIG, seconds=0.2)
    assert set(step["parts"]) == {*shares.OPERATIONS, shares.OTHER}
    assert all(seconds > 0 for seconds in step["parts"].values()), "every operation is used and clocked"
    assert "sum of these" in markdown(saved(shares=[step]))


def test_a_trace_is_what_the_events_say(shipped: tt.TwoTowerModel) -> None:
    prompt = torch.arange(100, 120)
    found = thresholds.trace(shipped, prompt, 32, threshold=0.3)
    again = shipped.generate(prompt[None], max_new_tokens=32, confidence_threshold=0.3)
    assert found["token"] == again.new_tokens[0].tolist() and found["calls"] == again.nfe[0]
    first, second = found["call"][:16], found["call"][16:]
    assert min(first) >= 1 and max(first) < min(second) and max(second) == found["calls"]
    assert set(found["call"]) == set(range(1, found["calls"] + 1)), "every call commits something"


def test_a_lower_threshold_commits_more_a_call(shipped: tt.TwoTowerModel) -> None:
    prompts = torch.arange(64 * 2).view(2, 64) + 100
    rows = thresholds.sweep(shipped, shipped, prompts, 32, (0.1, 0.95))
    assert [row["threshold"] for row in rows] == [None, 0.1, 0.95]
    rates = [row["tokens per NFE"] for row in rows]
    assert rates[0] == 1 and rates[1] > rates[2] >= 1
    assert all(row["tokens per second"] > 0 and row["nats per token"] > 0 for row in rows)
    real = {"nats per token": 1.0, "distinct 4-grams": 1.0}
    counts = {"prompts": 2, "prompt tokens": 64, "new tokens": 32}
    assert "mask_diffusion, γ = 0.95" in markdown(saved(thresholds={"sweep": rows, "real text": real, **counts}))


def test_peaks_are_since_the_last_look() -> None:
    if watched.peak() is None:
        pytest.skip("this system does not say how much memory was resident")
    kept = torch.ones(2**24)  # 64 MB
    much = watched.peak()
    del kept
    watched.peak()
    less = watched.peak()
    assert much is not None and less is not None and much - less > 48 * 2**20

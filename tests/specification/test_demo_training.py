"""The demo model's training: its passes are the specification's, its targets greedy text, its runs resumable."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.paths import ROOT
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference import demo_data
from twotower_kernels.reference.demo_passes import Passes
from twotower_kernels.reference.demo_stages import LEVELS, Schedule, Stage, run
from twotower_kernels.reference.demo_targets import GreedySteps
from twotower_kernels.reference.demo_training import BATCH, LENGTH, MASK, SHARES, Targets, corrupted
from twotower_kernels.reference.generate import generate
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.train_demo import CONFIG, initialise
from twotower_kernels.reference.training import block_states, seed_denoiser

SMALL = CONFIG | dict(hidden_size=32, vocab_size=64, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, head_dim=16)
SMALL |= dict(num_attention_heads=4, moe_intermediate_size=8, moe_shared_expert_intermediate_size=16)
SMALL |= dict(hybrid_override_pattern="ME*E", num_hidden_layers=4)


@cache
def model() -> TwoTower:
    """Weights as training begins with, and then some: nothing that could be forgotten is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    found = TwoTower(TwoTowerConfig.from_dict(SMALL))
    initialise(found, generator)
    seed_denoiser(found)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return found.requires_grad_(False)


def ids_of(seed: int, batch: int, length: int) -> Tensor:
    return torch.randint(4, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(batch=st.integers(1, 2), blocks=st.integers(1, 3), size=st.sampled_from([2, 5, 16]), seed=st.integers(0, 99))
def test_the_passes_are_the_specification(batch: int, blocks: int, size: int, seed: int) -> None:
    ids, passes = ids_of(seed, batch, blocks * size), Passes(model(), size, torch.float32, compiled=False)
    generator = torch.Generator().manual_seed(seed)
    noisy = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, MASK)
    t = torch.rand(batch, blocks, generator=generator)
    hidden, context = passes.context(ids)
    torch.testing.assert_close(hidden @ model().context_lm_head.weight.T, model().forward_ar(ids), rtol=1e-4, atol=1e-4)
    denoised = passes.denoise(noisy, t, context) @ model().lm_head.weight.T
    wanted = model().denoise(noisy.reshape(-1, size), block_states(model(), ids, size), t.flatten())
    torch.testing.assert_close(denoised, wanted.reshape(denoised.shape), rtol=1e-4, atol=1e-4)
    assert [int(load.sum()) for _, load in passes.loads] == [2 * ids.numel()] * 2, "two experts for every token"


def test_a_target_is_what_the_context_tower_writes() -> None:
    ids, size = ids_of(1, 2, 24), 8
    targets = GreedySteps(Passes(model(), size, torch.float32, compiled=False)).targets(ids)
    assert targets.shape == (2, 3, size) and torch.equal(targets[:, 0], ids[:, :size])
    for row in range(2):
        for block in (1, 2):
            prompt = ids[row : row + 1, : block * size]
            (wanted,) = generate(model(), prompt, mode="ar", max_new_tokens=size).new_tokens
            assert torch.equal(targets[row, block], wanted)


def test_blocks_are_shown_as_generation_shows_them() -> None:
    targets = torch.arange(4, 20).expand(40, 100, 16)
    noisy, t = corrupted(targets, torch.Generator().manual_seed(0))
    masked = noisy == MASK
    assert torch.equal(noisy[~masked], targets[~masked]) and torch.equal(t, masked.float().mean(-1))
    beginning = (masked.long().diff(dim=-1) >= 0).all(-1)  # a known beginning, then masks alone
    known = (~masked).sum(-1)
    shares = [float(((known == count) & beginning).float().mean()) for count in (0, 1)]
    assert shares == pytest.approx(SHARES[:2], abs=0.03)
    assert 0 < float((~beginning).float().mean()) < SHARES[3]


def test_a_schedule_by_the_clock_is_repeated_by_its_notes() -> None:
    clock, spent = Schedule(minutes=1.0), [2.9 * step for step in range(40)]
    levels = []
    for step, seconds in enumerate(spent):
        levels.append(clock.level(step, seconds))
        if levels[-1] == LEVELS:
            break
    assert levels[0] == levels[12] == 0 and levels[13] > 0 and levels[-1] == LEVELS, "the last 40 % of 60 seconds"
    notes = Schedule(minutes=None, falls=clock.falls)
    assert [notes.level(step, 0.0) for step in range(len(levels))] == levels
    assert clock.factor(0, 0) == 1 / 100 and clock.factor(500, 25) == 0.5 and clock.factor(500, LEVELS) == 0


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """To the bit: weights, the optimizers' memory, and the notes."""

    def trained(folder: Path, *ends: int) -> tuple[TwoTower, dict]:
        folder.mkdir()
        for end in ends:
            torch.manual_seed(0)
            found = TwoTower(TwoTowerConfig.from_dict(SMALL))
            initialise(found, torch.Generator().manual_seed(0))
            passes = Passes(found, 8, torch.float32, compiled=False)

            def loss(step: int, passes: Passes = passes) -> Tensor:
                ids, head = ids_of(step % 2, 1, 16), passes.model.context_lm_head.weight
                hidden = passes.context(ids)[0][:, :-1]
                return passes.losses(hidden.flatten(0, 1), head, ids[0, 1:], torch.float32).mean()

            def validate(loss: Callable[[int], Tensor] = loss) -> float:
                return float(loss(0).detach())

            first = validate()
            schedule = Schedule(None, warmup=2, falls=[end] * LEVELS)
            stage = Stage("ar", ("context_",), 1e-2, schedule, loss, validate, lambda: None)
            facts = run(found, stage, folder)
        return found, facts | {"first": first}

    (once, facts), (twice, again) = trained(tmp_path / "once", 12), trained(tmp_path / "twice", 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert facts["steps"] == again["steps"] == 12 and facts["train"] == again["train"]
    torch.manual_seed(0)
    start = TwoTower(TwoTowerConfig.from_dict(SMALL))
    initialise(start, torch.Generator().manual_seed(0))
    moved = {name for name, p in once.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved and all(name.startswith("context_") for name in moved)
    (_, last), (_, same) = facts["validation"][-1], again["validation"][-1]
    assert last == same < 0.8 * facts["first"]


def test_targets_are_kept_for_a_resumed_run(tmp_path: Path) -> None:
    stream = ids_of(2, 1, 3 * BATCH * LENGTH)[0]
    passes = Passes(model(), 16, torch.float32, compiled=False)
    written = Targets(passes, stream, tmp_path, seed=0)
    torch.save(dict(targets=written.first(BATCH)), written.path)
    resumed = Targets(passes, stream, tmp_path, seed=0)
    assert torch.equal(resumed.first(BATCH), written.first(BATCH))
    ids = resumed.texts(torch.arange(BATCH))
    assert torch.equal(GreedySteps(passes).targets(ids), resumed.first(BATCH).long())


def test_what_is_held_out_is_listed() -> None:
    """Whole folders, by the hash of their names. The library's files change with Python's minor releases."""
    listed = json.loads((ROOT / "twotower_kernels" / "demo" / "held_out.json").read_text(encoding="utf-8"))
    found = demo_data.corpus()
    assert listed["transformers"] == found.held_out_paths()["transformers"]
    assert all(demo_data.is_held_out(path.split("/")[0].removesuffix(".py")) for path in listed["stdlib"])
    assert not set(found.train) & set(found.held_out)
    folders = {path.rpartition("/")[0] for source, path in found.train if source == "transformers"}
    assert not folders & {path.rpartition("/")[0] for path in listed["transformers"]}

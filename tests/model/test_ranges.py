"""What a profiler sees of the model: towers, layers and operations by name; and that nobody else pays for it."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from twotower_kernels.bench.checks.random_models import models, random_ids

PATTERN = "M*E-"
MIXERS = {"M": "Mamba2", "*": "Attention", "E": "MoE", "-": "MLP"}
OPERATIONS = {
    "twotower::adaln_norm",
    "twotower::append_kv",
    "twotower::block_attention",
    "twotower::gated_residual_adaln_norm",
    "twotower::gated_rms_norm",
    "twotower::mamba2_scan",
    "twotower::moe_experts",
}


def test_a_profile_names_towers_layers_and_operations() -> None:
    model = models(PATTERN, torch.float32).ours
    state = model.prefill(random_ids(2, 5))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.denoise(random_ids(2, 4), state, 0.5)
        model.commit(random_ids(2, 4), state)
    seen = Counter(event.name for event in profiler.events())
    for tower in ("context_tower", "denoiser_tower"):
        assert seen[tower] == 1
        for i, letter in enumerate(PATTERN):
            assert seen[f"{tower}.layers.{i}.mixer {MIXERS[letter]}"] == 1
    assert seen.keys() >= OPERATIONS


def test_operations_lie_in_their_layers_range() -> None:
    model = models(PATTERN, torch.float32).ours
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.forward_ar(random_ids(1, 3))
    (scan,) = [event for event in profiler.events() if event.name == "twotower::mamba2_scan"]
    around = set()
    while scan := scan.cpu_parent:
        around.add(scan.name)
    assert {"context_tower", "context_tower.layers.0.mixer Mamba2"} <= around


def test_nobody_else_opens_a_range() -> None:
    model = models(PATTERN, torch.float32).ours
    with patch.object(torch.profiler, "record_function", side_effect=AssertionError):
        model.forward_ar(random_ids(1, 3))
        with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError):
            model.forward_ar(random_ids(1, 3))

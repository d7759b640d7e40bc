"""Ten thousand steps leave nothing behind."""

import gc
from pathlib import Path

import torch

import twotower_kernels as tt
from twotower_kernels.bench.checks.random_models import models


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_ten_thousand_denoiser_steps_leave_nothing() -> None:
    model = models("M*E-", torch.float32).ours
    state = model.prefill(torch.tensor([[1, 5, 6, 7]]))
    block = torch.full((1, 4), 3)

    def steps(count: int) -> int:
        for i in range(count):
            logits = model.denoise(block, state, t=1.0)
            tt.remask(logits, block, mask_token_id=3, step=i, num_steps=count, temperature=1.0, seed=i)
        gc.collect()
        return resident()

    before = steps(2000)
    assert steps(10_000) - before < 1 << 20

"""The package's model and the specification's, with the same random weights, both against float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.bench.checks.random_models import Models, random_ids
from twotower_kernels.testing.budget import assert_within_budget


def results(model: Any, wide: bool, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Every public product on a ragged batch, for a model on this device; states as far as they are filled."""
    ids, block = random_ids(3, 9, seed=seed).to(device), random_ids(3, 6, seed=seed + 1).to(device)
    lengths = torch.tensor([9, 1, 4], device=device)
    t = torch.tensor([0.0, 0.6875, 1.0], dtype=torch.float64 if wide else torch.float32, device=device)
    state = model.prefill(ids, lengths)
    found = {"forward_ar": model.forward_ar(ids), "prefill": state.logits, "last": state.last_hidden}
    found |= {"denoise": model.denoise(block, state, t), "without time": model.denoise(block, state)}
    state = model.commit(block, state, torch.tensor([6, 0, 5], device=device))
    found |= {"commit": state.logits, "denoise again": model.denoise(block, state, t)}
    for i, k in state.k.items():
        for b, length in enumerate(state.lengths.tolist()):
            found |= {f"k.{i}.{b}": k[b, :length], f"v.{i}.{b}": state.v[i][b, :length]}
    found |= {f"conv.{i}": conv for i, conv in state.conv.items()}
    found |= {f"ssm.{i}": ssm for i, ssm in state.ssm.items()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def shares(got: Tensor, naive: Tensor, exact: Tensor) -> list[float]:
    """The errors in 2-norm and at the worst entry, over what `assert_within_budget` allows by default."""
    if not exact.numel():
        return [0.0, 0.0]
    eps, sizes = torch.finfo(got.dtype).eps, (torch.linalg.vector_norm, lambda x: x.abs().max())
    return [
        float(size(got.double() - exact) / (2 * size(naive.double() - exact) + 2 * eps * size(exact))) for size in sizes
    ]


def assert_agreement(m: Models, batches: int = 8, device: str = "cpu") -> None:
    """Our model, on this device, and the specification's in the same dtype, both against that in float64: within the
    budget on the geometric mean over so many batches, and within four times the factor on each.

    The worst entry of one batch is luck, in both programs: a token that a norm divides by little magnifies the rounding
    errors before it, whichever they happen to be. Over 60 batches the two programs err alike in the mean,
    but on one batch the logarithm of the ratio of their worst entries scatters by 0.3 to 0.5, so that one product in
    fifty leaves a budget of twice the naive error; and pooling entries keeps the one worst token.
    """
    ratios: dict[tuple[str, int], list[float]] = {}
    for seed in range(0, 2 * batches, 2):
        got = results(m.ours, False, seed, device)
        plain, truth = results(m.naive, False, seed), results(m.exact, True, seed)
        assert got.keys() == plain.keys() == truth.keys()
        for key in truth:
            assert_within_budget(got[key], plain[key], truth[key], factor=8, what=f"{key}, seed {seed}")
            for n, ratio in enumerate(shares(got[key], plain[key], truth[key])):
                ratios.setdefault((key, n), []).append(ratio)
    for where, found in ratios.items():
        assert math.prod(found) ** (1 / batches) <= 1, f"{where}: {found}"

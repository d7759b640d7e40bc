"""What a policy tells the denoiser, and what policies and `remask` refuse."""

import dataclasses
import math

import pytest
import torch

from twotower_kernels.reference.remask import remask
from twotower_kernels.reference.remask_policy import RemaskPolicy

MASK = 3


def test_model_time():
    ranking, noising = RemaskPolicy.twotower(), RemaskPolicy.predict_and_noise(min_t=1e-3)
    n, step = torch.tensor([16, 4, 0]), torch.tensor([0, 1, 3])
    assert ranking.model_time(n, 16, step, 4).tolist() == [1.0, 0.25, 0.0]
    want = torch.tensor([1 - i * (1 - 1e-3) / 4 for i in (0, 1, 3)])
    torch.testing.assert_close(noising.model_time(n, 16, step, 4), want)
    assert RemaskPolicy.posterior().model_time(3, 16, 0, 4).item() == 1.0
    assert RemaskPolicy.posterior(long_grid=True).model_time(n, 16, 3, 4).tolist() == [0.0] * 3
    assert ranking.model_time(n, 16, 0, 4).dtype == torch.float32 and noising.model_time(n, 16, 0, 4).shape == (3,)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("score", "best", ValueError, "score must be one of 'confidence', 'margin', .*'leftmost', got 'best'"),
        ("gate", None, ValueError, "gate must be one of 'none', 'threshold', 'factor', 'entropy_sum', got None"),
        ("schedule", "cosine", ValueError, "schedule must be one of .*'posterior', got 'cosine'"),
        ("alpha", "log", ValueError, "alpha must be one of"),
        ("gate_bound", math.nan, ValueError, r"gate_bound must be a number in \[-inf, inf\], got nan"),
        ("run_threshold", math.nan, ValueError, "run_threshold must be"),
        ("gate_bound", "0.8", TypeError, "gate_bound must be a number, got '0.8'"),
        ("edit_threshold", True, TypeError, "edit_threshold must be a number or None, got True"),
        ("min_t", 0.7, ValueError, r"min_t must be a number in \[0, 0.5\], got 0.7"),
        ("min_commits", -1, ValueError, "min_commits must be 0 or larger, got -1"),
        ("sub_block", 2.0, TypeError, "sub_block must be an int, got 2.0"),
        ("strict", 1, TypeError, "strict must be True or False, got 1"),
        ("combine", "cap", ValueError, "combine='cap' needs a gate"),
        ("complete_threshold", 0.5, ValueError, "sub_block must be positive"),
    ],
)
def test_policies_refuse(field, value, error, message):
    with pytest.raises(error, match=message):
        RemaskPolicy(**{field: value})


def test_policies_refuse_combinations():
    with pytest.raises(ValueError, match="suppress_mask must be True"):
        dataclasses.replace(RemaskPolicy.posterior(), suppress_mask=False)
    with pytest.raises(ValueError, match="renoise judges every position anew"):
        dataclasses.replace(RemaskPolicy.diffusion_gemma(), edit_threshold=0.9)
    with pytest.raises(ValueError, match=r"strategy must be one of 'low_confidence_static', .*, got 'beam'"):
        RemaskPolicy.jetengine("beam")
    with pytest.raises(ValueError, match="algorithm must be one of 'maskgit', 'margin', 'entropy', 'origin', got 'x'"):
        RemaskPolicy.dream("x")
    assert hash(RemaskPolicy.twotower(0.8)) == hash(RemaskPolicy.twotower())


Z, X = torch.zeros(2, 3, 5), torch.full((2, 3), MASK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": Z[0]}, ValueError, r"logits must have shape \[B, S, V\] with V > 0, got \[3, 5\]"),
        ({"logits": Z.long()}, TypeError, "logits must be torch.float64 or .*, got torch.int64"),
        ({"logits": Z.clone().requires_grad_()}, ValueError, "logits require grad, but remask is not differentiable"),
        ({"tokens": X[:, :2]}, ValueError, r"tokens must have shape \[2, 3\], got \[2, 2\]"),
        ({"tokens": X.float()}, TypeError, "tokens must be torch.int64 or torch.int32, got torch.float32"),
        ({"tokens": X.to("meta")}, ValueError, "tokens must be on cpu like the logits, got meta"),
        ({"mask_token_id": 5}, ValueError, r"mask_token_id must be in \[0, 5\), got 5"),
        ({"mask_token_id": 1.0}, TypeError, "mask_token_id must be an int, got float"),
        ({"mask_token_id": None}, ValueError, "mask_token_id is None, which only a policy with renoise allows"),
        ({"policy": "twotower"}, TypeError, "policy must be a RemaskPolicy, got str"),
        ({"step": -1}, ValueError, "step must be in .*, got -1"),
        ({"step": 0.5}, TypeError, "step must be an integer or a tensor of them, got float"),
        ({"step": X[0]}, ValueError, r"step must be an integer or have shape \[2\], got \[3\]"),
        ({"num_steps": 0}, ValueError, "num_steps must be in .*, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be in .*, got nan"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature must be in .*, got -1.0"),
        ({"top_k": -2}, ValueError, "top_k must be in .*, got -2"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \[0.0, 1.0\], got 1.5"),
        ({"seed": 2**64}, ValueError, "seed must fit into 64 bits, got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, "seed must be an integer or a tensor of them, got float"),
        ({"offset": 2**32}, ValueError, "offset must be in .*, got 4294967296"),
        ({"gate_bound": math.nan}, ValueError, "gate_bound must not be NaN"),
        ({"initial_num_masked": 4}, ValueError, r"initial_num_masked must be in \[0, 3\], got 4"),
        ({"suppress_ids": [5]}, ValueError, r"suppress_ids must be in \[0, 4\], got 5"),
        ({"suppress_ids": torch.zeros(1)}, TypeError, "suppress_ids must hold integers, got torch.float32"),
        ({"confidence_suppress_ids": [[1]]}, TypeError, "confidence_suppress_ids must hold integers"),
        ({"editable": X}, TypeError, "editable must be torch.bool, got torch.int64"),
        ({"valid_lens": torch.tensor([1, 4])}, ValueError, r"valid_lens must be in \[0, 3\], got 4"),
        ({"valid_lens": [1, 2]}, TypeError, "valid_lens must be a tensor, got list"),
        ({"candidates": X + 2}, ValueError, r"candidates must be in \[-1, 4\], got 5"),
        ({"rank_noise": torch.ones(2, 3)}, ValueError, r"rank_noise must lie in \[0, 1\), got values outside"),
    ],
)  # fmt: skip
def test_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        remask(**{"logits": Z, "tokens": X, "mask_token_id": MASK, **change})

"""Every argument that `remask` refuses, in the words of the kernels' op. (What policies refuse: tests/options.)"""

import math

import pytest
import torch

from twotower_kernels.reference.remask import remask

MASK = 3


Z, X = torch.zeros(2, 3, 5), torch.full((2, 3), MASK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": Z[0]}, ValueError, r"logits: expected shape \[B, S, V\] with V > 0, got \[3, 5\]"),
        ({"logits": Z.long()}, TypeError, "logits: expected torch.float64 or .*, got torch.int64"),
        ({"logits": Z.clone().requires_grad_()}, ValueError, "logits: remask is not differentiable"),
        ({"tokens": X[:, :2]}, ValueError, r"tokens: expected shape \[2, 3\], got \[2, 2\]"),
        ({"tokens": X.float()}, TypeError, "tokens: expected torch.int64 or torch.int32, got torch.float32"),
        ({"tokens": X.to("meta")}, ValueError, "tokens: expected device cpu, got meta"),
        ({"mask_token_id": 5}, ValueError, r"mask_token_id: expected a token in \[0, 4\], got 5"),
        ({"mask_token_id": 1.0}, TypeError, "mask_token_id: expected an int, got float"),
        ({"mask_token_id": None}, ValueError, "mask_token_id: expected a token, .* got None"),
        ({"policy": "twotower"}, TypeError, "policy: expected a RemaskPolicy, got str"),
        ({"step": -1}, ValueError, "step: expected values in .*, got -1"),
        ({"step": 0.5}, TypeError, "step: expected an int or a tensor of them, got float"),
        ({"step": X[0]}, ValueError, r"step: expected an int or shape \[2\], got \[3\]"),
        ({"num_steps": 0}, ValueError, "num_steps: expected values in .*, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected values in .*, got nan"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected values in .*, got -1.0"),
        ({"top_k": -2}, ValueError, "top_k: expected values in .*, got -2"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected values in \[0, 1\], got 1.5"),
        ({"seed": 2**64}, ValueError, "seed: expected a number of 64 bits, got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, "seed: expected an int or a tensor of them, got float"),
        ({"offset": 2**32}, ValueError, "offset: expected values in .*, got 4294967296"),
        ({"gate_bound": math.nan}, ValueError, "gate_bound: expected a number, got nan"),
        ({"initial_num_masked": 4}, ValueError, r"initial_num_masked: expected values in \[0, 3\], got 4"),
        ({"suppress_ids": [5]}, ValueError, r"suppress_ids: expected values in \[0, 4\], got 5"),
        ({"suppress_ids": torch.zeros(1)}, TypeError, "suppress_ids: expected int64 or int32, got torch.float32"),
        ({"confidence_suppress_ids": [[1]]}, TypeError, "confidence_suppress_ids: expected a tensor or a sequence"),
        ({"editable": X}, TypeError, "editable: expected torch.bool, got torch.int64"),
        ({"valid_lens": torch.tensor([1, 4])}, ValueError, r"valid_lens: expected values in \[0, 3\], got 4"),
        ({"valid_lens": [1, 2]}, TypeError, "valid_lens: expected a tensor, got list"),
        ({"candidates": X + 2}, ValueError, r"candidates: expected values in \[-1, 4\], got 5"),
        ({"rank_noise": torch.ones(2, 3)}, ValueError, r"rank_noise: expected numbers in \[0, 1\), got others"),
    ],
)  # fmt: skip
def test_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        remask(**{"logits": Z, "tokens": X, "mask_token_id": MASK, **change})

"""Every argument that `remask` refuses, in the words of the kernels' op. (What policies refuse: tests/options.)"""

import math
from typing import Any

import pytest
import torch

from twotower_kernels.reference.remask import remask

MASK = 3


Z, X = torch.zeros(2, 3, 5), torch.full((2, 3), MASK)
ONE = {"logits": Z[0], "tokens": X[0]}
SHIFT = {"shift": 1, "shift_logits": Z[:, 0]}
# What both programs refuse, in the same words.
ROWS_AND_SHIFTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": Z[0, 0]}, ValueError, r"logits: expected shape \[B, S, V\] or \[N, V\] with V > 0, got \[5\]"),
    ({"logits": Z[0]}, ValueError, r"tokens: expected shape \[3\] as logits are \[N, V\], got \[2, 3\]"),
    (ONE | {"editable": X > 0}, ValueError, r"editable: expected shape \[3\] as logits are .*, got \[2, 3\]"),
    (ONE | SHIFT, ValueError, r"shift_logits: expected shape \[5\] as logits are \[N, V\], got \[2, 5\]"),
    ({"shift": 2}, ValueError, "shift: expected 0 or 1, got 2"),
    ({"noise": "row"}, ValueError, "noise: expected 'block' or 'sequence', got 'row'"),
    ({"shift": 0.5}, TypeError, "shift: expected 0 or 1, got float"),
    (SHIFT | {"shift": 0}, ValueError, "shift_logits: expected None with shift=0"),
    (SHIFT | {"shift_logits": Z[0]}, ValueError, r"shift_logits: expected shape \[2, 5\], got \[3, 5\]"),
    (SHIFT | {"shift_logits": Z[:, 0].bfloat16()}, TypeError, "shift_logits: expected torch.float32, got torch.bf"),
    (SHIFT | {"shift_logits": Z[:, 0].to("meta")}, ValueError, "shift_logits: expected device cpu, got meta"),
    (SHIFT | {"shift_logits": [0.0]}, TypeError, "shift_logits: expected a tensor, got list"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *ROWS_AND_SHIFTS,
        (SHIFT | {"shift_logits": Z[:, 0].clone().requires_grad_()}, ValueError, "shift_logits: remask is not diff"),
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

"""Every argument that `tt.remask` refuses. (What policies refuse: tests/options.)"""

import math

import pytest
import torch

import twotower_kernels as tt
from tests.specification.test_remask_errors import ROWS_AND_SHIFTS
from twotower_kernels.testing.cases.remask import MASK

P = tt.RemaskPolicy
Z, X = torch.zeros(2, 3, 5), torch.full((2, 3), MASK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *ROWS_AND_SHIFTS,
        ({"logits": Z[..., :0]}, ValueError, r"logits: expected shape .* got \[2, 3, 0\]"),
        ({"logits": Z.long()}, TypeError, "logits: expected float64.* got torch.int64"),
        ({"logits": [0.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"tokens": X[:, :2]}, ValueError, r"tokens: expected shape \[2, 3\], got \[2, 2\]"),
        ({"tokens": X.float()}, TypeError, "tokens: expected torch.int64 or torch.int32, got torch.float32"),
        ({"tokens": X.to("meta")}, ValueError, "tokens: expected device cpu, got meta"),
        ({"mask_token_id": 5}, ValueError, r"mask_token_id: expected a token in \[0, 4\], got 5"),
        ({"mask_token_id": 1.0}, TypeError, "mask_token_id: expected an int, got float"),
        ({"mask_token_id": None}, ValueError, "mask_token_id: expected a token, .* got None"),
        ({"policy": "twotower"}, TypeError, "policy: expected a RemaskPolicy, got str"),
        ({"step": -1}, ValueError, "step: expected an int in .*, got -1"),
        ({"step": 2**63}, ValueError, "step: expected a number of 64 bits"),
        ({"step": 0.5}, TypeError, "step: expected an int or a tensor of them, got float"),
        ({"step": True}, TypeError, "step: expected an int or a tensor of them, got bool"),
        ({"step": torch.tensor([0, -1])}, ValueError, "step: expected values in .*, got -1"),
        ({"step": torch.tensor([0.0, 1.0])}, TypeError, "step: expected an int or a tensor of them, got torch.float32"),
        ({"step": X[0]}, ValueError, r"step: expected an int or shape \[2\], got \[3\]"),
        ({"step": X[:, 0].to("meta")}, ValueError, "step: expected device cpu, got meta"),
        ({"num_steps": 0}, ValueError, "num_steps: expected an int in .*, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a number in .*, got nan"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected values in .*, got -1.0"),
        ({"top_k": -2}, ValueError, "top_k: expected an int in .*, got -2"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0, 1\], got 1.5"),
        ({"top_p": torch.tensor([0.5, math.nan])}, ValueError, r"top_p: expected values in \[0, 1\], got nan"),
        ({"seed": 2**64}, ValueError, "seed: expected a number of 64 bits, got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, "seed: expected an int or a tensor of them, got float"),
        ({"offset": 2**32}, ValueError, "offset: expected an int in .*, got 4294967296"),
        ({"gate_bound": math.nan}, ValueError, "gate_bound: expected a number in .*, got nan"),
        ({"gate_bound": torch.tensor([0.5, math.nan])}, ValueError, "gate_bound: expected values in .*, got nan"),
        ({"initial_num_masked": 4}, ValueError, r"initial_num_masked: expected an int in \[0, 3\], got 4"),
        ({"initial_num_masked": torch.tensor([1, 4])}, ValueError, "initial_num_masked: expected values in .*, got 4"),
        ({"suppress_ids": [5]}, ValueError, r"suppress_ids: expected token numbers in \[0, 4\], got 5"),
        ({"suppress_ids": torch.tensor([5])}, ValueError, r"suppress_ids: expected values in \[0, 4\], got 5"),
        ({"suppress_ids": torch.zeros(1)}, TypeError, "suppress_ids: expected int64 or int32, got torch.float32"),
        ({"suppress_ids": X}, ValueError, r"suppress_ids: expected one dimension, got shape \[2, 3\]"),
        ({"confidence_suppress_ids": [[1]]}, TypeError, "confidence_suppress_ids: expected a tensor or a sequence"),
        ({"editable": X}, TypeError, "editable: expected torch.bool, got torch.int64"),
        ({"valid_lens": torch.tensor([1, 4])}, ValueError, r"valid_lens: expected values in \[0, 3\], got 4"),
        ({"valid_lens": [1, 2]}, TypeError, "valid_lens: expected a tensor, got list"),
        ({"candidates": X + 2}, ValueError, r"candidates: expected values in \[-1, 4\], got 5"),
        ({"rank_noise": torch.ones(2, 3)}, ValueError, r"rank_noise: expected numbers in \[0, 1\), got others"),
    ],
)  # fmt: skip
def test_arguments_are_refused(change, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        tt.remask(**{"logits": Z, "tokens": X, "mask_token_id": MASK, **change})


def test_the_op_has_no_gradient() -> None:
    logits = Z.clone().requires_grad_()
    with torch.no_grad():
        assert tt.remask(logits, X, mask_token_id=MASK).done.all()
    numbers = [0, 1, 0, 0, 0, -1], [0.0, 1.0, 0.0]
    result = torch.ops.twotower.remask(
        logits, X, MASK, *P().encoded(), *numbers, *[None] * 9, [], None, [], *[None] * 5, 0, None
    )
    with pytest.raises(NotImplementedError, match="twotower::remask is not differentiable"):
        result[3].sum().backward()

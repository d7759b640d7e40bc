"""The package's policies beside the specification's, and every argument that `tt.remask` refuses."""

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.kernels.remask_cases import MASK, policies
from twotower_kernels.reference.remask_policy import RemaskPolicy

P = tt.RemaskPolicy
PRESETS = [name for name in vars(RemaskPolicy) if inspect.ismethod(getattr(RemaskPolicy, name))]
VARIED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("twotower", (0.5,), {}),
    ("llada", ("margin",), {}),
    ("threshold", (0.7,), {"strict": True, "score": "neg_entropy"}),
    ("sdar", (0.6,), {"greedy": True}),
    *(
        ("jetengine", (name, 0.4), {"greedy": greedy})
        for name in ("low_confidence_static", "low_confidence_dynamic", "sequential", "random", "entropy_bounded")
        for greedy in (False, True)
    ),
    ("lmdeploy_static", (), {"sequential": True}),
    ("llada2", (0.9,), {"min_commits": 2, "edit_threshold": 0.8, "remask_threshold": 0.2}),
    ("fast_dllm_factor", (0.5,), {"last_free": False}),
    ("fast_dllm_dream", (0.5,), {}),
    ("dllm", ("sine", "random"), {}),
    ("dinfer", (0.8,), {}),
    ("dinfer_hierarchy", (0.3, None), {"remask_threshold": 0.1}),
    ("entropy_bound", (0.2,), {}),
    ("diffusion_gemma", (0.2,), {"t_min": None, "finish": False}),
    *(("dream", (name,), {"eps": 0.01}) for name in ("maskgit", "margin", "entropy", "origin")),
    ("leftmost", (0.5,), {}),
    ("predict_and_noise", ("random", "cosine"), {"min_t": 0.1, "threshold": 0.5, "adaptive": True, "finish": False}),
    ("posterior", ("cosine_floor",), {"long_grid": True}),
    ("posterior", (), {"min_t": 1e-3}),
    ("wedlm", (None,), {"position_penalty": 0.1}),
    ("wedlm_hf", (0.0,), {}),
    ("diffulex", (0.8,), {"block_size": 4, "score": "margin", "complete_threshold": 0.9}),
]


def test_fields_and_presets_are_those_of_the_specification() -> None:
    def fields(policy: type) -> list[Any]:
        return [(f.name, f.default) for f in dataclasses.fields(policy)]

    assert fields(P) == fields(RemaskPolicy)
    assert [name for name in vars(P) if inspect.ismethod(getattr(P, name))] == PRESETS
    for name in PRESETS:
        assert inspect.signature(getattr(P, name)).parameters.keys() == (
            inspect.signature(getattr(RemaskPolicy, name)).parameters.keys()
        )
    for name, arguments, options in [(name, (), {}) for name in PRESETS] + VARIED:
        ours, theirs = (getattr(policy, name)(*arguments, **options) for policy in (P, RemaskPolicy))
        assert dataclasses.asdict(ours) == dataclasses.asdict(theirs), name


@given(
    policy=policies(),
    step=st.integers(0, 9),
    steps=st.integers(1, 8),
    masked=st.integers(0, 12),
    block=st.integers(0, 12),
)
def test_the_time_told_to_the_model(policy, step, steps, masked, block):  # type: ignore[no-untyped-def]
    ours = P(**dataclasses.asdict(policy))
    for numbers in (masked, torch.tensor([masked, 1])), (torch.tensor(masked), step):
        got = ours.model_time(numbers[0], block, torch.as_tensor(step), steps)
        want = policy.model_time(numbers[0], block, torch.as_tensor(step), steps)
        assert got.dtype == torch.float32 and torch.equal(got, want)
    options, bounds = ours.encoded()
    assert all(isinstance(x, int) for x in options) and all(math.isfinite(x) for x in bounds)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("score", "best", ValueError, "score: expected one of 'confidence', 'margin', .*'leftmost', got 'best'"),
        ("gate", None, ValueError, "gate: expected one of 'none', 'threshold', 'factor', 'entropy_sum', got None"),
        ("gate_bound", math.nan, ValueError, r"gate_bound: expected a number in \[-inf, inf\], got nan"),
        ("gate_bound", "0.8", TypeError, "gate_bound: expected a number, got '0.8'"),
        ("edit_threshold", True, TypeError, "edit_threshold: expected a number or None, got True"),
        ("min_t", 0.7, ValueError, r"min_t: expected a number in \[0, 0.5\], got 0.7"),
        ("min_commits", -1, ValueError, "min_commits: expected 0 or larger, got -1"),
        ("sub_block", 2.0, TypeError, "sub_block: expected an int, got 2.0"),
        ("strict", 1, TypeError, "strict: expected True or False, got 1"),
        ("combine", "cap", ValueError, "combine: expected a gate with 'cap'"),
        ("complete_threshold", 0.5, ValueError, "sub_block: expected a positive length"),
    ],
)
def test_policies_refuse(field, value, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        P(**{field: value})


def test_policies_refuse_combinations() -> None:
    with pytest.raises(ValueError, match="suppress_mask: expected True with the posterior"):
        dataclasses.replace(P.posterior(), suppress_mask=False)
    with pytest.raises(ValueError, match="renoise: expected edit_threshold and remask_threshold None"):
        dataclasses.replace(P.diffusion_gemma(), edit_threshold=0.9)
    with pytest.raises(ValueError, match=r"strategy: expected one of 'low_confidence_static', .*, got 'beam'"):
        P.jetengine("beam")
    with pytest.raises(ValueError, match=r"algorithm: expected one of 'maskgit', .*'origin', got 'x'"):
        P.dream("x")
    assert hash(P.twotower(0.8)) == hash(P.twotower())


Z, X = torch.zeros(2, 3, 5), torch.full((2, 3), MASK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": Z[0]}, ValueError, r"logits: expected shape \[B, S, V\] with V > 0, got \[3, 5\]"),
        ({"logits": Z[..., :0]}, ValueError, r"logits: expected shape .* got \[2, 3, 0\]"),
        ({"logits": Z.long()}, TypeError, "logits: expected float64.* got torch.int64"),
        ({"logits": [0.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"logits": Z.clone().requires_grad_()}, ValueError, "logits: remask is not differentiable"),
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
        logits, X, MASK, *P().encoded(), *numbers, *[None] * 9, [], None, [], *[None] * 5
    )
    with pytest.raises(NotImplementedError, match="twotower::remask is not differentiable"):
        result[3].sum().backward()

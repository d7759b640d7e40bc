"""Numbers as arguments: whatever is an integer or a number, for every op, and never a boolean."""

import importlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import as_tuple
from twotower_kernels.options import arguments
from twotower_kernels.reference import remask as specified_remask

WHOLE: list[Callable[[int], Any]] = [np.int8, np.uint8, np.int64, np.uint64, np.array, torch.tensor]
REAL: list[Callable[[float], Any]] = [np.float16, np.float32, np.float64, np.longdouble, np.array, torch.tensor]
BOOLEANS = [True, np.True_, np.array(True), torch.tensor(True)]

# Every number of an op, with a value that all kinds of numbers hold. Pairs are given as pairs.
NUMBERS: dict[str, dict[str, Any]] = {
    "rms_norm": {"eps": 0.5},
    "adaln_norm": {"eps": 0.5},
    "gated_residual_adaln_norm": {"eps": 0.5},
    "block_attention": {
        **{"context_lens": 4, "context_starts": 1, "block_lens": 3, "window": 2, "scale": 0.25, "softcap": 2.0},
    },
    "block_causal_attention": {"block_size": 3, "seq_lens": 5, "scale": 0.25, "softcap": 2.0},
    "context_attention": {
        **{"context_lens": 4, "context_starts": 1, "block_lens": 3, "window": 2, "scale": 0.25, "softcap": 2.0},
    },
    "append_kv": {"context_lens": 4, "block_lens": 3},
    "mamba2_scan": {"n_groups": 1, "head_dim": 1, "states_every": 1, "time_step_limit": (0.25, 0.5)},
    "gated_rms_norm": {"n_groups": 1, "eps": 0.5},
    "moe_route": {"top_k": 2, "n_group": 4, "topk_group": 2, "scaling": 2.5},
    "moe_plan": {"num_experts": 9},
    "remask": {
        **{"mask_token_id": 3, "step": 1, "num_steps": 5, "top_k": 9, "seed": 7, "offset": 2, "initial_num_masked": 6},
        **{"temperature": 0.75, "top_p": 0.5, "gate_bound": 0.25},
        **{"suppress_ids": (5, 9), "confidence_suppress_ids": (4, 6)},
    },
}
CASES = {"moe_route": dict(n=5, e=8, top_k=2), "moe_plan": dict(n=5, e=9, top_k=2)}


def inputs_of(op: str) -> dict[str, Any]:
    stems = ("adaln", "attention", "mamba2", "moe", "remask")
    modules = [importlib.import_module(f"twotower_kernels.reference.{stem}") for stem in stems]
    cases = {module: module.CASES | getattr(module, "COMPOSED", {}) for module in modules}
    module = next(module for module in modules if op in cases[module])
    case = CASES.get(op, "tiny" if "tiny" in cases[module][op] else next(iter(cases[module][op])))
    return module.make_inputs(op, case) | NUMBERS[op]


def results(op: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    given = {name: x.clone() if isinstance(x, Tensor) and x.ndim else x for name, x in inputs.items()}
    result = getattr(tt, op)(**given)
    return (given["k_context"], given["v_context"]) if op == "append_kv" else as_tuple(result)


def kinds_of(value: Any) -> list[Any]:
    """The value as every kind of number."""
    some = value[0] if isinstance(value, tuple) else value
    kinds = (WHOLE if isinstance(some, int) else REAL) + ([] if isinstance(some, int) else [Fraction])
    return [tuple(map(kind, value)) if isinstance(value, tuple) else kind(value) for kind in kinds]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in NUMBERS for name in NUMBERS[op]])
def test_every_number_of_every_op_may_be_of_any_kind(op: str, name: str) -> None:
    inputs = inputs_of(op)
    want = results(op, inputs)
    for value in kinds_of(inputs[name]):
        got = results(op, inputs | {name: value})
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True)), repr(value)
    for flag in BOOLEANS:
        pair = isinstance(inputs[name], tuple)
        if isinstance(flag, Tensor) and name in ("context_lens", "block_lens", *tt.ops.remask_checks.PER_ROW):
            continue  # these take tensors, whose dtype is another matter
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            results(op, inputs | {name: (flag, flag) if pair else flag})


@pytest.mark.parametrize("seed", [2**63 + 5, 2**64 - 1, -(2**63), 7])
def test_seeds_are_exact(seed: int) -> None:
    """64 bits, signed or not, of Python or NumPy: the same noise; and the same keys of sequences."""
    kind = np.uint64 if seed > 0 else np.int64
    bits = seed - 2**64 if seed >= 2**63 else seed
    logits, tokens = torch.zeros(1, 4, 50), torch.full((1, 4), 3)
    for program in (tt.remask, specified_remask.remask):
        given = [program(logits, tokens, mask_token_id=3, temperature=1.0, seed=s) for s in (seed, kind(seed), bits)]
        assert all(torch.equal(each.candidate, given[0].candidate) for each in given)
    assert tt.sequence_seed(kind(seed), np.uint8(2)) == tt.sequence_seed(seed, 2) == tt.sequence_seed(bits, 2)


def test_fields_of_policies_may_be_of_any_kind() -> None:
    policy: Any = tt.RemaskPolicy
    plain = {"min_commits": 2, "sub_block": 4, "gate": "threshold", "gate_bound": 0.5, "edit_threshold": 0.75}
    for i in range(len(WHOLE)):
        kinds = {k: v if isinstance(v, str) else kinds_of(v)[i] for k, v in plain.items()}
        got = policy(**kinds)
        assert got == policy(**plain) and hash(got) == hash(policy(**plain))
        assert [type(getattr(got, name)) for name in plain] == [int, int, str, float, float]
        assert policy.twotower(WHOLE[i](1)) == policy.twotower(1.0)
    for flag in BOOLEANS:
        for name in ("min_commits", "gate_bound", "edit_threshold"):
            with pytest.raises(TypeError, match=name):
                policy(**{name: flag})


# --- what the ops, the model and the specification share --------------------------------------------------------------


@given(st.integers() | st.floats(allow_nan=False))
def test_numbers_keep_their_value(value: float) -> None:
    number = arguments.real("x", value)
    assert number == (math.copysign(math.inf, number) if abs(value) >= 2**1024 else float(value))
    if isinstance(value, int):
        assert arguments.whole("x", value) == value
    else:
        with pytest.raises(TypeError, match=r"^x: expected an integer, got float"):
            arguments.whole("x", value)


@pytest.mark.parametrize("value", [None, "7", [7], np.array([7]), torch.tensor([7]), 7j, np.complex64(7), object()])
def test_what_is_no_number(value: Any) -> None:
    for as_number in (arguments.whole, arguments.real):
        with pytest.raises(TypeError, match=r"^loudness: expected .*\bgot "):
            as_number("loudness", value)


def test_a_number_on_another_device_is_not_waited_for() -> None:
    for as_number in (arguments.whole, arguments.real):
        with pytest.raises(TypeError, match=r"x: expected .* got a tensor torch.int64 \[\] on meta"):
            as_number("x", torch.zeros((), dtype=torch.int64, device="meta"))


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_dtype_are_int64(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 2], [3, 100]]).to(dtype)
    array = tensor.numpy()
    for value in (tensor, array, array[::-1][::-1], array.astype(array.dtype.newbyteorder()), list(array)):
        got = arguments.integers("x", value)
        assert got.dtype == torch.int64 and got.tolist() == [[1, 2], [3, 100]]
    assert arguments.integers("x", list(array[1])).tolist() == [3, 100]
    assert arguments.integers("x", [tensor[1, 0], 5]).tolist() == [3, 5]


def test_what_is_no_integers() -> None:
    for value, dtype in (([0.5], torch.float32), (np.zeros(2, np.float16), torch.float16), ([True], torch.bool)):
        assert arguments.integers("x", value).dtype == dtype
    assert arguments.integers("x", []).dtype == torch.int64
    for big in ([2**63], [2**70], np.array([2**63], np.uint64), torch.tensor([2**63 + 5], dtype=torch.uint64)):
        with pytest.raises(ValueError, match=r"x: expected integers below 2\^63, got .*(92233|118059)"):
            arguments.integers("x", big)
    with pytest.raises(ValueError, match="x: expected rows of one length"):
        arguments.integers("x", [[1], [2, 3]])
    for wrong in (["a"], "a", [None], object()):
        with pytest.raises(TypeError, match="x: expected integers, got"):
            arguments.integers("x", wrong)

"""Operators that are called themselves, past the public functions: what does not fit is refused, not computed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernels.direct_calls import operators, recorded
from tests.paths import ROOT
from twotower_kernels import cpu
from twotower_kernels.ops import _library
from twotower_kernels.testing.layouts import awkward

OPS = torch.ops.twotower
PROGRAM = [sys.executable, "-X", "faulthandler", "-m", "tests.kernels.direct_calls"]


@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_damaged_calls_are_survived(seed: int) -> None:
    """Every operator of the dispatcher: a call ends with a result, or with one of the errors that are promised."""
    environment, limit = dict(os.environ), [str(1 << 30)]
    if "KERNEL_LIBRARY" in environment:  # a sanitizer reserves more than that, but has a limit of its own
        options = environment.get("ASAN_OPTIONS", ""), "allocator_may_return_null=1:max_allocation_size_mb=1024"
        environment["ASAN_OPTIONS"], limit = ":".join(options), []
    program = [*PROGRAM, str(seed), "300", *limit]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = {name: (int(good), int(bad)) for name, good, bad in map(str.split, done.stdout.splitlines())}
    assert counts.keys() == operators()
    assert all(good >= 20 and bad >= 20 for good, bad in counts.values()), counts


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


RELU2: list[Any] = ["relu2", 1.702, 7.0]
ROUTE: list[Any] = [False, 1, 1, True, 1.0, False]
Q, KV = zeros(1, 2, 2, 4), zeros(1, 8, 2, 4)
SCAN: list[Any] = [zeros(1, 2, 8), zeros(1, 2, 2), zeros(8, 4), None, *[zeros(2)] * 3]
SCAN_OPTIONS: list[Any] = [0.0, 1.0, False, 0]
REMASK: list[Any] = [zeros(1, 2, 5), whole(1, 2), 0]
POLICY: list[Any] = [
    [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0] + [0] * 6,
    [0.0] * 11,
]
NUMBERS: list[Any] = [[0, 1, 0, 0, 0, -1], [0.0, 1.0, 0.0]]
NOTHING: list[Any] = [*[None] * 9, [], None, [], *[None] * 5, 0, None]

# Op, arguments, error, message.
WRONG: list[tuple[str, list[Any], type[Exception], str]] = [
    (
        "rms_norm",
        [zeros(2, 3), zeros(4), 1e-5, False],
        ValueError,
        r"weight: expected \[H\] for x \[..., H\], got \[4\] for",
    ),
    ("rms_norm", [zeros(2, 3), zeros(3).long(), 1e-5, False], TypeError, "weight: expected float64"),
    ("adaln_norm", [zeros(1, 2, 3), zeros(4), None, None, 1e-5, False], ValueError, r"weight: expected shape \[3\]"),
    ("adaln_norm", [zeros(1, 2, 3), zeros(3), zeros(1, 3), None, 1e-5, False], ValueError, "expected both or neither"),
    ("gated_residual", [zeros(1, 2, 3), zeros(1, 2, 3), zeros(1, 2)], ValueError, r"gate: expected shape \[1, 3\]"),
    (
        "gated_residual_adaln_norm",
        [zeros(1, 2, 3).bfloat16(), zeros(1, 2, 3), None, zeros(3), None, None, 1e-5, False],
        TypeError,
        "y: expected torch.bfloat16 as residual, or a narrower dtype",
    ),
    ("linear", [zeros(2, 3), zeros(400, 3), zeros(1)], ValueError, r"bias: expected \[400\], got \[1\]"),
    ("linear", [zeros(2, 3), zeros(4), None], ValueError, r"weight: expected \[R, 3\]"),
    ("linear", [zeros(2, 3), zeros(4, 3).half(), None], TypeError, "weight: expected torch.float32 as x"),
    ("linear", [whole(2, 3), whole(4, 3), None], TypeError, "x: expected float64, float32"),
    ("gated_rms_norm", [*[zeros(1, 2, 4)] * 2, zeros(4), 0, 1e-5], ValueError, "n_groups: expected a divisor of 4"),
    ("gated_rms_norm", [*[zeros(2, 4)] * 2, zeros(4), 1, 1e-5], ValueError, r"y: expected \[B, L, D\]"),
    ("mamba2_scan", [*SCAN, 0, 2, *[None] * 4, *SCAN_OPTIONS], ValueError, "n_groups: expected 1 or more"),
    ("mamba2_scan", [*SCAN, 1, 2, zeros(1, 8, 9), *[None] * 3, *SCAN_OPTIONS], ValueError, "conv_state: expected"),
    ("mamba2_scan", [*SCAN, 1, 2, None, None, whole(3), None, *SCAN_OPTIONS], ValueError, "state_index: expected"),
    ("mamba2_scan", [*SCAN, 1, 2, *[None] * 4, 0.0, 1.0, False, -1], ValueError, "states_every: expected 0 or more"),
    ("moe_gate", [zeros(2, 3), zeros(4, 400)], ValueError, r"gate_weight: expected \[E, 3\], got \[4, 400\]"),
    ("moe_route", [zeros(2, 4), None, None, 400, *ROUTE], ValueError, r"top_k: expected 1\.\.4 for 4 experts, got 400"),
    ("moe_route", [zeros(2, 4000), zeros(1), None, 2, *ROUTE], ValueError, r"correction_bias: expected shape \[4000\]"),
    (
        "moe_route",
        [zeros(2, 4), None, None, 2, False, 0, 1, True, 1.0, False],
        ValueError,
        "n_group: expected a divisor of 4",
    ),
    ("moe_route", [zeros(2, 4), None, zeros(3), 2, *ROUTE], ValueError, r"per_expert_scale: expected shape \[4\]"),
    (
        "moe_route",
        [zeros(2, 4), None, None, 3, False, 2, 1, True, 1.0, True],
        ValueError,
        r"top_k: expected 1\.\.2, the",
    ),
    ("moe_router", [zeros(2, 3), zeros(4, 3), None, None, 5, *ROUTE], ValueError, r"top_k: expected 1\.\.4"),
    ("moe_plan", [whole(2, 2), -1], ValueError, "num_experts: expected 0 or more, got -1"),
    ("moe_plan", [zeros(2, 2), 4], TypeError, "experts: expected int32 or int64, got torch.float32"),
    (
        "moe_experts",
        [zeros(2, 3), zeros(4, 5, 3), zeros(4, 3, 6), zeros(2, 1), whole(2, 1), *[None] * 7, *RELU2],
        ValueError,
        r"w_up: expected \[4, 6, 3\]",
    ),
    (
        "moe_experts",
        [zeros(2, 3), zeros(4, 5, 3), zeros(4, 3, 5), zeros(2, 1), whole(2, 1), whole(4), *[None] * 6, *RELU2],
        ValueError,
        "plan.offsets: expected all three tensors of a plan or none",
    ),
    (
        "moe_experts",
        [zeros(2, 3), zeros(4, 5, 3), zeros(4, 3, 5), zeros(2, 1), whole(2, 1), *[None] * 7, "swish", 1.0, 1.0],
        ValueError,
        "activation: expected one of",
    ),
    ("block_attention", [Q, Q, zeros(1, 2, 1, 4), *[None] * 8, 0, None, None, 0.0], ValueError, "k, v: expected"),
    ("block_attention", [Q, Q, Q, *[None] * 6, whole(3), None, 0, None, None, 0.0], ValueError, "block_lens: expected"),
    ("block_attention", [Q, Q, Q, *[None] * 8, 0, -1, None, 0.0], ValueError, "window: expected None or"),
    ("block_attention", [Q, Q, Q, *[None] * 8, -1, None, None, 0.0], ValueError, "causal: expected 0 or more"),
    ("block_attention", [Q, Q, Q, *[None] * 7, zeros(3), 0, None, None, 0.0], ValueError, r"sinks: expected \[2\]"),
    (
        "block_attention_out",
        [Q, Q, Q, *[None] * 8, 0, None, None, 0.0, zeros(1, 2, 2, 4), zeros(1, 2, 1)],
        ValueError,
        r"lse: expected \[1, 2, 2\] torch.float32",
    ),
    (
        "context_attention",
        [Q, KV, KV, whole(1), None, whole(1), whole(8), None, None, 0, None, None, 0.0],
        ValueError,
        "block_table: exp",
    ),
    (
        "context_attention_out",
        [Q, KV, KV, *[None] * 6, 0, None, None, 0.0, zeros(1, 2, 2, 5), zeros(1, 2, 2)],
        ValueError,
        r"out: expected \[1, 2, 2, 4\]",
    ),
    (
        "attention_backward",
        [zeros(1, 2, 2, 3), zeros(1, 2, 2), Q, Q, Q, *[None] * 8, 0, None, None, 0.0],
        ValueError,
        r"grad_out: expected shape \[1, 2, 2, 4\]",
    ),
    (
        "attention_backward",
        [Q, zeros(1, 2, 2), Q, *[None] * 10, 0, None, None, 0.0],
        ValueError,
        "expected a context where there are no k and v",
    ),
    ("merge_attention", [Q, zeros(1, 2, 2), zeros(1, 2, 2, 3), zeros(1, 2, 2)], ValueError, "out_b: expected"),
    (
        "quantized_linear",
        [zeros(2, 32), zeros(3, 32).byte(), zeros(3, 2).byte(), None, "mxfp4", None],
        ValueError,
        r"weight: expected \[R, 32\] for x \[2, 32\], got \[3, 64\]",
    ),
    (
        "quantized_linear",
        [zeros(2, 32), zeros(3, 16).byte(), zeros(3, 3).byte(), None, "mxfp4", None],
        ValueError,
        r"scales: expected \[3\] and groups of 32 or",
    ),
    (
        "quantized_linear",
        [zeros(2, 32), zeros(3, 16), zeros(3, 1).byte(), None, "mxfp4", None],
        TypeError,
        r"data: expected torch\.uint8",
    ),
    (
        "quantized_experts",
        [
            *(zeros(1, 32), zeros(2, 3, 32), None, None, zeros(2, 32, 3), None, None, zeros(1, 1), whole(1, 1)),
            *(None, None, None, zeros(32, 16).byte(), None, None, zeros(32, 16).byte(), None, None, None, None),
            *("", "mxfp4", "relu2", 1.0, 1.0),
        ],
        TypeError,
        "shared_up: expected scales for mxfp4, got None",
    ),
    ("append_kv", [KV, KV + 0, zeros(1, 2, 2, 400), Q, whole(1), *[None] * 3], ValueError, "k_context, v_context: ex"),
    ("append_kv", [KV, KV + 0, Q, Q, whole(2), *[None] * 3], ValueError, r"context_lens: expected a scalar or \[1\]"),
    ("append_kv", [KV, KV + 0, Q, Q, None, *[None] * 3], TypeError, "context_lens: expected a tensor, got None"),
    ("remask", [zeros(1, 2, 5), whole(1, 3), 0, *POLICY, *NUMBERS, *NOTHING], ValueError, "tokens: expected shape"),
    ("remask", [*REMASK[:2], None, *POLICY, *NUMBERS, *NOTHING], ValueError, "mask_token_id: expected a token"),
    ("remask", [*REMASK, POLICY[0][:-1], POLICY[1], *NUMBERS, *NOTHING], ValueError, "options: expected 32 numbers"),
    ("remask", [*REMASK, [9] * 32, POLICY[1], *NUMBERS, *NOTHING], ValueError, r"options: expected suppress_mask in"),
    ("remask", [*REMASK, *POLICY, [0, 0, 0, 0, 0, -1], NUMBERS[1], *NOTHING], ValueError, "num_steps: expected a num"),
    ("remask", [*REMASK, *POLICY, NUMBERS[0], [0.0], *NOTHING], ValueError, "real: expected 3 numbers"),
    ("remask", [*REMASK, *POLICY, *NUMBERS, *NOTHING[:9], [5], *NOTHING[10:]], ValueError, "suppress_ids: expected to"),
    ("remask", [*REMASK, *POLICY, *NUMBERS, zeros(1), *NOTHING[1:]], TypeError, "step: expected int64 or int32 dtype"),
]


def test_every_operator_has_a_wrong_call() -> None:
    assert {op for op, *_ in WRONG} == operators() == set(recorded())


@pytest.mark.parametrize(("op", "arguments", "error", "message"), WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_refused(op, arguments, error, message, device):  # type: ignore[no-untyped-def]
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(error, match=message):
        getattr(OPS, op)(*arguments)


@pytest.mark.parametrize(("op", "arguments", "error", "message"), [call for call in WRONG if call[0] in _library.CUDA])
def test_what_does_not_fit_is_not_launched(op, arguments, error, message):  # type: ignore[no-untyped-def]
    with mock.patch.object(_library.importlib, "import_module") as module, pytest.raises(error, match=message):
        _library.cuda_kernel.__wrapped__(op)(*arguments)  # not kept: the next test would call the mock
    assert not module.return_value.mock_calls


def test_a_launcher_is_found_once() -> None:
    with mock.patch.object(_library.importlib, "import_module", wraps=_library.importlib.import_module) as module:
        first = _library.cuda_kernel("moe_gate")
        assert _library.cuda_kernel("moe_gate") is first and module.call_count <= 1
    with (
        mock.patch.dict(_library.CUDA, {"moe_gate": "missing:f"}),
        mock.patch.object(_library.importlib, "import_module", side_effect=ModuleNotFoundError(name="triton")),
        pytest.raises(ImportError, match="twotower::moe_gate on a GPU needs triton: pip install triton"),
    ):
        _library.cuda_kernel.__wrapped__("moe_gate")


def told(tensor: Tensor, **changes: Any) -> tuple[Any, ...]:
    """A tensor as the bindings are told of it: pointer, dtype, sizes, strides."""
    fields = {"pointer": tensor.data_ptr(), "code": 1, "sizes": tuple(tensor.shape), "strides": tensor.stride()}
    return tuple((fields | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": 99}, "expected the code of a dtype, got 99"),
        ({"code": -1}, "expected the code of a dtype, got -1"),
        ({"sizes": (6,), "strides": (1,)}, "expected a tensor of rank 2, got 1"),
        ({"sizes": (2, -3)}, "expected sizes of 0 or more"),
        ({"pointer": 0}, "expected a tensor with memory"),
    ],
)
def test_the_bindings_refuse_what_is_no_tensor(changes: dict[str, Any], message: str) -> None:
    x, weight, out = zeros(2, 3), zeros(4, 3), zeros(2, 4)
    cpu.kernels().linear(told(x), told(weight), None, told(out))
    with pytest.raises(ValueError, match=message):
        cpu.kernels().linear(told(x, **changes), told(weight), None, told(out))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (zeros(2), ValueError, "expected a tensor of rank 2, got 1"),
        (zeros(2, 3).to(torch.complex64), ValueError, "expected a dtype that the kernels know, got torch.complex64"),
        (7, TypeError, "incompatible function arguments"),
        ("x", TypeError, "incompatible function arguments"),
        (None, TypeError, "incompatible function arguments"),
    ],
)
def test_the_bindings_refuse_a_wrong_tensor(wrong: Any, error: type[Exception], message: str) -> None:
    x, weight, out = zeros(2, 3), zeros(4, 3), zeros(2, 4)
    cpu.kernels().linear(x, weight, None, out)
    with pytest.raises(error, match=message):
        cpu.kernels().linear(x, wrong, None, out)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3), (2, 2, 3), (2, 1, 2, 3), (5, 0), (1, 2, 3, 4, 2, 3, 3)])
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_rows_of_any_rank_are_read(shape: tuple[int, ...], layout: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight, out = torch.arange(1.0, 1 + shape[-1]), torch.empty(shape)
    cpu.kernels().rms_norm(awkward(x, layout), weight, out, 1e-5, False)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="expected a tensor of rank 1 or more, got 0"):
        cpu.kernels().rms_norm(torch.tensor(1.0), weight, out, 1e-5, False)


def test_an_empty_tensor_of_strided_rows_is_read_as_it_lies() -> None:
    """PyTorch calls it contiguous, and makes no copy of it."""
    x, out = torch.empty_strided((0, 3), (1, 2)), zeros(0, 4)
    assert x.stride(1) != 1 and x.contiguous() is x
    cpu.kernels().linear(x, zeros(4, 3), None, out)
    cpu.kernels().moe_gate(x, zeros(4, 3), out.double())


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 3), (2, 2, 3), (2, 1, 3), (1, 2, 3), (2, 0, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_leading_dimensions_are_read_as_one(shape: tuple[int, ...], layout: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=draw), torch.randn(5, 3, generator=draw)
    out = torch.empty(*shape[:-1], 5)
    cpu.kernels().linear(awkward(x, layout), weight, None, out)
    torch.testing.assert_close(out, x @ weight.T)
    repeated = x[:1].expand(3, *shape[1:]) if len(shape) > 1 and shape[0] else x
    out = torch.empty(*repeated.shape[:-1], 5)
    cpu.kernels().linear(repeated, weight, None, out)
    torch.testing.assert_close(out, repeated @ weight.T)


@pytest.mark.parametrize("code", [-1, 8, 2**40])
def test_the_bindings_refuse_an_unknown_activation(code: int) -> None:
    x, up, down, weights = zeros(2, 3), zeros(1, 4, 3), zeros(1, 3, 4), zeros(2, 1)
    offsets, pairs = (told(t, code=4) for t in (torch.tensor([0, 2]), torch.arange(2)))
    results = map(told, (zeros(2, 3), zeros(2, 3)))
    tensors = [*map(told, (x, up, down, weights)), offsets, pairs, *[None] * 4, *results]
    with pytest.raises(ValueError, match=f"expected the code of an activation, got {code}"):
        cpu.kernels().moe_experts(*tensors, code, 1.0, 1.0)

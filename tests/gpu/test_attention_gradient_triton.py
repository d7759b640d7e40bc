"""Attention's gradients in Triton, in the interpreter, against those of the specification in float64."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import twotower_kernels as tt
from tests.gpu.triton_checks import DTYPES, triton_kernels
from tests.kernels.test_attention_kernel import ATTENDING, DIFFERENTIABLE
from twotower_kernels.reference import attention
from twotower_kernels.testing.budget import assert_within_budget, widened
from twotower_kernels.triton import attention_gradient as kernels
from twotower_kernels.triton.attention_tuning import Tuning


def gradients(op: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Of q, k, v and sinks, for a loss that looks at the result and its log-sum-exp."""
    inputs = dict(inputs)
    names = [name for name in ("q", "k", "v", "sinks") if name in inputs]
    leaves = [inputs.pop(name).nan_to_num(0.5).requires_grad_() for name in names]
    out, lse = op(**dict(zip(names, leaves, strict=True)), **inputs, return_lse=True)
    loss = out.to(lse.dtype).sin().sum() + lse.masked_fill(lse.isneginf(), 0).sin().sum()
    return list(torch.autograd.grad(loss, leaves))


def assert_gradients_agree(op: str, inputs: dict[str, Any]) -> None:
    naive, exact = (gradients(getattr(attention, op), x) for x in (inputs, widened(inputs)))
    with triton_kernels():
        got = gradients(getattr(tt, op), inputs)
    for n, three in enumerate(zip(got, naive, exact, strict=True)):
        assert_within_budget(*three, what=f"gradient {n}")


GRADIENTS = DIFFERENTIABLE | {
    "tiles": {"block": 9, "heads": 8, "head_dim": 17, "context": 70, "context_lens": [70, 33]},
    "causal_tiles": {"batch": 1, "block": 70, "causal": True, "block_lens": [61]},
    "transposed": {"transposed": True, "context": 4, "kv_heads": 2},
    "no_tokens": {"block": 0, "context": 4},
    "sliding_tiles": {"block": 9, "heads": 8, "context": 70, "context_lens": [70, 33], "context_starts": [40, 3],
                      "window": 30, "causal": True, "sinks": True},
}  # fmt: skip


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(op: str, case: str) -> None:
    sizes = {"block": 3, "heads": 2, "kv_heads": 1, "head_dim": 8} | GRADIENTS[case]
    if op == "context_attention":
        sizes = {"context": 4} | sizes
    for dtype in DTYPES if case in ("tiles", "softcap") else DTYPES[:1]:
        assert_gradients_agree(op, attention.make_inputs(op, sizes, dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_gradients_of_a_sequence_of_blocks(block_size: int) -> None:
    sizes = {"block": 40, "heads": 2, "kv_heads": 1, "head_dim": 8, "block_lens": [40, 23], "block_size": block_size}
    assert_gradients_agree("block_causal_attention", attention.make_inputs("block_causal_attention", sizes))


@pytest.mark.parametrize("dims", [(40, 20), (16, 48)])
def test_gradients_of_values_of_another_width_in_columns(dims: tuple[int, int]) -> None:
    """Also where programs that share a tile lie beyond the narrower of both."""
    sizes = {"block": 9, "head_dim": dims[0], "value_dim": dims[1], "context": 20, "causal": True}
    inputs = attention.make_inputs("block_attention", sizes)
    tune = Tuning(16, 16, 4, 2, columns=16)
    with mock.patch.object(kernels, "gradient_tuning", lambda *_: (tune, tune)):
        assert_gradients_agree("block_attention", inputs)


def test_gradients_are_the_same_bits_every_time() -> None:
    inputs = attention.make_inputs("block_attention", GRADIENTS["tiles"] | {"causal": True}, dtype=torch.bfloat16)
    with triton_kernels():
        first, second = (gradients(tt.block_attention, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [130, 320])
def test_gradients_of_wide_heads(dim: int, dtype: torch.dtype) -> None:
    sizes = {"block": 2, "heads": 2, "kv_heads": 1, "head_dim": dim, "context": 9, "context_lens": [9, 4]}
    assert_gradients_agree("block_attention", attention.make_inputs("block_attention", sizes, dtype=dtype))


@pytest.mark.parametrize("dim", [17, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_may_share_a_tile_of_rows(dim: int, dtype: torch.dtype) -> None:
    """Each for its own columns of the gradients."""
    sizes = GRADIENTS["tiles"] | {"head_dim": dim, "causal": True, "softcap": 1.5, "block_lens": [9, 4]}
    tune = Tuning(16, 16, 4, 2, columns=16)
    with mock.patch.object(kernels, "gradient_tuning", lambda *_: (tune, tune)):
        assert_gradients_agree("block_attention", attention.make_inputs("block_attention", sizes, dtype=dtype))


def test_what_has_no_kernel_is_refused() -> None:
    q = torch.zeros(1, 1, 1, 513)
    arguments = q, q[..., 0], q, q, q, *[None] * 8, 0, None, None, 0.0
    with triton_kernels(), pytest.raises(NotImplementedError, match="attention_backward on cpu: expected head_dim"):
        torch.ops.twotower.attention_backward.default(*arguments)

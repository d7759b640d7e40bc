"""`linear` and `moe_experts` of quantized weights.

Formula: `reference/quantization.py`; kernel: `csrc/cpu/quantized.h`.

The public functions are `linear.linear` and `moe.moe_experts`, which come here when a weight is a `QuantizedTensor`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import as_index, check_float, check_floats, define, same_device
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import lowered
from twotower_kernels.ops.moe_checks import ACTIVATIONS, check_biases, check_choices, check_matrices, check_plan
from twotower_kernels.ops.moe_plans import MoePlan, planned
from twotower_kernels.quantization import QuantizedTensor
from twotower_kernels.quantization.weights import FOUR_BITS, check_parts

# How the kernels read a format's codes: the order of PackedWeight::Format in csrc/cpu/packed_weight.h.
CODES = {"int8": 0, "int4": 1, "fp8": 2, "nvfp4": 3, "mxfp4": 3}
PLAIN = ""  # the format of matrices that are not quantized
Matrix = Tensor | QuantizedTensor | None


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    x, bias = lowered(x, bias)
    return call("quantized_linear", x, weight.data, weight.scales, weight.global_scale, weight.format, bias)


def moe_experts(
    x: Tensor,
    w_up: Tensor | QuantizedTensor,
    w_down: Tensor | QuantizedTensor,
    weights: Tensor,
    experts: Tensor,
    plan: MoePlan | None,
    shared_up: Matrix,
    shared_down: Matrix,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *options: Any,
) -> Tensor:
    x, up_bias, down_bias = lowered(x, up_bias, down_bias)
    format = _format(w_up=w_up, w_down=w_down)
    shared_format = _format(shared_up=shared_up, shared_down=shared_down)
    routed, shared = (*_parts(w_up), *_parts(w_down)), (*_parts(shared_up), *_parts(shared_down))
    choice = weights, as_index(experts), *(plan or (None, None, None))
    return call("quantized_experts", x, *routed, *choice, *shared, up_bias, down_bias, format, shared_format, *options)


def _format(**matrices: Matrix) -> str:
    formats = {m.format if isinstance(m, QuantizedTensor) else PLAIN for m in matrices.values() if m is not None}
    if len(formats) > 1:
        (name, first), (other, second) = matrices.items()
        expected = first.format if isinstance(first, QuantizedTensor) else "not quantized"
        got = second.format if isinstance(second, QuantizedTensor) else "not quantized"
        raise ValueError(f"{other}: expected {expected} as {name}, got {got}")
    return formats.pop() if formats else PLAIN


def _parts(matrix: Matrix) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(matrix, QuantizedTensor):
        return matrix.data, matrix.scales, matrix.global_scale
    return (matrix if matrix is None else lowered(matrix)[0]), None, None


# --- registration ---------------------------------------------------------------------------------------------------


def _shape(data: Tensor, format: str) -> list[int]:
    *leading, columns = data.shape
    return [*leading, 2 * columns if format in FOUR_BITS else columns]


def _check_linear(
    x: Tensor, data: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, bias: Tensor | None
) -> None:
    check_float(x=x)
    check_parts(format, data, scales, global_scale)
    if x.ndim == 0 or data.ndim != 2 or x.shape[-1] != _shape(data, format)[1]:
        expected = "K" if x.ndim == 0 else x.shape[-1]
        raise ValueError(f"weight: expected [R, {expected}] for x {list(x.shape)}, got {_shape(data, format)}")
    if bias is not None and bias.shape != data.shape[:1]:
        raise ValueError(f"bias: expected [{data.shape[0]}], got {list(bias.shape)}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: expected {x.dtype} as x, got {bias.dtype}")
    same_device(x, weight=data, bias=bias)


def _empty(x: Tensor, data: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def _linear(
    x: Tensor, data: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, bias: Tensor | None
) -> Tensor:
    out = _empty(x, data)
    if x.dtype == torch.float64:
        cpu.call("linear", x, _wide(format, data, scales, global_scale), bias, out)
        return out
    weight = _stored(data, scales, global_scale)
    cpu.call("quantized_linear", x, *weight, CODES[format], bias, out)
    return out


def _wide(format: str, data: Tensor | None, scales: Tensor | None, global_scale: Tensor | None) -> Tensor | None:
    """Dequantized, for x in float64, which is for checking and not for speed."""
    if data is None or scales is None:
        return data
    return QuantizedTensor(format, data, scales, global_scale).dequantize(torch.float64)


def _stored(
    data: Tensor | None, scales: Tensor | None, whole: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the kernel takes them: a scale for every row, and one of the whole for every matrix."""
    if data is not None and scales is not None and scales.shape[-2] != data.shape[-2]:
        scales = scales.expand(*data.shape[:-1], 1)
    return data, scales, whole if whole is None or whole.ndim else whole[None]


class _Whole(NamedTuple):
    shape: torch.Size

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _whole(name: str, x: Tensor, format: str, data: Tensor, scales: Tensor | None, global_scale: Tensor | None) -> Any:
    """A matrix that has been checked by itself, as its whole shape."""
    same_device(x, **{name: data})
    if format == PLAIN:
        if scales is not None or global_scale is not None:
            raise ValueError(f"{name}: expected no scales of a matrix that is not quantized")
        if data.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {data.dtype}")
        return data
    if scales is None:
        raise TypeError(f"{name}: expected scales for {format}, got None")
    check_parts(format, data, scales, global_scale)
    return _Whole(torch.Size(_shape(data, format)))


def _check_experts(*arguments: Any) -> None:
    x, *routed = arguments[:7]
    weights, experts, counts, offsets, pairs, *shared = arguments[7:18]
    up_bias, down_bias, format, shared_format, activation, _, limit = arguments[18:]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    check_float(x=x)
    check_choices(x, weights, experts)
    up, down = _whole("w_up", x, format, *routed[:3]), _whole("w_down", x, format, *routed[3:])
    check_matrices(("w_up", up), ("w_down", down), "E, ", x.shape[1], activation)
    if (shared[0] is None) != (shared[3] is None):
        raise ValueError("shared_up and shared_down: expected both or neither, got one")
    if shared[0] is not None:
        shared_up = _whole("shared_up", x, shared_format, *shared[:3])
        shared_down = _whole("shared_down", x, shared_format, *shared[3:])
        pair = ("shared_up", shared_up), ("shared_down", shared_down)
        check_matrices(*pair, "", x.shape[1], activation)
    check_biases(up, down, up_bias, down_bias)
    for name, bias in (("up_bias", up_bias), ("down_bias", down_bias)):
        if bias is not None and bias.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {bias.dtype}")
    same_device(x, up_bias=up_bias, down_bias=down_bias)
    check_floats(x, weights=weights)
    if not limit >= 0:
        raise ValueError(f"limit: expected 0 or more, got {limit}")
    check_plan(counts, offsets, pairs, up.shape[0], experts)
    same_device(x, experts=experts)


def _experts(*arguments: Any) -> Tensor:
    x, *routed = arguments[:7]
    weights, experts, counts, offsets, pairs, *shared = arguments[7:18]
    up_bias, down_bias, format, shared_format, activation, alpha, limit = arguments[18:]
    offsets, pairs = planned(experts, counts, offsets, pairs, routed[0].shape[0])
    out = x.new_empty(x.shape)
    options = ACTIVATIONS.index(activation), alpha, limit
    if x.dtype == torch.float64:
        pair, shared_pair = (
            [_wide(its_format, *parts[:3]), _wide(its_format, *parts[3:])]
            for its_format, parts in ((format, routed), (shared_format, shared))
        )
        cpu.call("moe_experts", x, *pair, weights, offsets, pairs, *shared_pair, up_bias, down_bias, out, out, *options)
        return out
    total = out if x.dtype == torch.float32 else x.new_empty(x.shape, dtype=torch.float32)
    matrices = [_stored(*routed[:3]), _stored(*routed[3:]), _stored(*shared[:3]), _stored(*shared[3:])]
    downs = (routed[3], format), (shared[3], shared_format)
    inner = [0 if data is None else _shape(data, its_format)[-1] for data, its_format in downs]
    cpu.call(
        "quantized_experts",
        *(x, *matrices[0], *matrices[1], weights, offsets, pairs, *matrices[2], *matrices[3], up_bias, down_bias),
        *(total, out, CODES.get(format, -1), CODES.get(shared_format, -1), *inner),
        *options,
    )
    return out


define(
    "quantized_linear(Tensor x, Tensor data, Tensor scales, Tensor? global_scale, str format, Tensor? bias) -> Tensor",
    check=_check_linear,
    cpu=_linear,
    fake=_empty,
)
define(
    "quantized_experts(Tensor x, Tensor up, Tensor? up_scales, Tensor? up_global_scale, Tensor down, "
    "Tensor? down_scales, Tensor? down_global_scale, Tensor weights, Tensor experts, Tensor? counts, Tensor? offsets, "
    "Tensor? pairs, Tensor? shared_up, Tensor? shared_up_scales, Tensor? shared_up_global_scale, Tensor? shared_down, "
    "Tensor? shared_down_scales, Tensor? shared_down_global_scale, Tensor? up_bias, Tensor? down_bias, str format, "
    "str shared_format, str activation, float alpha, float limit) -> Tensor",
    check=_check_experts,
    cpu=_experts,
    fake=lambda x, *_: x.new_empty(x.shape),
)

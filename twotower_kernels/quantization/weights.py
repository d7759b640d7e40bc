"""A quantized weight: packed codes with their scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FORMATS = ("int8", "int4", "fp8", "nvfp4", "mxfp4")
BITS = {
    "int8": 8.0,
    "int4": 4.5,
    "fp8": 8.0,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
}  # per number, by default; scales of rows aside
GROUP = {"int4": 32, "nvfp4": 16, "mxfp4": 32}  # columns per scale by default; others: all
WIDTHS = (16, 32, 64, 128)  # of groups, where a row has several
FOUR_BITS = ("int4", "nvfp4", "mxfp4")
DATA = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # others: uint8, two codes in a byte
SCALES = {"int4": torch.bfloat16, "nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}  # others: float32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class QuantizedTensor(nn.Module):
    """A weight `[..., R, K]` in eight or four bits, as `tt.quantize` makes it: `code · scale · global scale`.

    A module, so that it stands where a layer holds a weight: its tensors are buffers, and appear in state dicts and
    safetensors files as `<name>.data`, `<name>.scales` and, of nvfp4, `<name>.global_scale`. They move between devices
    with the model they are part of and keep their dtypes when that is cast.

    Attributes:
        format: one of `FORMATS`.
        group_size: columns that share a scale, -1 where the whole matrix does.
        shape: of the weight, `[..., R, K]`.
        data: `[..., R, K]` int8 ("int8") or float8_e4m3fn ("fp8"); otherwise `[..., R, K/2]` uint8, the even column in
            the lower half of a byte: value + 8 ("int4") or e2m1 ("nvfp4", "mxfp4").
        scales: `[..., R, K/G]`, of a whole matrix `[..., 1, 1]`: float32 ("int8", "fp8"), bfloat16 ("int4"),
            float8_e4m3fn ("nvfp4") or uint8, exponents of 2 plus 127 ("mxfp4").
        global_scale: `[...]` float32 ("nvfp4"), or None.

    Raises:
        ValueError: an unknown format, shapes that do not fit each other. TypeError: dtypes that are not the format's.
    """

    data: Tensor
    scales: Tensor
    global_scale: Tensor | None

    def __init__(self, format: str, data: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> None:
        super().__init__()
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
        self.format = format
        for name, tensor in (("data", data), ("scales", scales), ("global_scale", global_scale)):
            self.register_buffer(name, tensor)
        check_parts(format, data, scales, global_scale)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.data, self.scales, self.global_scale

    @property
    def shape(self) -> torch.Size:
        *leading, columns = self.data.shape
        return torch.Size((*leading, 2 * columns if self.format in FOUR_BITS else columns))

    @property
    def group_size(self) -> int:
        if self.scales.shape[-2] != self.data.shape[-2]:
            return -1
        return self.shape[-1] // max(self.scales.shape[-1], 1)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self.buffers())

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[..., R, K]`. Codes and scales are multiplied in float32, in float64 for it, and rounded."""
        scales = self.scales
        if self.format == "mxfp4":
            scales = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scales = scales.to(wide)
        if self.global_scale is not None:
            scales = scales * self.global_scale.to(wide)[..., None, None]
        codes = self._codes().to(wide)
        if not codes.numel():
            return codes.to(dtype)
        groups = codes.unflatten(-1, (scales.shape[-1], -1))  # a scale of the whole matrix is broadcast to its rows
        return (groups * scales[..., None]).flatten(-2).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a matrix `[R, K]`, dequantized: `[..., K]` float32 for integers `[...]`. What an embedding gives."""
        flat = index.flatten()
        data = self.data.view(torch.uint8)[flat].view(self.data.dtype)
        one = self.group_size == -1
        scales = self.scales if one else self.scales.view(torch.uint8)[flat].view(self.scales.dtype)
        few = QuantizedTensor(self.format, data, scales, self.global_scale)
        return few.dequantize().view(*index.shape, self.shape[-1])

    def _codes(self) -> Tensor:
        if self.format not in FOUR_BITS:
            return self.data.float()
        nibbles = torch.stack([self.data & 15, self.data >> 4], -1).flatten(-2)
        if self.format == "int4":
            return nibbles.float() - 8
        return torch.tensor(E2M1, device=nibbles.device)[nibbles.long()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follows to another device; a cast, which would change what the bytes mean, leaves them as they are."""
        for name, tensor in self.named_buffers():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.shape)}, group_size={self.group_size}"


def check_parts(format: str, data: Tensor, scales: Tensor, global_scale: Tensor | None) -> None:
    """As `QuantizedTensor` raises."""
    expected = {
        "data": (data, DATA.get(format, torch.uint8)),
        "scales": (scales, SCALES.get(format, torch.float32)),
        "global_scale": (global_scale, torch.float32),
    }
    for name, (tensor, dtype) in expected.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} for {format}, got {tensor.dtype}")
    if data.ndim < 2:
        raise ValueError(f"data: expected [..., R, K], got {list(data.shape)}")
    *leading, rows, columns = data.shape
    columns *= 2 if format in FOUR_BITS else 1
    whole = format == "fp8" and scales.shape == (*leading, 1, 1)
    groups = scales.shape[-1] if scales.ndim else 0
    divides = columns == 0 or groups == 1 or (groups > 1 and columns % groups == 0 and columns // groups in WIDTHS)
    if not whole and not (scales.shape[:-1] == (*leading, rows) and divides):
        fits = f"{[*leading, rows]} and groups of {columns} or {WIDTHS} columns"
        raise ValueError(f"scales: expected {fits} for data {list(data.shape)} of {format}, got {list(scales.shape)}")
    if (global_scale is None) == (format == "nvfp4"):
        raise ValueError(f"global_scale: expected {'a tensor' if format == 'nvfp4' else 'None'} for {format}")
    if global_scale is not None and global_scale.shape != tuple(leading):
        raise ValueError(f"global_scale: expected {leading}, one per matrix, got {list(global_scale.shape)}")
    devices = {tensor.device for tensor in (data, scales, global_scale) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"scales: expected device {data.device} as data, got {scales.device}")

"""The arithmetic of a GPU in Triton's interpreter, as far from exact as the hardware may be.

NumPy rounds nearly every function correctly, which no GPU does. What Triton 3.6 compiles to, read in its PTX, and how
far that may be off (PTX ISA: ex2, div, sqrt, rsqrt; CUDA C++ Programming Guide, table of mathematical functions):

    tl.exp(x)      mul.f32 by log2(e), then ex2.approx    2 ulp, and what the rounded exponent loses: |x| / 2^24
    tl.exp2(x)     ex2.approx.ftz                         2 ulp; 0 where the result would be subnormal
    tl.log, log2   libdevice                              1 ulp, taken for 2
    a / b          div.full                               2 ulp
    tl.sqrt        sqrt.approx.ftz; rsqrt likewise        2 ulp
    tl.div_rn, tl.sqrt_rn                                 correctly rounded

Inside `device_arithmetic`, a result is the exact one, off by 1.5 ulp and then rounded, so by at most 2; up or down is
drawn from the bits of the operands: the same numbers give the same result, as on a GPU, and other numbers another draw.
`seed` chooses among draws. e^0 is 1, log 1 is 0, and what is 0 or not finite stays as it is.

Tensor cores multiply 16-bit factors exactly, and add 16 products to the accumulator at once: all shifted to the
exponent of the largest of them and cut off two bits below its last one, summed, and the sum cut off to float32. (Fasi,
Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021, found this in smaller blocks before
sm_90. How many bits are left is an assumption there.) Rounding towards zero always errs to the same side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from tests.gpu.triton_checks import TOGETHER, widened

OFF = 1.5  # units in the last place before rounding, which adds half of one at most
EXTRA_BITS = 2  # that a tensor core keeps of a product below the last bit of the largest
LOG2_E = np.float32(1.4426950408889634)
Array = NDArray[Any]


def drawn_signs(seed: int, *operands: Array) -> Array:
    """1 or -1 for every tuple of float32 operands: a hash of their bits (the finalizer of MurmurHash3)."""
    word: Any = np.uint32(2654435769 * (seed + 1) % 2**32)
    for operand in operands:
        word = np.ascontiguousarray(operand, np.float32).view(np.uint32) ^ word
        word = (word ^ word >> np.uint32(16)) * np.uint32(0x85EBCA6B)
        word = (word ^ word >> np.uint32(13)) * np.uint32(0xC2B2AE35)
        word ^= word >> np.uint32(16)
    return 1.0 - 2.0 * (word & np.uint32(1))


def approximated(exact: Array, seed: int, *operands: Array) -> Array:
    """float32 numbers within 2 ulp of the exact ones, which are float64."""
    _, exponent = np.frexp(exact)
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    off = exact + OFF * unit * drawn_signs(seed, *operands).reshape(np.shape(exact))
    return np.where(np.isfinite(exact) & (exact != 0), off, exact).astype(np.float32)


def towards_zero(x: Array) -> Array:
    """float64 cut off to float32; what float32 cannot hold becomes infinite."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def tensor_core(total: Array, left: Array, right: Array) -> Array:
    """total + left right for float32 [..., M, N] and exact factors [K, ..., M, 1] and [K, ..., 1, N]."""
    for k in range(0, len(left), TOGETHER):
        products = left[k : k + TOGETHER].astype(np.float64) * right[k : k + TOGETHER]
        terms = np.concatenate([products, total[None].astype(np.float64)])
        _, exponent = np.frexp(np.abs(terms).max(0))
        unit = np.ldexp(1.0, exponent - 24 - EXTRA_BITS)
        cut = np.where(np.isfinite(terms), np.trunc(terms / unit) * unit, terms)
        total = towards_zero(cut.sum(0))
    return total


def _functions(seed: int) -> dict[str, Callable[..., Any]]:
    """Of `InterpreterBuilder`: float32 operands, everything else is left to NumPy."""

    def of_one(function: Callable[[Array], Array], *, flushed: bool = False) -> Callable[[Array], Array]:
        def approximate(x: Array) -> Array:
            result = approximated(function(x), seed, x)
            return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result) if flushed else result

        return approximate

    def exp2(x: Array) -> Array:
        return np.where(x == 0, 1.0, np.exp2(x.astype(np.float64)))

    return {
        "create_exp": lambda x: np.where(x == 0, np.float32(1), of_one(exp2)(x * LOG2_E)),
        "create_exp2": lambda x: np.where(x == 0, np.float32(1), of_one(exp2, flushed=True)(x)),
        "create_log": of_one(lambda x: np.log(x.astype(np.float64))),
        "create_log2": of_one(lambda x: np.log2(x.astype(np.float64))),
        "create_sqrt": of_one(lambda x: np.sqrt(x.astype(np.float64)), flushed=True),
        "create_rsqrt": of_one(lambda x: 1 / np.sqrt(x.astype(np.float64)), flushed=True),
        "create_fdiv": lambda a, b: approximated(a.astype(np.float64) / b, seed, a, b),
    }


@contextmanager
def device_arithmetic(seed: int = 0) -> Iterator[None]:
    """Within `triton_kernels`: functions and tensor cores as above."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def in_place_of(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        plain = getattr(InterpreterBuilder, name)

        def apply(self: Any, *handles: Any) -> Any:
            if any(handle.dtype.scalar != tl.float32 for handle in handles):
                return plain(self, *handles)
            with np.errstate(all="ignore"):
                return TensorHandle(function(*np.broadcast_arrays(*(handle.data for handle in handles))), tl.float32)

        return apply

    plain_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if any(handle.dtype.primitive_bitwidth != 16 for handle in (a, b)) or d.dtype.scalar != tl.float32:
            return plain_dot(self, a, b, d, *options)
        left = np.moveaxis(widened(a).data, -1, 0)[..., None]
        right = np.moveaxis(widened(b).data, -2, 0)[..., None, :]
        with np.errstate(all="ignore"):
            return TensorHandle(tensor_core(d.data, left, right), tl.float32)

    with ExitStack() as stack:
        for name, function in _functions(seed).items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, in_place_of(name, function)))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot))
        yield

"""What Mamba-2's Triton kernels share: chunks, the convolution, steps and decays, products.

A GPU's own functions are approximate: tl.exp multiplies by log2(e), which loses |x| / 2^24 of the result, and ends in
an instruction that may be off by 2 units in the last place, as a quotient may. That doubled the error of float32
states. So steps, decays and the SiLU of float32 are made of multiplications and additions, which a GPU rounds
correctly: a dozen, for an instruction of which a processor starts one where it starts eight of these. Activations of 16
bits are rounded by more than that loses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounds(chunk, block, block_chunks, length, TOKENS: tl.constexpr):
    """First and last + 1 token of a chunk. Every block of `states_every` tokens has chunks of its own."""
    number = chunk // block_chunks
    start = number * block + chunk % block_chunks * TOKENS
    return start, tl.minimum(tl.minimum(start + TOKENS, (number + 1) * block), length)


@triton.jit
def activated(
    xbc, weight, bias, conv_state, time, real, channel, inside, xbc_token, weight_row, conv_channel, WIDTH: tl.constexpr
):
    """SiLU of the convolution, both rounded, [tokens, channels] for times [tokens] and channels of one row; 0 where no
    token is `real` or no channel `inside`. WIDTH 0: xbc is that already."""
    X = xbc.dtype.element_ty
    there = real[:, None] & inside[None, :]
    at = time[:, None] * xbc_token + channel[None, :]
    if WIDTH == 0:
        return tl.load(xbc + at, mask=there, other=0)
    else:
        at = tl.max_contiguous(at, (1, 2))  # two channels to a thread, not eight: their taps are scattered loads
        total = tl.zeros(there.shape, tl.float32)
        taps = weight + channel * weight_row
        if conv_state is not None:
            conv_state += channel.to(tl.int64) * conv_channel
        for before in tl.static_range(WIDTH - 1, -1, -1):
            column = tl.load(xbc + at - before * xbc_token, mask=there & (time >= before)[:, None], other=0)
            if conv_state is not None:
                for k in tl.static_range(before):  # before the first token
                    old = tl.load(conv_state + (WIDTH - 1 - before + k), mask=inside, other=0).to(X)
                    column = tl.where((time == k)[:, None], old[None, :], column)
            tap = tl.load(taps + (WIDTH - 1 - before), mask=inside, other=0).to(tl.float32)
            total += tap[None, :] * column.to(tl.float32)
        if bias is not None:
            total += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)[None, :]
        return tl.where(there, silu(total.to(X)), 0)


@triton.jit
def exponential(x):
    """e^x within an ulp or so up to x = 88, infinity beyond; 0 where it would be subnormal. NaN stays NaN.

    x is split into n log 2 + r with |r| <= log(2) / 2: log 2 in two parts, the first short, so that n times it is
    exact. 2^n is put together from its exponent."""
    nearest = x * 1.4426950408889634 + 12582912.0  # the sum's last bits hold the nearest integer
    n = nearest - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440054690583e-4
    series = 1 / 5040 * r + 1 / 720
    series = series * r + 1 / 120
    series = series * r + 1 / 24
    series = series * r + 1 / 6
    series = series * r + 0.5
    power = ((nearest.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    result = (series * (r * r) + r + 1) * power
    return tl.where(x < -87.3, 0.0, tl.where(x > 88, float("inf"), result))


@triton.jit
def softplus(x):
    """log(1 + e^x), as max(x, 0) + log(1 + e) with e = e^-|x|. log(1 + e) / e is a polynomial, fitted for its largest
    relative error on [0, 1], 7e-10."""
    e = exponential(-tl.abs(x))
    series = 2.0302138e-3 * e - 1.3407393e-2
    series = series * e + 4.1477937e-2
    series = series * e - 8.2441412e-2
    series = series * e + 1.2418412e-1
    series = series * e - 1.6105680e-1
    series = series * e + 1.9890745e-1
    series = series * e - 2.4987270e-1
    series = series * e + 3.3332559e-1
    series = series * e - 4.9999982e-1
    return tl.where(x > 0, x, 0.0) + (series * e + 1) * e


@triton.jit
def silu(x):
    """x / (1 + e^-x) in the dtype of x."""
    wide = x.to(tl.float32)
    if x.dtype == tl.float32:
        e = exponential(-tl.abs(x))
        numerator, denominator = tl.where(x < 0, x * e, x), 1 + e
        inverse = 1 / denominator
        quotient = numerator * inverse
        refined = tl.fma(tl.fma(-denominator, quotient, numerator), inverse, quotient)
        return tl.where(quotient - quotient == 0, refined, quotient)
    else:
        return (wide / (1 + tl.exp(-wide))).to(x.dtype)


@triton.jit
def steps(dt, time, there, dt_token, dt_bias, a_log, head, dt_min, dt_max):
    """Steps of a head's tokens and the logarithms of their decays [tokens]; both 0 where no token is there."""
    x = tl.load(dt + time * dt_token + head, mask=there, other=0).to(tl.float32)
    x += tl.load(dt_bias + head).to(tl.float32)
    step = softplus(x)
    step = tl.where(step < dt_min, dt_min, step)  # NaN stays NaN
    step = tl.where(there, tl.where(step > dt_max, dt_max, step), 0)
    return step, -exponential(tl.load(a_log + head).to(tl.float32)) * step


@triton.jit
def split(x):
    """Three bfloat16 numbers whose sum is the float32 number: 8 of its 24 binary digits in each."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, total):
    """total + a b, exact but for the float32 sums."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    elif a.dtype == tl.bfloat16:
        high, middle, low = split(b)
        return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, total)))
    elif b.dtype == tl.bfloat16:
        high, middle, low = split(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, total)))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")

"""What Mamba-2's Triton kernels share: chunks, the convolution, steps and decays, products."""

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
        total = total.to(X).to(tl.float32)
        return tl.where(there, total / (1 + tl.exp(-total)), 0).to(X)


@triton.jit
def steps(dt, time, there, dt_token, dt_bias, a_log, head, dt_min, dt_max):
    """Steps of a head's tokens and the logarithms of their decays [tokens]; both 0 where no token is there."""
    x = tl.load(dt + time * dt_token + head, mask=there, other=0).to(tl.float32)
    x += tl.load(dt_bias + head).to(tl.float32)
    e = tl.exp(x)
    one = 1 + e  # and what the sum lost of e
    step = tl.where(x > 20, x, tl.log(one) + (e - (one - 1)) / one)
    step = tl.where(step < dt_min, dt_min, step)  # NaN stays NaN
    step = tl.where(there, tl.where(step > dt_max, dt_max, step), 0)
    return step, -tl.exp(tl.load(a_log + head).to(tl.float32)) * step


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

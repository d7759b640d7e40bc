"""What Mamba-2's Triton kernels share: chunks, the convolution, step sizes and decays, products.

A GPU's own functions are approximate: tl.exp multiplies by log2(e), which loses |x| / 2^24 of the result, and ends in
an instruction that may be off by 2 units in the last place, as a quotient may. That doubled the error of float32
states. So step sizes, decays and the SiLU of float32 are made of multiplications and additions, which a GPU rounds
correctly: a dozen, for an instruction of which a processor starts one where it starts eight of these. Activations of 16
bits are rounded by more than that loses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_bounds(chunk, block_length, chunks_per_block, length, CHUNK_SIZE: tl.constexpr):
    """First and last + 1 token of a chunk. Every block of `states_every` tokens has chunks of its own."""
    block = chunk // chunks_per_block
    start = block * block_length + chunk % chunks_per_block * CHUNK_SIZE
    return start, tl.minimum(tl.minimum(start + CHUNK_SIZE, (block + 1) * block_length), length)


@triton.jit
def conv_silu(
    xbc,  # of one row: its token t, channel c at t * stride_xt + c
    conv_weight,
    conv_bias,
    conv_state,  # of one row, or None: zeros
    t,  # [tokens]
    token_mask,
    channel,  # [channels]
    channel_mask,
    stride_xt,
    stride_conv_weight,
    stride_conv_channel,
    WIDTH: tl.constexpr,
):
    """SiLU of the causal convolution, both rounded, [tokens, channels]; 0 where a mask is false. WIDTH 0: xbc is that
    already."""
    X = xbc.dtype.element_ty
    mask = token_mask[:, None] & channel_mask[None, :]
    offsets = t[:, None] * stride_xt + channel[None, :]
    if WIDTH == 0:
        return tl.load(xbc + offsets, mask=mask, other=0)
    else:
        offsets = tl.max_contiguous(offsets, (1, 2))  # two channels to a thread, not eight: taps are scattered loads
        acc = tl.zeros(mask.shape, tl.float32)
        tap_ptrs = conv_weight + channel * stride_conv_weight
        if conv_state is not None:
            conv_state += channel.to(tl.int64) * stride_conv_channel
        for lag in tl.static_range(WIDTH - 1, -1, -1):
            x = tl.load(xbc + offsets - lag * stride_xt, mask=mask & (t >= lag)[:, None], other=0)
            if conv_state is not None:
                for k in tl.static_range(lag):  # tokens whose input at this lag lies before the first token
                    past = tl.load(conv_state + (WIDTH - 1 - lag + k), mask=channel_mask, other=0).to(X)
                    x = tl.where((t == k)[:, None], past[None, :], x)
            tap = tl.load(tap_ptrs + (WIDTH - 1 - lag), mask=channel_mask, other=0).to(tl.float32)
            acc += tap[None, :] * x.to(tl.float32)
        if conv_bias is not None:
            acc += tl.load(conv_bias + channel, mask=channel_mask, other=0).to(tl.float32)[None, :]
        return tl.where(mask, silu(acc.to(X)), 0)


@triton.jit
def exponential(x):
    """e^x within an ulp or so, infinity from x = 88.4, 0 where it would be subnormal. NaN stays NaN.

    x is split into n log 2 + r with |r| <= log(2) / 2: log 2 in two parts, the first short, so that n times it is
    exact. 2^n is put together from its exponent: at n = -127 it is 0, at 128 infinity."""
    x = tl.where(x < -88.0, -88.0, tl.where(x > 89.0, 89.0, x))
    nearest = x * 1.4426950408889634 + 12582912.0  # the sum's last bits hold the nearest integer
    n = nearest - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440054690583e-4
    series = 1 / 5040 * r + 1 / 720
    series = series * r + 1 / 120
    series = series * r + 1 / 24
    series = series * r + 1 / 6
    series = series * r + 0.5
    power = ((nearest.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return (series * (r * r) + r + 1) * power


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
    x_float32 = x.to(tl.float32)
    if x.dtype == tl.float32:
        e = exponential(-tl.abs(x))
        numerator, denominator = tl.where(x < 0, x * e, x), 1 + e
        inverse = 1 / denominator
        quotient = numerator * inverse
        refined = tl.fma(tl.fma(-denominator, quotient, numerator), inverse, quotient)
        return tl.where(quotient - quotient == 0, refined, quotient)
    else:
        return (x_float32 / (1 + tl.exp(-x_float32))).to(x.dtype)


@triton.jit
def step_sizes(dt, t, token_mask, stride_dt_t, dt_bias, a_log, head, dt_min, dt_max):
    """Step sizes delta of a head's tokens, softplus(dt + bias) within [dt_min, dt_max], and the logarithms of their
    decays, -exp(a_log) delta: [tokens] each, both 0 where the mask is false."""
    x = tl.load(dt + t * stride_dt_t + head, mask=token_mask, other=0).to(tl.float32)
    x += tl.load(dt_bias + head).to(tl.float32)
    delta = softplus(x)
    delta = tl.where(delta < dt_min, dt_min, delta)  # NaN stays NaN
    delta = tl.where(token_mask, tl.where(delta > dt_max, dt_max, delta), 0)
    return delta, -exponential(tl.load(a_log + head).to(tl.float32)) * delta


@triton.jit
def split(x):
    """Three bfloat16 numbers whose sum is the float32 number: 8 of its 24 binary digits in each."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, acc):
    """acc + a b, exact but for the float32 sums."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif a.dtype == tl.bfloat16:
        high, middle, low = split(b)
        return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    elif b.dtype == tl.bfloat16:
        high, middle, low = split(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, acc)))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")

"""Mamba-2: convolution, SiLU and selective scan in chunks of tokens. Formulas: `reference/mamba2.py`.

    y_t = exp(a_t) C_t.s + sum over u <= t of (C_t.B_u) exp(a_t - a_u) delta_u x_u + D x_t      within a chunk
    s'  = exp(a_T) s + sum over t of exp(a_T - a_t) delta_t x_t B_t                            from chunk to chunk

A block of up to 64 tokens whose states nobody wants, which is a denoising step, takes one launch, `mamba2_scan_kernel`:
a program convolves what its head and its part of head_dim need, and reads its part of the state once. Heads of a group
convolve the same B and C: 8 KB from the L2 and a few thousand exponentials, cheaper than a launch that does it once.

Otherwise there are three: `mamba2_convolve_kernel` writes what the scan reads of the tokens, and the convolution's
states; `mamba2_states_kernel` walks the chunks with a tile of the state in registers, and writes it before every chunk
and where it is asked for; `mamba2_scan_kernel` then has a state for every chunk, and runs over all of them at once. The
scratch of states is bounded: long sequences go by in runs of chunks. What a row's tokens give depends on its own length
and on the block's shape alone, never on the rows beside it.

Tensor cores multiply factors of 16 bits, and what is float32 (states, decays) loses nothing to them: where the other
factor is bfloat16, they multiply it by three bfloat16 numbers whose sum the first one is. Other dtypes multiply states
and decays in float32, without tensor cores.

Tried, by compiling for all GPUs: convolving x before the loop over the state, so that all loads are under way at once,
spills registers with 32 tokens and more (with 16 and half heads it is done); so do whole heads with 64 tokens where
factors stay in registers (sm_80, sm_120), and half the state at a time. Loading the state first puts the change of its
layout, and a barrier, before the taps' loads. Eight channels to a thread read their taps one by one, 110 scattered
loads of two bytes in a denoising step; two channels take half as many loads of a quarter of the cache lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, machine, on_device_of, rows_contiguous
from twotower_kernels.triton.mamba2_chunk import chunk_bounds, conv_silu, exponential, product, step_sizes
from twotower_kernels.triton.rows import length_at, row_at

CONV_TILE = (32, 128)  # tokens and channels of a program of the convolution
SCRATCH = 2**26  # numbers of states at a time, 256 MB
COUNTS = (
    *("length", "num_conv_states", "num_ssm_states", "block_length", "num_blocks"),
    *("chunks_per_block", "first_chunk", "num_chunks", "total_chunks"),
)


@triton.jit(do_not_specialize=COUNTS)
def mamba2_convolve_kernel(
    xbc,  # [B, L, C]
    conv_weight,  # [C, W]
    conv_bias,  # [C] or None
    conv_state,  # [rows, C, W-1] or None
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    u,  # [B, L, C] contiguous: SiLU of the convolution, written for tokens before seq_lens
    conv_out,  # [B, num_blocks, C, W-1] contiguous
    length,
    channels,
    num_conv_states,
    block_length,
    num_blocks,
    stride_xb,
    stride_xt,
    stride_conv_weight,
    stride_conv_row,
    stride_conv_channel,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
):
    """Of a row and a tile of channels, some programs have a tile of tokens each, the others the end of a block each."""
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    token_tiles = tl.cdiv(length, BLOCK_T)
    item = tl.program_id(0) // channel_tiles % (token_tiles + num_blocks)
    b = (tl.program_id(0) // channel_tiles // (token_tiles + num_blocks)).to(tl.int64)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    tokens = length_at(seq_lens, b, length)
    xbc += b * stride_xb
    if conv_state is not None:
        conv_state += row_at(state_index, b, 1, num_conv_states) * stride_conv_row
    if item < token_tiles:
        t = item.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        token_mask = t < tokens
        value = conv_silu(
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, channel, channel_mask, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
        u_ptrs = u + (b * length + t)[:, None] * channels + channel[None, :]
        tl.store(u_ptrs, value, mask=token_mask[:, None] & channel_mask[None, :])
    else:
        block = (item - token_tiles).to(tl.int64)
        end = tl.minimum((block + 1) * block_length, tokens)
        out_ptrs = conv_out + ((b * num_blocks + block) * channels + channel) * (WIDTH - 1)
        for w in tl.static_range(WIDTH - 1):
            position = end + (w + 1 - WIDTH)
            x = tl.load(xbc + position * stride_xt + channel, mask=channel_mask & (position >= 0), other=0)
            if conv_state is not None:
                past_ptrs = conv_state + channel.to(tl.int64) * stride_conv_channel + (end + w)
                x = tl.where(
                    position < 0, tl.load(past_ptrs, mask=channel_mask & (position < 0), other=0).to(x.dtype), x
                )
            tl.store(out_ptrs + w, x, mask=channel_mask)


@triton.jit(do_not_specialize=COUNTS)
def mamba2_states_kernel(
    u,  # [B, L, C] contiguous: SiLU of the convolution
    dt,  # [B, L, heads]
    a_log,  # [heads]
    dt_bias,  # [heads]
    ssm_state,  # [rows, heads, HEAD_DIM, D_STATE] or None: before the first chunk
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    chunk_states,  # [B, num_chunks + 1, heads, HEAD_DIM, D_STATE] contiguous: before every chunk, and after the last
    ssm_out,  # [B, blocks, heads, HEAD_DIM, D_STATE] contiguous or None: after every block
    length,
    heads,
    groups,
    num_ssm_states,
    block_length,
    chunks_per_block,
    first_chunk,
    num_chunks,  # of this launch
    total_chunks,
    stride_dt_b,
    stride_dt_t,
    stride_ssm_row,
    stride_ssm_head,
    stride_ssm_dim,
    dt_min,
    dt_max,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # tokens of a chunk
    BLOCK_P: tl.constexpr,  # of head_dim
    BLOCK_N: tl.constexpr,  # of the state
):
    n_tiles: tl.constexpr = (D_STATE + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P * n_tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    group = head * groups // heads
    p = tile // n_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    state_mask = (p < HEAD_DIM)[:, None] & (n < D_STATE)[None, :]
    channels = heads * HEAD_DIM + 2 * groups * D_STATE
    tokens = length_at(seq_lens, b, length)
    u += b * length * channels
    dt += b * stride_dt_b
    state_size = tl.cast(heads, tl.int64) * HEAD_DIM * D_STATE  # of all heads
    state_offsets = (head * HEAD_DIM + p[:, None]) * D_STATE + n[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if ssm_state is not None:
        head_ptr = ssm_state + row_at(state_index, b, 1, num_ssm_states) * stride_ssm_row
        head_ptr += head.to(tl.int64) * stride_ssm_head
        state_ptrs = head_ptr + p.to(tl.int64)[:, None] * stride_ssm_dim + n[None, :]
        state = tl.load(state_ptrs, mask=state_mask, other=0).to(tl.float32)
    offs_t = tl.arange(0, CHUNK_SIZE)
    for chunk in range(first_chunk, first_chunk + num_chunks):
        chunk_state = chunk_states + (b * (num_chunks + 1) + (chunk - first_chunk)) * state_size
        tl.store(chunk_state + state_offsets, state, mask=state_mask)
        start, end = chunk_bounds(chunk, block_length, chunks_per_block, length, CHUNK_SIZE)
        count = tl.minimum(end, tokens) - start
        t = (start + offs_t).to(tl.int64)
        token_mask = offs_t < count
        delta, log_decay = step_sizes(dt, t, token_mask, stride_dt_t, dt_bias, a_log, head, dt_min, dt_max)
        # Of the tokens after each: sums of their own, since differences of running sums would cancel.
        _, next_log_decay = step_sizes(dt, t + 1, offs_t + 1 < count, stride_dt_t, dt_bias, a_log, head, dt_min, dt_max)
        x_scale = delta * exponential(tl.cumsum(next_log_decay, 0, reverse=True))  # delta_t exp(a_T - a_t)
        chunk_decay = exponential(tl.sum(log_decay))
        x = tl.load(
            u + t[None, :] * channels + (head * HEAD_DIM + p)[:, None],
            mask=(p < HEAD_DIM)[:, None] & token_mask[None, :],
            other=0,
        )
        b_tile = tl.load(  # B of the group, [tokens, n]
            u + t[:, None] * channels + (heads * HEAD_DIM + group * D_STATE + n)[None, :],
            mask=token_mask[:, None] & (n < D_STATE)[None, :],
            other=0,
        )
        update = product(x.to(tl.float32) * x_scale[None, :], b_tile, tl.zeros((BLOCK_P, BLOCK_N), tl.float32))
        state = chunk_decay * state + update
        if ssm_out is not None and ((chunk + 1) % chunks_per_block == 0 or chunk + 1 == total_chunks):
            num_blocks = (total_chunks + chunks_per_block - 1) // chunks_per_block
            out_ptrs = ssm_out + (b * num_blocks + chunk // chunks_per_block) * state_size + state_offsets
            tl.store(out_ptrs, state, mask=state_mask)
    tl.store(chunk_states + (b * (num_chunks + 1) + num_chunks) * state_size + state_offsets, state, mask=state_mask)


@triton.jit
def prefetch_state(head_state, stride_ssm_dim, p, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows p of a head's state into the L2. The compiler puts their loads behind the convolution's sums, where they
    would wait for the memory anew. So one number of every 32 bytes is read beforehand, and used by nobody; the barrier
    keeps it there."""
    n = 8 * tl.arange(0, BLOCK_N // 8)
    state_mask = (p < HEAD_DIM)[None, :] & (n < D_STATE)[:, None]
    tl.load(head_state + p.to(tl.int64)[None, :] * stride_ssm_dim + n[:, None], mask=state_mask, volatile=True)
    tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mamba2_scan_kernel(
    xbc,  # [B, L, C], or without WIDTH SiLU of its convolution
    dt,  # [B, L, heads]
    conv_weight,  # [C, W] or None
    conv_bias,  # [C] or None
    a_log,  # [heads]
    d,  # [heads]
    dt_bias,  # [heads]
    conv_state,  # [rows, C, W-1] or None
    ssm_state,  # [rows, chunks, heads, HEAD_DIM, D_STATE] or None: before every chunk
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    y,  # [B, L, heads * HEAD_DIM] contiguous
    length,
    heads,
    groups,
    num_conv_states,
    num_ssm_states,
    block_length,
    chunks_per_block,
    first_chunk,
    num_chunks,  # of this launch
    stride_xb,
    stride_xt,
    stride_dt_b,
    stride_dt_t,
    stride_conv_weight,
    stride_conv_row,
    stride_conv_channel,
    stride_ssm_row,
    stride_ssm_chunk,
    stride_ssm_head,
    stride_ssm_dim,
    dt_min,
    dt_max,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # tokens of a chunk
    BLOCK_P: tl.constexpr,  # of head_dim
    BLOCK_N: tl.constexpr,  # of the state at a time
):
    # Where registers suffice, no load from global memory stands behind a barrier.
    LOADS_FIRST: tl.constexpr = CHUNK_SIZE == 16 and BLOCK_P <= 32 and BLOCK_N >= D_STATE
    X_AFTER_DECAYS: tl.constexpr = not LOADS_FIRST and (CHUNK_SIZE < 64 or BLOCK_P != 32)  # as registers suffice
    DELTA_FIRST: tl.constexpr = CHUNK_SIZE == 16 and xbc.dtype.element_ty != tl.float32
    p_tiles: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    p_tile = tl.program_id(0) % p_tiles
    head = tl.program_id(0) // p_tiles % heads
    row_and_chunk = tl.program_id(0) // p_tiles // heads
    b = (row_and_chunk // num_chunks).to(tl.int64)
    group = head * groups // heads
    start, end = chunk_bounds(
        first_chunk + row_and_chunk % num_chunks, block_length, chunks_per_block, length, CHUNK_SIZE
    )
    count = tl.minimum(end, length_at(seq_lens, b, length)) - start
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_t = tl.arange(0, CHUNK_SIZE)
    token_mask = offs_t < count
    t = (start + offs_t).to(tl.int64)
    xbc += b * stride_xb
    if conv_state is not None:
        conv_state += row_at(state_index, b, 1, num_conv_states) * stride_conv_row
    if ssm_state is not None:
        ssm_state += row_at(state_index, b, 1, num_ssm_states) * stride_ssm_row
        chunk_offset = row_and_chunk % num_chunks * tl.cast(stride_ssm_chunk, tl.int64)
        ssm_state += chunk_offset + head.to(tl.int64) * stride_ssm_head
        if LOADS_FIRST:
            prefetch_state(ssm_state, stride_ssm_dim, p, HEAD_DIM, D_STATE, BLOCK_N)

    if DELTA_FIRST:
        delta, log_decay = step_sizes(
            dt + b * stride_dt_b, t, token_mask, stride_dt_t, dt_bias, a_log, head, dt_min, dt_max
        )
    if LOADS_FIRST:
        x = conv_silu(
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, head * HEAD_DIM + p, p < HEAD_DIM, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
    scores = tl.zeros((CHUNK_SIZE, CHUNK_SIZE), tl.float32)  # [t, u]: C_t.B_u
    acc = tl.zeros((CHUNK_SIZE, BLOCK_P), tl.float32)
    for k in range(0, D_STATE, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        channel = heads * HEAD_DIM + group * D_STATE + n
        b_tile = conv_silu(  # B of the group, [tokens, n]
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, channel, n < D_STATE, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
        channel += groups * D_STATE
        c_tile = conv_silu(  # its C
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, channel, n < D_STATE, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
        if ssm_state is not None:
            state_mask = (p < HEAD_DIM)[None, :] & (n < D_STATE)[:, None]
            state_ptrs = ssm_state + p.to(tl.int64)[None, :] * stride_ssm_dim + n[:, None]
            state = tl.load(state_ptrs, mask=state_mask, other=0)
            acc = product(c_tile, state.to(tl.float32), acc)
        scores = product(c_tile, tl.trans(b_tile), scores)

    if not DELTA_FIRST:  # behind the loop, whose registers they would take
        delta, log_decay = step_sizes(
            dt + b * stride_dt_b, t, token_mask, stride_dt_t, dt_bias, a_log, head, dt_min, dt_max
        )
    if not LOADS_FIRST and not X_AFTER_DECAYS:
        x = conv_silu(
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, head * HEAD_DIM + p, p < HEAD_DIM, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
    skip = tl.load(d + head).to(tl.float32)
    # [t, u]: of the tokens after u up to t. Sums of their own, since differences of running sums would cancel.
    log_decay_between = tl.cumsum(tl.where(offs_t[:, None] > offs_t[None, :], log_decay[:, None], 0), 0)
    causal = offs_t[:, None] >= offs_t[None, :]
    mixing = tl.where(causal, scores * exponential(log_decay_between) * delta[None, :], 0)
    if X_AFTER_DECAYS:
        x = conv_silu(
            xbc, conv_weight, conv_bias, conv_state, t, token_mask, head * HEAD_DIM + p, p < HEAD_DIM, stride_xt,
            stride_conv_weight, stride_conv_channel, WIDTH,
        )  # fmt: skip
    # An x that is not finite must not reach the tokens before it: their 0 would make NaN of it.
    x_float32 = x.to(tl.float32)
    is_finite = x_float32 - x_float32 == 0
    acc *= exponential(tl.cumsum(log_decay, 0))[:, None]
    acc = product(mixing, tl.where(is_finite, x, 0), acc) + skip * x_float32
    nonfinite_so_far = tl.cumsum(tl.where(is_finite, 0, 1), 0) > 0
    acc = tl.where(nonfinite_so_far, float("nan"), acc)
    y_ptrs = y + ((b * length + t) * heads * HEAD_DIM)[:, None] + (head * HEAD_DIM + p)[None, :]
    value = tl.where(token_mask[:, None], acc, 0).to(y.dtype.element_ty)
    tl.store(y_ptrs, value, mask=(t < end)[:, None] & (p < HEAD_DIM)[None, :])


@dataclass(frozen=True)
class Tuning:
    """A program's tile: block_p of head_dim, block_n of the state (at a time, in the scan)."""

    block_p: int
    block_n: int
    num_warps: int
    num_stages: int


def chunk_tokens(block_length: int) -> int:
    """Tokens of a chunk, for blocks of so many."""
    return min(max(triton.next_power_of_2(block_length), 16), 64)


def _fitted(tile: Tuning, head_dim: int, d_state: int) -> Tuning:
    """Not larger than there is to do, and at least what a product needs."""
    block_p, block_n = (max(triton.next_power_of_2(size), 16) for size in (head_dim, d_state))
    return replace(tile, block_p=min(tile.block_p, block_p), block_n=min(tile.block_n, block_n))


def scan_tuning(
    dtype: torch.dtype, chunk_size: int, heads: int, head_dim: int, d_state: int, arch: int, processors: int
) -> Tuning:
    """Tile for so many (chunk, head) pairs. Whole heads convolve B and C least often; halves of them keep more
    processors busy, and on sm_80 and sm_120, where factors are kept in registers, fit 64 tokens. Products without
    tensor cores keep them there everywhere."""
    if dtype != torch.bfloat16:
        return _fitted(Tuning(32, 32, 8, 1) if chunk_size == 16 else Tuning(16, 16, 8, 1), head_dim, d_state)
    whole = heads >= processors and (chunk_size < 64 or arch in (90, 100))
    return _fitted(Tuning(64 if whole else 32, 128 if chunk_size == 16 else 32, 8, 1), head_dim, d_state)


def states_tuning(dtype: torch.dtype, head_dim: int, d_state: int) -> Tuning:
    return _fitted(Tuning(32, 64, 8, 4) if dtype == torch.bfloat16 else Tuning(16, 32, 4, 2), head_dim, d_state)


def _options(tile: Tuning) -> dict[str, int]:
    return dict(BLOCK_P=tile.block_p, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _state_arguments(state: Tensor | None, index: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for the states before its first chunk, [rows, heads, head_dim, d_state]."""
    strides = (0, 0, 0) if state is None else state.stride()[:3]
    given = dict(zip(("stride_ssm_row", "stride_ssm_head", "stride_ssm_dim"), strides, strict=True))
    return given | dict(ssm_state=state, state_index=index, num_ssm_states=0 if state is None else len(state))


def mamba2_scan(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    n_groups: int, head_dim: int, conv_state: Tensor | None, ssm_state: Tensor | None, state_index: Tensor | None,
    seq_lens: Tensor | None, dt_min: float, dt_max: float, return_states: bool, states_every: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lengths and indices are not compared with what there is, which would wait for the device: one out of range is
    taken for the nearest."""
    check_dtype("mamba2_scan", xbc=xbc)
    xbc, dt, conv_weight, a_log, d, dt_bias = map(rows_contiguous, (xbc, dt, conv_weight, a_log, d, dt_bias))  # type: ignore[assignment]
    conv_bias, conv_state, ssm_state = map(rows_contiguous, (conv_bias, conv_state, ssm_state))
    state_index, seq_lens = (None if x is None else x.contiguous() for x in (state_index, seq_lens))
    (batch, length, channels), heads, conv_width = xbc.shape, dt.shape[2], conv_weight.shape[1]
    d_state = (channels - heads * head_dim) // (2 * n_groups)
    # Blocks, after each of which states are wanted, and the chunks that they are cut into.
    wants_states = return_states or states_every > 0
    block_length = min(states_every or length, length) or 1
    num_blocks = -(-length // block_length) if states_every else 1
    chunk_size = chunk_tokens(block_length)
    chunks_per_block = -(-block_length // chunk_size)
    last_length = length - (num_blocks - 1) * block_length
    last_chunks = max(-(-last_length // chunk_size), 1)  # of an empty block, one empty chunk
    total_chunks = (num_blocks - 1) * chunks_per_block + last_chunks if num_blocks else 0
    out_shape = [batch, num_blocks] if states_every else [batch]
    y = xbc.new_empty(batch, length, heads * head_dim)
    conv_out = xbc.new_empty([*out_shape, channels, conv_width - 1] if wants_states else 0)
    ssm_out = xbc.new_empty([*out_shape, heads, head_dim, d_state] if wants_states else 0, dtype=torch.float32)
    if batch * total_chunks == 0:
        return y, conv_out, ssm_out

    conv_arguments: dict[str, Any] = dict(conv_weight=conv_weight, conv_bias=conv_bias, conv_state=conv_state)
    conv_arguments |= dict(stride_conv_weight=conv_weight.stride(0))
    conv_strides = (0, 0) if conv_state is None else conv_state.stride()[:2]
    conv_arguments |= dict(stride_conv_row=conv_strides[0], stride_conv_channel=conv_strides[1], WIDTH=conv_width)
    conv_arguments |= dict(xbc=xbc, stride_xb=xbc.stride(0), stride_xt=xbc.stride(1))
    conv_arguments |= dict(num_conv_states=0 if conv_state is None else len(conv_state))
    common: dict[str, Any] = dict(dt=dt, a_log=a_log, dt_bias=dt_bias, seq_lens=seq_lens)
    common |= dict(length=length, heads=heads, groups=n_groups)
    common |= dict(block_length=block_length, chunks_per_block=chunks_per_block)
    common |= dict(stride_dt_b=dt.stride(0), stride_dt_t=dt.stride(1))
    common |= dict(dt_min=dt_min, dt_max=dt_max, HEAD_DIM=head_dim, D_STATE=d_state, CHUNK_SIZE=chunk_size)
    arch, processors = machine(xbc.device)

    def scan(num_chunks: int, **given: Any) -> None:
        tile = scan_tuning(xbc.dtype, chunk_size, batch * num_chunks * heads, head_dim, d_state, arch, processors)
        grid = (batch * num_chunks * heads * triton.cdiv(head_dim, tile.block_p),)
        mamba2_scan_kernel[grid](**common, **given, d=d, y=y, num_chunks=num_chunks, **_options(tile))

    with on_device_of(xbc):
        initial_state = _state_arguments(ssm_state, state_index)
        if not wants_states and total_chunks == 1:
            scan(1, **conv_arguments, **initial_state, stride_ssm_chunk=0, first_chunk=0)
            return y, conv_out, ssm_out
        u = xbc.new_empty(xbc.shape)
        conv_blocks = num_blocks if wants_states else 0
        tiles = triton.cdiv(channels, CONV_TILE[1]) * (triton.cdiv(length, CONV_TILE[0]) + conv_blocks)
        mamba2_convolve_kernel[(batch * tiles,)](
            **conv_arguments, state_index=state_index, seq_lens=seq_lens, u=u, conv_out=conv_out, length=length,
            channels=channels, block_length=block_length, num_blocks=conv_blocks, BLOCK_T=CONV_TILE[0],
            BLOCK_C=CONV_TILE[1],
        )  # fmt: skip
        convolved: dict[str, Any] = dict(conv_weight=None, conv_bias=None, conv_state=None, num_conv_states=0, WIDTH=0)
        convolved |= dict(stride_conv_weight=0, stride_conv_row=0, stride_conv_channel=0)
        convolved |= dict(xbc=u, stride_xb=u.stride(0), stride_xt=channels)
        tile = states_tuning(xbc.dtype, head_dim, d_state)
        tiles = triton.cdiv(head_dim, tile.block_p) * triton.cdiv(d_state, tile.block_n)
        chunks_at_once = max(SCRATCH // (batch * heads * head_dim * d_state), 1)
        for first_chunk in range(0, total_chunks, chunks_at_once):
            num_chunks = min(chunks_at_once, total_chunks - first_chunk)
            chunk_states = ssm_out.new_empty(batch, num_chunks + 1, heads, head_dim, d_state)
            mamba2_states_kernel[(batch * heads * tiles,)](
                **common, **initial_state, u=u, chunk_states=chunk_states, ssm_out=ssm_out if wants_states else None,
                first_chunk=first_chunk, num_chunks=num_chunks, total_chunks=total_chunks, **_options(tile),
            )  # fmt: skip
            initial_state = _state_arguments(chunk_states[:, num_chunks], None)
            before_chunks = _state_arguments(chunk_states[:, 0], None) | dict(stride_ssm_chunk=chunk_states.stride(1))
            scan(num_chunks, **convolved, **before_chunks, first_chunk=first_chunk)
    return y, conv_out, ssm_out


def _build(kernel: Any, dtype: torch.dtype, tile: Tuning, fused: bool, **sizes: int) -> Build:
    """At the released sizes: heads of 64, state of 128, convolution of width 4."""
    names = kernel.arg_names
    pointers = names[: names.index("length")]
    absent = () if fused else ("conv_weight", "conv_bias", "conv_state", "state_index")
    types = {name: f"*{DTYPES[dtype]}" for name in pointers}
    types |= {
        name: "*fp32" for name in ("a_log", "d", "dt_bias", "ssm_state", "chunk_states", "ssm_out") if name in names
    }
    types |= {name: "*i64" for name in ("state_index", "seq_lens") if name in names}
    types |= {name: "i32" for name in names if name.islower() and name not in pointers}
    types |= {name: "fp32" for name in ("dt_min", "dt_max") if name in names}
    sizes |= dict(HEAD_DIM=64, D_STATE=128, WIDTH=4 if fused else 0, BLOCK_P=tile.block_p, BLOCK_N=tile.block_n)
    constants = {name: None for name in absent if name in names} | {n: x for n, x in sizes.items() if n in names}
    types = {name: type for name, type in types.items() if name not in constants}
    odd = frozenset((*COUNTS, "heads", "groups", "stride_conv_channel"))
    return Build(kernel, types, constants, tile.num_warps, tile.num_stages, odd)


def builds(arch: int) -> Iterator[Build]:
    """Denoising of 16, 32 and 64 tokens, few heads at a time and many; commit and prefill."""
    for dtype in DTYPES:
        for chunk_size in (16, 32, 64) if dtype == torch.bfloat16 else (16, 64):
            tiles = {scan_tuning(dtype, chunk_size, heads, 64, 128, arch, 132) for heads in (64, 4096)}
            for fused, tile in itertools.product((True, False), tiles):
                if chunk_size != 32 or fused:
                    yield _build(mamba2_scan_kernel, dtype, tile, fused, CHUNK_SIZE=chunk_size)
            yield _build(mamba2_states_kernel, dtype, states_tuning(dtype, 64, 128), False, CHUNK_SIZE=chunk_size)
        untiled = Tuning(0, 0, 4, 3)
        yield _build(mamba2_convolve_kernel, dtype, untiled, True, BLOCK_T=CONV_TILE[0], BLOCK_C=CONV_TILE[1])

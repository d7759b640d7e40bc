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

Predicted for an H200 (4.3 TB/s, 132 SMs), bfloat16, 64 heads of 64, state 128, 8 groups; nothing is measured yet.
B = 1, L = 16: 2.1 MB of state, 0.2 MB of tokens read and 0.13 MB written, 0.6 us at full speed. One launch of 128
programs, each a chain of two loads, six products and a dozen barriers: 4 to 5 us. B = 64: 155 MB, 36 us at full speed;
every head convolves B and C anew, 4096 exponentials and as many quotients: 45 to 60 us.
B = 1, L = 4096: the states of 64 chunks written and read, 62 us, and 50 MB of tokens three times, 35 us: 120 to 150 us.
Tried, by compiling for all GPUs: convolving x before the loop over the state, so that all loads are under way at once,
spills registers with 32 tokens and more; so do whole heads with 64 tokens where factors stay in registers (sm_80,
sm_120), and half the state at a time. Eight channels to a thread read their taps one by one, 110 scattered loads of two
bytes in a denoising step; two channels take half as many loads of a quarter of the cache lines.
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
from twotower_kernels.triton.mamba2_chunk import activated, bounds, exponential, product, steps
from twotower_kernels.triton.rows import length_at, row_at

TILE = (32, 128)  # tokens and channels of a program of the convolution
SCRATCH = 2**26  # numbers of states at a time, 256 MB
COUNTS = ("length", "conv_rows", "state_rows", "block", "block_chunks", "blocks", "first", "chunks", "all_chunks")


@triton.jit(do_not_specialize=COUNTS)
def mamba2_convolve_kernel(
    xbc,  # [B, L, C]
    conv_weight,  # [C, W]
    conv_bias,  # [C] or None
    conv_state,  # [rows, C, W-1] or None
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    u,  # [B, L, C] contiguous: written for the tokens that are there
    conv_out,  # [B, blocks, C, W-1] contiguous
    length,
    channels,
    conv_rows,
    block,
    blocks,
    xbc_batch,
    xbc_token,
    weight_row,
    conv_row,
    conv_channel,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of a row and a tile of channels, some programs have a tile of tokens each, the others the end of a block each."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(length, TOKENS)
    piece = tl.program_id(0) // channel_tiles % (tiles + blocks)
    b = (tl.program_id(0) // channel_tiles // (tiles + blocks)).to(tl.int64)
    channel = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    tokens = length_at(seq_lens, b, length)
    xbc += b * xbc_batch
    if conv_state is not None:
        conv_state += row_at(state_index, b, 1, conv_rows) * conv_row
    if piece < tiles:
        time = piece.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        real = time < tokens
        value = activated(
            xbc, conv_weight, conv_bias, conv_state, time, real, channel, inside, xbc_token, weight_row, conv_channel,
            WIDTH,
        )  # fmt: skip
        at = u + (b * length + time)[:, None] * channels + channel[None, :]
        tl.store(at, value, mask=real[:, None] & inside[None, :])
    else:
        number = (piece - tiles).to(tl.int64)
        newest = tl.minimum((number + 1) * block, tokens)
        out = conv_out + ((b * blocks + number) * channels + channel) * (WIDTH - 1)
        for w in tl.static_range(WIDTH - 1):
            seen = newest + (w + 1 - WIDTH)
            column = tl.load(xbc + seen * xbc_token + channel, mask=inside & (seen >= 0), other=0)
            if conv_state is not None:
                old = conv_state + channel.to(tl.int64) * conv_channel + (newest + w)
                column = tl.where(seen < 0, tl.load(old, mask=inside & (seen < 0), other=0).to(column.dtype), column)
            tl.store(out + w, column, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def mamba2_states_kernel(
    u,  # [B, L, C] contiguous
    dt,  # [B, L, heads]
    a_log,  # [heads]
    dt_bias,  # [heads]
    ssm_state,  # [rows, heads, DIM, STATE] or None: before the first chunk
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    seeds,  # [B, chunks + 1, heads, DIM, STATE] contiguous: before every chunk, and after the last
    ssm_out,  # [B, blocks, heads, DIM, STATE] contiguous or None: after every block
    length,
    heads,
    groups,
    state_rows,
    block,
    block_chunks,
    first,
    chunks,
    all_chunks,
    dt_batch,
    dt_token,
    ssm_row,
    ssm_head,
    ssm_dim,
    dt_min,
    dt_max,
    DIM: tl.constexpr,
    STATE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,  # of head_dim
    DEPTH: tl.constexpr,  # of the state
):
    across: tl.constexpr = (STATE + DEPTH - 1) // DEPTH
    tiles: tl.constexpr = (DIM + ROWS - 1) // ROWS * across
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    group = head * groups // heads
    p = tile // across * ROWS + tl.arange(0, ROWS)
    n = tile % across * DEPTH + tl.arange(0, DEPTH)
    here = (p < DIM)[:, None] & (n < STATE)[None, :]
    channels = heads * DIM + 2 * groups * STATE
    tokens = length_at(seq_lens, b, length)
    u += b * length * channels
    dt += b * dt_batch
    size = tl.cast(heads, tl.int64) * DIM * STATE  # of a state
    at = (head * DIM + p[:, None]) * STATE + n[None, :]
    state = tl.zeros((ROWS, DEPTH), tl.float32)
    if ssm_state is not None:
        from_row = ssm_state + row_at(state_index, b, 1, state_rows) * ssm_row + head.to(tl.int64) * ssm_head
        state = tl.load(from_row + p.to(tl.int64)[:, None] * ssm_dim + n[None, :], mask=here, other=0).to(tl.float32)
    t = tl.arange(0, TOKENS)
    for chunk in range(first, first + chunks):
        slot = seeds + (b * (chunks + 1) + (chunk - first)) * size
        tl.store(slot + at, state, mask=here)
        start, end = bounds(chunk, block, block_chunks, length, TOKENS)
        count = tl.minimum(end, tokens) - start
        time = (start + t).to(tl.int64)
        there = t < count
        step, log_decay = steps(dt, time, there, dt_token, dt_bias, a_log, head, dt_min, dt_max)
        # Of the tokens after each: sums of their own, since differences of running sums would cancel.
        _, later = steps(dt, time + 1, t + 1 < count, dt_token, dt_bias, a_log, head, dt_min, dt_max)
        kept = step * exponential(tl.cumsum(later, 0, reverse=True))
        x = tl.load(
            u + time[None, :] * channels + (head * DIM + p)[:, None], mask=(p < DIM)[:, None] & there[None, :], other=0
        )
        inputs = tl.load(
            u + time[:, None] * channels + (heads * DIM + group * STATE + n)[None, :],
            mask=there[:, None] & (n < STATE)[None, :],
            other=0,
        )
        added = product(x.to(tl.float32) * kept[None, :], inputs, tl.zeros((ROWS, DEPTH), tl.float32))
        state = exponential(tl.sum(log_decay)) * state + added
        if ssm_out is not None and ((chunk + 1) % block_chunks == 0 or chunk + 1 == all_chunks):
            blocks = (all_chunks + block_chunks - 1) // block_chunks
            tl.store(ssm_out + (b * blocks + chunk // block_chunks) * size + at, state, mask=here)
    tl.store(seeds + (b * (chunks + 1) + chunks) * size + at, state, mask=here)


@triton.jit
def fetch_state(ssm_state, ssm_dim, p, DIM: tl.constexpr, STATE: tl.constexpr, DEPTH: tl.constexpr):
    """Rows p of a head's state into the L2. The compiler puts their loads behind the convolution's sums, where they
    would wait for the memory anew. So one number of every 32 bytes is read beforehand, and used by nobody; the barrier
    keeps it there."""
    n = 8 * tl.arange(0, DEPTH // 8)
    here = (p < DIM)[None, :] & (n < STATE)[:, None]
    tl.load(ssm_state + p.to(tl.int64)[None, :] * ssm_dim + n[:, None], mask=here, volatile=True)
    tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mamba2_scan_kernel(
    xbc,  # [B, L, C], or without WIDTH what the convolution made of it
    dt,  # [B, L, heads]
    conv_weight,  # [C, W] or None
    conv_bias,  # [C] or None
    a_log,  # [heads]
    d,  # [heads]
    dt_bias,  # [heads]
    conv_state,  # [rows, C, W-1] or None
    ssm_state,  # [rows, slots, heads, DIM, STATE] or None: before every chunk
    state_index,  # [B] or None
    seq_lens,  # [B] or None
    y,  # [B, L, heads * DIM] contiguous
    length,
    heads,
    groups,
    conv_rows,
    state_rows,
    block,
    block_chunks,
    first,
    chunks,
    xbc_batch,
    xbc_token,
    dt_batch,
    dt_token,
    weight_row,
    conv_row,
    conv_channel,
    ssm_row,
    ssm_slot,
    ssm_head,
    ssm_dim,
    dt_min,
    dt_max,
    DIM: tl.constexpr,
    STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,  # of head_dim
    DEPTH: tl.constexpr,  # of the state at a time
):
    # Where registers suffice, nothing is loaded from afar behind a barrier.
    AT_ONCE: tl.constexpr = TOKENS == 16 and ROWS <= 32 and DEPTH >= STATE
    parts: tl.constexpr = (DIM + ROWS - 1) // ROWS
    part = tl.program_id(0) % parts
    head = tl.program_id(0) // parts % heads
    pair = tl.program_id(0) // parts // heads
    b = (pair // chunks).to(tl.int64)
    group = head * groups // heads
    start, end = bounds(first + pair % chunks, block, block_chunks, length, TOKENS)
    count = tl.minimum(end, length_at(seq_lens, b, length)) - start
    p = part * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    real = t < count
    time = (start + t).to(tl.int64)
    xbc += b * xbc_batch
    if conv_state is not None:
        conv_state += row_at(state_index, b, 1, conv_rows) * conv_row
    if ssm_state is not None:
        ssm_state += row_at(state_index, b, 1, state_rows) * ssm_row
        ssm_state += pair % chunks * tl.cast(ssm_slot, tl.int64) + head.to(tl.int64) * ssm_head
        if AT_ONCE:
            fetch_state(ssm_state, ssm_dim, p, DIM, STATE, DEPTH)

    if AT_ONCE:
        step, log_decay = steps(dt + b * dt_batch, time, real, dt_token, dt_bias, a_log, head, dt_min, dt_max)
        x = activated(
            xbc, conv_weight, conv_bias, conv_state, time, real, head * DIM + p, p < DIM, xbc_token, weight_row,
            conv_channel, WIDTH,
        )  # fmt: skip
    scores = tl.zeros((TOKENS, TOKENS), tl.float32)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(0, STATE, DEPTH):
        n = k + tl.arange(0, DEPTH)
        channel = heads * DIM + group * STATE + n
        inputs = activated(
            xbc, conv_weight, conv_bias, conv_state, time, real, channel, n < STATE, xbc_token, weight_row,
            conv_channel, WIDTH,
        )  # fmt: skip
        channel += groups * STATE
        outputs = activated(
            xbc, conv_weight, conv_bias, conv_state, time, real, channel, n < STATE, xbc_token, weight_row,
            conv_channel, WIDTH,
        )  # fmt: skip
        if ssm_state is not None:
            here = (p < DIM)[None, :] & (n < STATE)[:, None]
            seed = tl.load(ssm_state + p.to(tl.int64)[None, :] * ssm_dim + n[:, None], mask=here, other=0)
            total = product(outputs, seed.to(tl.float32), total)
        scores = product(outputs, tl.trans(inputs), scores)

    if not AT_ONCE:
        step, log_decay = steps(dt + b * dt_batch, time, real, dt_token, dt_bias, a_log, head, dt_min, dt_max)
        x = activated(
            xbc, conv_weight, conv_bias, conv_state, time, real, head * DIM + p, p < DIM, xbc_token, weight_row,
            conv_channel, WIDTH,
        )  # fmt: skip
    skip = tl.load(d + head).to(tl.float32)
    # [t, u]: of the tokens after u up to t. Sums of their own, since differences of running sums would cancel.
    between = tl.cumsum(tl.where(t[:, None] > t[None, :], log_decay[:, None], 0), 0)
    mixing = tl.where(t[:, None] >= t[None, :], scores * exponential(between) * step[None, :], 0)
    # An x that is not finite must not reach the tokens before it: their 0 would make NaN of it.
    wide = x.to(tl.float32)
    finite = wide - wide == 0
    total *= exponential(tl.cumsum(log_decay, 0))[:, None]
    total = product(mixing, tl.where(finite, x, 0), total) + skip * wide
    spoiled = tl.cumsum(tl.where(finite, 0, 1), 0) > 0
    total = tl.where(spoiled, float("nan"), total)
    at = y + ((b * length + time) * heads * DIM)[:, None] + (head * DIM + p)[None, :]
    value = tl.where(real[:, None], total, 0).to(y.dtype.element_ty)
    tl.store(at, value, mask=(time < end)[:, None] & (p < DIM)[None, :])


@dataclass(frozen=True)
class Tuning:
    """A program's tile: `rows` of head_dim, `depth` of the state (at a time, in the scan)."""

    rows: int
    depth: int
    warps: int
    stages: int


def chunk_tokens(block: int) -> int:
    """Tokens of a chunk, for blocks of so many."""
    return min(max(triton.next_power_of_2(block), 16), 64)


def _fitted(tile: Tuning, dim: int, state: int) -> Tuning:
    """Not larger than there is to do, and at least what a product needs."""
    rows, depth = (max(triton.next_power_of_2(size), 16) for size in (dim, state))
    return replace(tile, rows=min(tile.rows, rows), depth=min(tile.depth, depth))


def scan_tuning(
    dtype: torch.dtype, tokens: int, heads: int, dim: int, state: int, arch: int, processors: int
) -> Tuning:
    """Tile for so many (chunk, head) pairs. Whole heads convolve B and C least often; halves of them keep more
    processors busy, and on sm_80 and sm_120, where factors are kept in registers, fit 64 tokens. Products without
    tensor cores keep them there everywhere."""
    if dtype != torch.bfloat16:
        return _fitted(Tuning(32, 32, 8, 1) if tokens == 16 else Tuning(16, 16, 8, 1), dim, state)
    whole = heads >= processors and (tokens < 64 or arch in (90, 100))
    return _fitted(Tuning(64 if whole else 32, 128 if tokens == 16 else 32, 8, 1), dim, state)


def states_tuning(dtype: torch.dtype, dim: int, state: int) -> Tuning:
    return _fitted(Tuning(32, 64, 8, 4) if dtype == torch.bfloat16 else Tuning(16, 32, 4, 2), dim, state)


def _options(tile: Tuning) -> dict[str, int]:
    return dict(ROWS=tile.rows, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages)


def _state(state: Tensor | None, index: Tensor | None) -> dict[str, Any]:
    """What a kernel is told of the states before the first chunk."""
    strides = (0, 0, 0) if state is None else state.stride()[:3]
    told = dict(zip(("ssm_row", "ssm_head", "ssm_dim"), strides, strict=True))
    return told | dict(ssm_state=state, state_index=index, state_rows=0 if state is None else len(state))


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
    (batch, length, channels), heads, width = xbc.shape, dt.shape[2], conv_weight.shape[1]
    state = (channels - heads * head_dim) // (2 * n_groups)
    # Blocks, after each of which states are wanted, and the chunks that they are cut into.
    states = return_states or states_every > 0
    block = min(states_every or length, length) or 1
    blocks = -(-length // block) if states_every else 1
    tokens = chunk_tokens(block)
    block_chunks = -(-block // tokens)
    last = max(-(-(length - (blocks - 1) * block) // tokens), 1)  # of an empty block, one empty chunk
    all_chunks = (blocks - 1) * block_chunks + last if blocks else 0
    rows = [batch, blocks] if states_every else [batch]
    y = xbc.new_empty(batch, length, heads * head_dim)
    conv_out = xbc.new_empty([*rows, channels, width - 1] if states else 0)
    ssm_out = xbc.new_empty([*rows, heads, head_dim, state] if states else 0, dtype=torch.float32)
    if batch * all_chunks == 0:
        return y, conv_out, ssm_out

    conv: dict[str, Any] = dict(conv_weight=conv_weight, conv_bias=conv_bias, conv_state=conv_state)
    conv |= dict(weight_row=conv_weight.stride(0))
    conv_strides = (0, 0) if conv_state is None else conv_state.stride()[:2]
    conv |= dict(conv_row=conv_strides[0], conv_channel=conv_strides[1], WIDTH=width)
    conv |= dict(xbc=xbc, xbc_batch=xbc.stride(0), xbc_token=xbc.stride(1))
    conv |= dict(conv_rows=0 if conv_state is None else len(conv_state))
    common: dict[str, Any] = dict(dt=dt, a_log=a_log, dt_bias=dt_bias, seq_lens=seq_lens)
    common |= dict(length=length, heads=heads, groups=n_groups)
    common |= dict(block=block, block_chunks=block_chunks, dt_batch=dt.stride(0), dt_token=dt.stride(1))
    common |= dict(dt_min=dt_min, dt_max=dt_max, DIM=head_dim, STATE=state, TOKENS=tokens)
    arch, processors = machine(xbc.device)

    def scan(chunks: int, **given: Any) -> None:
        tile = scan_tuning(xbc.dtype, tokens, batch * chunks * heads, head_dim, state, arch, processors)
        grid = (batch * chunks * heads * triton.cdiv(head_dim, tile.rows),)
        mamba2_scan_kernel[grid](**common, **given, d=d, y=y, chunks=chunks, **_options(tile))

    with on_device_of(xbc):
        before = _state(ssm_state, state_index)
        if not states and all_chunks == 1:
            scan(1, **conv, **before, ssm_slot=0, first=0)
            return y, conv_out, ssm_out
        u = xbc.new_empty(xbc.shape)
        ends = blocks if states else 0
        tiles = triton.cdiv(channels, TILE[1]) * (triton.cdiv(length, TILE[0]) + ends)
        mamba2_convolve_kernel[(batch * tiles,)](
            **conv, state_index=state_index, seq_lens=seq_lens, u=u, conv_out=conv_out, length=length,
            channels=channels, block=block, blocks=ends, TOKENS=TILE[0], CHANNELS=TILE[1],
        )  # fmt: skip
        activated: dict[str, Any] = dict(
            conv_weight=None, conv_bias=None, conv_state=None, weight_row=0, conv_row=0, conv_channel=0
        )
        activated |= dict(xbc=u, xbc_batch=u.stride(0), xbc_token=channels, conv_rows=0, WIDTH=0)
        tile = states_tuning(xbc.dtype, head_dim, state)
        tiles = triton.cdiv(head_dim, tile.rows) * triton.cdiv(state, tile.depth)
        most = max(SCRATCH // (batch * heads * head_dim * state), 1)
        for first in range(0, all_chunks, most):
            chunks = min(most, all_chunks - first)
            seeds = ssm_out.new_empty(batch, chunks + 1, heads, head_dim, state)
            mamba2_states_kernel[(batch * heads * tiles,)](
                **common, **before, u=u, seeds=seeds, ssm_out=ssm_out if states else None, first=first, chunks=chunks,
                all_chunks=all_chunks, **_options(tile),
            )  # fmt: skip
            before = _state(seeds[:, chunks], None)
            scan(chunks, **activated, **_state(seeds[:, 0], None), ssm_slot=seeds.stride(1), first=first)
    return y, conv_out, ssm_out


def _build(kernel: Any, dtype: torch.dtype, tile: Tuning, fused: bool, **sizes: int) -> Build:
    """At the released sizes: heads of 64, state of 128, convolution of width 4."""
    names = kernel.arg_names
    pointers = names[: names.index("length")]
    absent = () if fused else ("conv_weight", "conv_bias", "conv_state", "state_index")
    wide, indices = ("a_log", "d", "dt_bias", "ssm_state", "seeds", "ssm_out"), ("state_index", "seq_lens")
    types = {name: "*fp32" if name in wide else "*i64" if name in indices else f"*{DTYPES[dtype]}" for name in pointers}
    types |= {name: "i32" for name in names if name.islower() and name not in pointers}
    types |= {name: "fp32" for name in ("dt_min", "dt_max") if name in names}
    sizes |= dict(DIM=64, STATE=128, WIDTH=4 if fused else 0, ROWS=tile.rows, DEPTH=tile.depth)
    constants = {name: None for name in absent if name in names} | {n: x for n, x in sizes.items() if n in names}
    types = {name: type for name, type in types.items() if name not in constants}
    odd = frozenset((*COUNTS, "heads", "groups", "conv_channel"))
    return Build(kernel, types, constants, tile.warps, tile.stages, odd)


def builds(arch: int) -> Iterator[Build]:
    """Denoising of 16, 32 and 64 tokens, few heads at a time and many; commit and prefill."""
    for dtype in DTYPES:
        for tokens in (16, 32, 64) if dtype == torch.bfloat16 else (16, 64):
            tiles = {scan_tuning(dtype, tokens, heads, 64, 128, arch, 132) for heads in (64, 4096)}
            for fused, tile in itertools.product((True, False), tiles):
                if tokens != 32 or fused:
                    yield _build(mamba2_scan_kernel, dtype, tile, fused, TOKENS=tokens)
            yield _build(mamba2_states_kernel, dtype, states_tuning(dtype, 64, 128), False, TOKENS=tokens)
        plain = Tuning(0, 0, 4, 3)
        yield _build(mamba2_convolve_kernel, dtype, plain, True, TOKENS=TILE[0], CHANNELS=TILE[1])

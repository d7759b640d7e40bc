"""The experts' two products and the weighted sum over each token's experts. Formulas: `reference/moe.py`.

    hidden[pair] = act(up x[token])     one launch over all experts that were chosen, and the shared one
    y[pair]      = down hidden[pair]    another
    out[token]   = sum of weight y[pair], experts ascending, then the shared expert's y: a small third

Each product, the activation and each expert's result round to the tensors' dtype, as when the model was trained; sums
are float32. The third launch is what orders the sum without atomics: y goes through memory, which at N = 16 and k = 6
is a thousandth of the weights' bytes.

A program makes a tile of [rows of weights, pairs of one expert]. How many tiles an expert has is known on the device
only: the grid is the most that N k pairs can need, (N k + A (tokens - 1)) / tokens for A = min(E, N k) experts, and
each program finds its tile in the plan's offsets, or leaves. The shared expert's tiles come first: in the second
product they are twice as long as the others, and would be its tail.

Weights are the left factor, [rows, K], so that the 64 rows an instruction of Hopper's tensor cores wants are rows of
weights, and a tile of pairs may be as narrow as 16: an expert with one token costs no more than its weights. Both
factors are contiguous along K, which the tensor cores read from shared memory as they are. 64 divides 1856, 2688 and
3712: at the released sizes the narrow tiles leave no remainder along rows. Columns of programs vary fastest over the
grid: with many tokens, the programs at work share few experts, whose weights (10 MB per product) stay in the L2 for the
next tile of tokens. Scratch is N k (H + I) + N (H + J) numbers.

Decided on paper: no list of tiles from a launch of its own (about 2 us, where the search costs a program some 0.3 us
while its neighbours read); no splitting of K (partial sums to write and add, for a tail of a few us); no TMA. What is
predicted, and what the compiled code says: docs/gpu.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, machine, on_device_of, rows_contiguous
from twotower_kernels.triton.moe_tuning import NARROW, Tuning, overlaps, tuning

AHEAD = tl.constexpr(512)  # numbers of each row of `down` that are asked for before `hidden` is there
RELU2 = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
ACTIVATIONS = {"relu2": RELU2.value, "silu_gated": SILU.value, "gelu_gated": GELU.value}


@triton.jit
def _tile(offsets, index, experts, pairs, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CACHE: tl.constexpr):
    """Expert, first and last + 1 pair of a tile, in the plan's order; no pair if there is no such tile."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + e, mask=e < experts, other=0, cache_modifier=CACHE)
    end = tl.load(offsets + 1 + e, mask=e < experts, other=0, cache_modifier=CACHE)
    tiles = ((end - begin + TOKENS - 1) // TOKENS).to(tl.int32)
    expert = tl.sum((tl.cumsum(tiles) <= index).to(tl.int32))
    before = tl.sum(tl.where(e < expert, tiles, 0))
    first = tl.load(offsets + expert, mask=expert < experts, other=0, cache_modifier=CACHE)
    first += (index - before) * TOKENS
    last = tl.load(offsets + expert + 1, mask=expert < experts, other=0, cache_modifier=CACHE)
    return expert.to(tl.int64), tl.maximum(first, 0), tl.minimum(last, pairs)


@triton.jit
def _prefetch(matrix, first, rows, stride, size, ROWS: tl.constexpr):
    """Asks for the first `size` numbers of ROWS rows from the L2, which nothing waits for. Addresses and sizes are
    divisible by 16; a thread has half a row."""
    half = tl.arange(0, 2 * ROWS)
    row = tl.minimum(first + half // 2, rows - 1)
    at = matrix + row * stride + (half % 2) * (size // 2)
    bytes = size // 2 * (matrix.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
        "=r,l,r",
        [at.to(tl.int64), bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _after_the_kernel_before():
    """With programmatic dependent launch: waits until the kernel before has ended, and lets the next one begin. Writes
    come after this, and reads of all that a kernel has just written: what a kernel reads sooner was written before the
    kernel before it began to wait, in its turn."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _activated(gate, value, T: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rounded after every step. The tanh form of GELU is z / (1 + exp(-2u)), without cancellation at negative u."""
    value = value.to(T).to(tl.float32)
    if ACTIVATION == RELU2:
        return tl.where(value < 0, 0, value * value).to(T)  # NaN stays NaN
    gate = gate.to(T).to(tl.float32)
    z = gate
    if ACTIVATION == GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return ((gate / (1 + tl.exp(-z))).to(T).to(tl.float32) * value).to(T)


@triton.jit
def up_kernel(
    x,  # [N, H]
    up,  # [E, I or 2I, H]
    shared_up,  # [J or 2J, H]
    offsets,  # [E + 1]
    pairs,  # [N k], the plan's order
    hidden,  # [N k, I] in the plan's order, then [N, J]
    shared_tiles,
    tokens,
    top_k,
    experts,
    h,
    i,
    j,
    x_token,
    up_expert,
    up_row,
    shared_row,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # DEPTH divides H
    EXPERTS: tl.constexpr,  # a power of two, at least E
    PDL: tl.constexpr,  # programmatic dependent launch; numbers and addresses are divisible by 16
):
    T = x.dtype.element_ty
    lane = tl.arange(0, TOKENS)
    n = tl.cast(tokens, tl.int64)  # not tokens.to: Triton makes an argument that is 1 a Python number
    all_pairs = n * top_k
    program = tl.program_id(0)
    shared_programs = shared_tiles * tl.cdiv(j, ROWS)
    if PDL:
        # The shared expert's weights, whole, while the router is at work.
        if program < tl.cdiv(j, ROWS):
            long_row = tl.cast(shared_row, tl.int64)
            _prefetch(shared_up, program * ROWS, j, long_row, h, ROWS)
            if ACTIVATION != RELU2:
                _prefetch(shared_up + j * long_row, program * ROWS, j, long_row, h, ROWS)
        _after_the_kernel_before()
    if program < shared_programs:
        column = program % tl.cdiv(j, ROWS)
        first = (program // tl.cdiv(j, ROWS)).to(tl.int64) * TOKENS
        last = n
        place = tl.minimum(first + lane, last - 1)
        token = place
        w = shared_up
        stride = tl.cast(shared_row, tl.int64)
        size = tl.cast(j, tl.int32)
        out = hidden + all_pairs * i
    else:
        column = (program - shared_programs) % tl.cdiv(i, ROWS)
        index = (program - shared_programs) // tl.cdiv(i, ROWS)
        expert, first, last = _tile(offsets, index, experts, all_pairs, TOKENS, EXPERTS, "")
        place = tl.minimum(first + lane, last - 1)
        token = tl.load(pairs + place, mask=place >= 0, other=0) // top_k
        token = tl.minimum(tl.maximum(token, 0), tokens - 1)
        w = up + expert * up_expert
        stride = tl.cast(up_row, tl.int64)
        size = tl.cast(i, tl.int32)
        out = hidden
    if first >= last:
        return
    # Rows and pairs beyond the end repeat the last one: loads need no mask for them, and they are not stored.
    row = column * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, size - 1)
    k = tl.arange(0, DEPTH)
    x_at = x + token[None, :] * x_token + k[:, None]
    w_at = w + inside[:, None] * stride + k[None, :]
    value = tl.zeros((ROWS, TOKENS), tl.float32)
    gate = value
    if ACTIVATION != RELU2:
        u_at = w_at + size * stride
    for start in range(0, h, DEPTH):
        left = h - start
        xs = tl.load(x_at) if WHOLE else tl.load(x_at, mask=k[:, None] < left, other=0)
        ws = tl.load(w_at) if WHOLE else tl.load(w_at, mask=k[None, :] < left, other=0)
        if ACTIVATION == RELU2:
            value = tl.dot(ws, xs, value, input_precision="ieee")
        else:
            us = tl.load(u_at) if WHOLE else tl.load(u_at, mask=k[None, :] < left, other=0)
            gate = tl.dot(ws, xs, gate, input_precision="ieee")
            value = tl.dot(us, xs, value, input_precision="ieee")
            u_at += DEPTH
        x_at += DEPTH
        w_at += DEPTH
    result = _activated(gate, value, T, ACTIVATION)
    to = out + (first + lane)[None, :] * size + row[:, None]
    tl.store(to, result, mask=(row[:, None] < size) & ((first + lane)[None, :] < last))


@triton.jit
def down_kernel(
    hidden,  # [N k, I] in the plan's order, then [N, J]
    down,  # [E, H, I]
    shared_down,  # [H, J]
    offsets,  # [E + 1]
    pairs,  # [N k], the plan's order
    y,  # [N k, H] in the pairs' own order, then [N, H]
    shared_tiles,
    tokens,
    top_k,
    experts,
    h,
    i,
    j,
    down_expert,
    down_row,
    shared_row,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # DEPTH divides I and J
    EXPERTS: tl.constexpr,  # a power of two, at least E
    PDL: tl.constexpr,  # programmatic dependent launch; numbers and addresses are divisible by 16
):
    T = hidden.dtype.element_ty
    CACHE: tl.constexpr = ".cg" if PDL else ""  # this kernel may begin where an older plan is in the L1
    lane = tl.arange(0, TOKENS)
    n = tl.cast(tokens, tl.int64)  # not tokens.to: Triton makes an argument that is 1 a Python number
    all_pairs = n * top_k
    columns = tl.cdiv(h, ROWS)
    column = tl.program_id(0) % columns
    index = tl.program_id(0) // columns
    if index < shared_tiles:
        first = index.to(tl.int64) * TOKENS
        last = n
        place = tl.minimum(first + lane, last - 1)
        line = all_pairs + place
        w = shared_down
        stride = tl.cast(shared_row, tl.int64)
        size = tl.cast(j, tl.int32)
        source = hidden + all_pairs * i
    else:
        expert, first, last = _tile(offsets, index - shared_tiles, experts, all_pairs, TOKENS, EXPERTS, CACHE)
        place = tl.minimum(first + lane, last - 1)
        line = tl.load(pairs + place, mask=place >= 0, other=0, cache_modifier=CACHE)
        line = tl.minimum(tl.maximum(line, 0), all_pairs - 1)
        w = down + expert * down_expert
        stride = tl.cast(down_row, tl.int64)
        size = tl.cast(i, tl.int32)
        source = hidden
    if PDL:
        if first < last:
            _prefetch(w, column * ROWS, h, stride, tl.minimum(size, AHEAD), ROWS)
        _after_the_kernel_before()
    if first >= last:
        return
    row = column * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    x_at = source + place[None, :] * size + k[:, None]
    w_at = w + tl.minimum(row, h - 1)[:, None] * stride + k[None, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, size, DEPTH):
        left = size - start
        xs = tl.load(x_at) if WHOLE else tl.load(x_at, mask=k[:, None] < left, other=0)
        ws = tl.load(w_at) if WHOLE else tl.load(w_at, mask=k[None, :] < left, other=0)
        total = tl.dot(ws, xs, total, input_precision="ieee")
        x_at += DEPTH
        w_at += DEPTH
    to = y + line[None, :] * h + row[:, None]
    tl.store(to, total.to(T), mask=(row[:, None] < h) & ((first + lane)[None, :] < last))


@triton.jit
def combine_kernel(
    y,  # [N k, H], then [N, H] if shared
    weights,  # [N, k]
    chosen,  # [N, k]
    out,  # [N, H] contiguous
    tokens,
    top_k,
    experts,
    h,
    weights_token,
    chosen_token,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,  # a power of two, at least k
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch
):
    T = out.dtype.element_ty
    CACHE: tl.constexpr = ".cg" if PDL else ""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < h
    choice = tl.arange(0, CHOICES)
    expert = tl.load(chosen + token * chosen_token + choice, mask=choice < top_k, other=0, cache_modifier=CACHE)
    expert = expert.to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    # Ascending experts, and ascending choices of the same; an expert that does not exist comes last, as NaN.
    key = tl.where(known, expert, experts) * top_k + choice
    key = tl.where(choice < top_k, key, 0x7FFFFFFFFFFFFFFF)
    none = tl.cast(experts, tl.int64) * top_k
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.full((), -1, tl.int64)
    if PDL:
        _after_the_kernel_before()
    for _ in range(top_k):
        at = tl.min(tl.where(key > at, key, 0x7FFFFFFFFFFFFFFF))
        place = at % top_k
        value = tl.load(y + (token * top_k + place) * h + column, mask=inside, other=0).to(tl.float32)
        weight = tl.load(weights + token * weights_token + place).to(tl.float32)
        total += tl.where(at < none, weight * value, float("nan"))
    if SHARED:
        shared = y + (tl.cast(tokens, tl.int64) * top_k + token) * h
        total = total.to(T).to(tl.float32) + tl.load(shared + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * h + column, total.to(T), mask=inside)


def _options(tile: Tuning) -> dict[str, int]:
    tiled = dict(ROWS=tile.rows, TOKENS=tile.tokens, DEPTH=tile.depth)
    return tiled | dict(num_warps=tile.warps, num_stages=tile.stages)


def _most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Each expert that was chosen has less than one tile's pairs beside its full tiles."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def moe_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    counts: Tensor | None,
    offsets: Tensor | None,
    pairs: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    activation: str,
) -> Tensor:
    """A given plan cannot be compared with the experts without waiting for the device: tokens whose experts it leaves
    out, or that are outside [0, E), become NaN."""
    check_dtype("moe_experts", x=x)
    if offsets is None or pairs is None:
        _, offsets, pairs = torch.ops.twotower.moe_plan.default(experts, w_up.shape[0])
    offsets, pairs = offsets.contiguous(), pairs.contiguous()
    shared = shared_up is not None
    x, w_up, w_down, weights, experts = map(rows_contiguous, (x, w_up, w_down, weights, experts))  # type: ignore[assignment]
    shared_up, shared_down = map(rows_contiguous, (shared_up, shared_down))
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    (n, h), (e, _, i), k = x.shape, w_down.shape, experts.shape[1]
    j = 0 if shared_down is None else shared_down.shape[1]
    # A shared expert that is not there has no tiles, but a place in the call: any matrix will do.
    if shared_up is None or shared_down is None:
        shared_up, shared_down = w_up, w_down
    up_strides = x.stride(0), *w_up.stride()[:2], shared_up.stride(-2)
    down_strides = *w_down.stride()[:2], shared_down.stride(-2)
    addresses = (tensor.data_ptr() for tensor in (x, w_up, w_down, shared_up, shared_down))
    aligned = not any(number % 16 for number in (h, i, j, *up_strides, *down_strides, *addresses))
    arch, _ = machine(x.device)
    up = tuning(x.dtype, n * k, e, activation != "relu2", aligned, arch)
    down = tuning(x.dtype, n * k, e, False, aligned, arch)
    shared_tiles = triton.cdiv(n, up.tokens) if shared else 0
    most = _most_tiles(n * k, e, up.tokens)
    hidden = x.new_empty(n * (k * i + j))
    y = x.new_empty((n * (k + shared), h))
    common = (shared_tiles, n, k, e, h, i, j)
    padded = triton.next_power_of_2(max(e, 1))
    up_programs = shared_tiles * triton.cdiv(j, up.rows) + most * triton.cdiv(i, up.rows)
    down_programs = (shared_tiles + most) * triton.cdiv(h, down.rows)
    # Each of the three relies on what the one before waits for, so all of them or none.
    narrow = aligned and up.tokens <= NARROW and up_programs > 0 and down_programs > 0
    pdl = dict(PDL=True, launch_pdl=True) if narrow and overlaps(x.device, x.dtype, arch) else dict(PDL=False)
    with on_device_of(x):
        if up_programs:
            up_kernel[(up_programs,)](
                *(x, w_up, shared_up, offsets, pairs, hidden, *common),
                *up_strides,
                ACTIVATION=ACTIVATIONS[activation],
                WHOLE=h % up.depth == 0,
                EXPERTS=padded,
                **_options(up) | pdl,
            )
        if down_programs:
            down_kernel[(down_programs,)](
                *(hidden, w_down, shared_down, offsets, pairs, y, *common),
                *down_strides,
                WHOLE=i % down.depth == 0 and j % down.depth == 0,
                EXPERTS=padded,
                **_options(down) | pdl,
            )
        block = _block(h)
        combine_kernel[(n, triton.cdiv(h, block))](
            *(y, weights, experts, out, n, k, e, h, weights.stride(0), experts.stride(0)),
            SHARED=shared,
            CHOICES=triton.next_power_of_2(max(k, 1)),
            BLOCK=block,
            **pdl,
        )
    return out


def _block(h: int) -> int:
    return min(triton.next_power_of_2(h), 512)


_SIZES = ("shared_tiles", "tokens", "top_k", "experts", "h", "i", "j")
_POINTERS = {
    up_kernel: ("x", "up", "shared_up", "offsets", "pairs", "hidden"),
    down_kernel: ("hidden", "down", "shared_down", "offsets", "pairs", "y"),
    combine_kernel: ("y", "weights", "chosen", "out"),
}
_INTEGERS = {
    up_kernel: (*_SIZES, "x_token", "up_expert", "up_row", "shared_row"),
    down_kernel: (*_SIZES, "down_expert", "down_row", "shared_row"),
    combine_kernel: ("tokens", "top_k", "experts", "h", "weights_token", "chosen_token"),
}
_FEW = frozenset(("shared_tiles", "tokens", "top_k", "experts", "weights_token", "chosen_token"))  # not divided by 16


def _build(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], tile: Tuning | None, numbers: str) -> Build:
    """numbers: "aligned" to 16, "any", or "one", which Triton compiles as constants."""
    types = {name: f"*{DTYPES[dtype]}" for name in _POINTERS[kernel]}
    types |= {name: "*i64" for name in ("offsets", "pairs") if name in types}
    types |= {name: type for name, type in (("weights", "*fp32"), ("chosen", "*i32")) if name in types}
    if numbers == "one":
        constants = constants | {name: 1 for name in _INTEGERS[kernel]}
    else:
        types |= {name: "i32" for name in _INTEGERS[kernel]}
    odd = _FEW if numbers == "aligned" else frozenset(types)
    if tile is None:
        return Build(kernel, types, constants, odd=odd)
    constants = constants | dict(ROWS=tile.rows, TOKENS=tile.tokens, DEPTH=tile.depth)
    needs = () if dtype == torch.float32 else ("wgmma",)
    return Build(kernel, types, constants, tile.warps, tile.stages, odd, needs)


def builds(arch: int) -> Iterator[Build]:
    """Every tile that `tuning` gives; the narrowest for every activation and kind of numbers."""
    for dtype in DTYPES:
        widths = (96, 4096) if dtype == torch.float32 else (96, 4096, 8192, 16384)
        for pairs, gated in itertools.product(widths, (False, True)):
            kinds = [("aligned", True, 128, False)]  # numbers, WHOLE, EXPERTS, PDL
            if dtype != torch.float16:  # which is bfloat16 but for an instruction
                kinds += [("aligned", False, 128, False)] if pairs in (96, 16384) else []
                kinds += [("any", False, 128, False)] if pairs in (96, 4096) else []
                kinds += [("one", False, 1, False)] if pairs == 96 else []
            if dtype == torch.bfloat16 and pairs in (96, 4096) and arch >= 90:
                kinds += [("aligned", whole, 128, True) for whole in (False, True)]
            for numbers, whole, experts, pdl in kinds:
                tile = tuning(dtype, pairs, 128, gated, numbers == "aligned", arch)
                constants = {"WHOLE": whole, "EXPERTS": experts, "PDL": pdl}
                if not gated:
                    yield _build(up_kernel, dtype, constants | {"ACTIVATION": RELU2.value}, tile, numbers)
                    yield _build(down_kernel, dtype, constants, tile, numbers)
                    continue
                yield _build(up_kernel, dtype, constants | {"ACTIVATION": SILU.value}, tile, numbers)
                if pairs == 96:
                    yield _build(up_kernel, dtype, constants | {"ACTIVATION": GELU.value}, tile, numbers)
        for shared, h, pdl in itertools.product((False, True), (64, 2688), (False, True)[: 1 + (arch >= 90)]):
            constants = dict(SHARED=shared, CHOICES=8, BLOCK=_block(h), PDL=pdl)
            yield _build(combine_kernel, dtype, constants, None, "aligned")
        yield _build(combine_kernel, dtype, dict(SHARED=True, CHOICES=1, BLOCK=1, PDL=False), None, "one")

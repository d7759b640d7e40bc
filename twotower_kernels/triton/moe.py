"""The experts' two products and the weighted sum over each token's experts. Formulas: `reference/moe.py`.

    hidden[pair] = act(up x[token])     one launch over all experts that were chosen, and the shared one
    y[pair]      = down hidden[pair]    another
    out[token]   = sum of weight y[pair], experts ascending, then the shared expert's y: a small third

Each product, the activation and each expert's result round to the tensors' dtype, as when the model was trained; sums
are float32. The third launch is what orders the sum without atomics: y goes through memory, which at N = 16 and k = 6
is a thousandth of the weights' bytes.

A pair is a token and one of its k choices; its slot is where it stands once pairs are sorted by expert. A program makes
a tile of BLOCK_M rows of weights by BLOCK_N slots of one expert. How many tiles an expert has is known on the device
only: the grid is the most that N k pairs can need, (N k + A (BLOCK_N - 1)) / BLOCK_N for A = min(E, N k) experts, and
each program finds its tile in the experts' offsets, or leaves. The shared expert's tiles come first: in the second
product they are twice as long as the others, and would be its tail.

Weights are the left factor, [BLOCK_M, K], so that the 64 rows an instruction of Hopper's tensor cores wants are rows of
weights, and a tile of pairs may be as narrow as 16: an expert with one token costs no more than its weights. Both
factors are contiguous along K, which the tensor cores read from shared memory as they are. 64 divides 1856, 2688 and
3712: at the released sizes the narrow tiles leave no remainder along rows. Columns of programs vary fastest over the
grid: with many tokens, the programs at work share few experts, whose weights (10 MB per product) stay in the L2 for the
next tile of tokens. Scratch is N k (H + I) + N (H + J) numbers.

Decided on paper: no list of tiles from a launch of its own (about 2 us, where the search costs a program some 0.3 us
while its neighbours read); no splitting of K (partial sums to write and add, for a tail of a few us); no TMA. What is
predicted, and what the compiled code says: docs/gpu_kernels.md.
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
from twotower_kernels.triton.moe_activation import ACTIVATIONS, SILU_GATED, activated
from twotower_kernels.triton.moe_tuning import NARROW, Tuning, overlaps, tuning

AHEAD = tl.constexpr(512)  # numbers of each row of `down` that are asked for before `hidden` is there


@triton.jit
def _tile(
    expert_offsets,
    index,
    num_experts,
    num_pairs,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Expert, first and last + 1 slot of a tile; no slot if there is no such tile."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(expert_offsets + e, mask=e < num_experts, other=0, cache_modifier=CACHE)
    end = tl.load(expert_offsets + 1 + e, mask=e < num_experts, other=0, cache_modifier=CACHE)
    tiles = ((end - begin + BLOCK_N - 1) // BLOCK_N).to(tl.int32)
    expert = tl.sum((tl.cumsum(tiles) <= index).to(tl.int32))
    before = tl.sum(tl.where(e < expert, tiles, 0))
    first = tl.load(expert_offsets + expert, mask=expert < num_experts, other=0, cache_modifier=CACHE)
    first += (index - before) * BLOCK_N
    last = tl.load(expert_offsets + expert + 1, mask=expert < num_experts, other=0, cache_modifier=CACHE)
    return expert.to(tl.int64), tl.maximum(first, 0), tl.minimum(last, num_pairs)


@triton.jit
def _prefetch(matrix, first, num_rows, stride, size, BLOCK_M: tl.constexpr):
    """Asks for the first `size` numbers of BLOCK_M rows from the L2, which nothing waits for. Addresses and sizes are
    divisible by 16; a thread has half a row."""
    half = tl.arange(0, 2 * BLOCK_M)
    row = tl.minimum(first + half // 2, num_rows - 1)
    ptrs = matrix + row * stride + (half % 2) * (size // 2)
    bytes = size // 2 * (matrix.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
        "=r,l,r",
        [ptrs.to(tl.int64), bytes],
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
def up_kernel(
    x,  # [N, H]
    up,  # [E, I or 2I, H]
    shared_up,  # [J or 2J, H]
    up_bias,  # [E, I or 2I] or None, of the routed experts
    expert_offsets,  # [E + 1]
    sorted_token_ids,  # [N k], token * k + choice of every slot
    hidden,  # [N k, I] by slot, then [N, J]
    shared_tiles,
    num_tokens,
    top_k,
    num_experts,
    h,
    i,
    j,
    stride_xn,
    stride_ue,
    stride_ui,
    stride_sj,
    stride_be,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides H
    BLOCK_E: tl.constexpr,  # a power of two, at least E
    PDL: tl.constexpr,  # programmatic dependent launch; numbers and addresses are divisible by 16
):
    T = x.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    n = tl.cast(num_tokens, tl.int64)  # not num_tokens.to: Triton makes an argument that is 1 a Python number
    num_pairs = n * top_k
    pid = tl.program_id(0)
    shared_programs = shared_tiles * tl.cdiv(j, BLOCK_M)
    if PDL:
        # The shared expert's weights, whole, while the router is at work.
        if pid < tl.cdiv(j, BLOCK_M):
            long_row = tl.cast(stride_sj, tl.int64)
            _prefetch(shared_up, pid * BLOCK_M, j, long_row, h, BLOCK_M)
            if ACTIVATION >= SILU_GATED:
                _prefetch(shared_up + j * long_row, pid * BLOCK_M, j, long_row, h, BLOCK_M)
        _after_the_kernel_before()
    if pid < shared_programs:
        pid_m = pid % tl.cdiv(j, BLOCK_M)
        first = (pid // tl.cdiv(j, BLOCK_M)).to(tl.int64) * BLOCK_N
        last = n
        slot = tl.minimum(first + offs_n, last - 1)
        token = slot
        expert = tl.full((), -1, tl.int64)
        w = shared_up
        stride = tl.cast(stride_sj, tl.int64)
        size = tl.cast(j, tl.int32)
        out = hidden + num_pairs * i
    else:
        pid_m = (pid - shared_programs) % tl.cdiv(i, BLOCK_M)
        index = (pid - shared_programs) // tl.cdiv(i, BLOCK_M)
        expert, first, last = _tile(expert_offsets, index, num_experts, num_pairs, BLOCK_N, BLOCK_E, "")
        slot = tl.minimum(first + offs_n, last - 1)
        token = tl.load(sorted_token_ids + slot, mask=slot >= 0, other=0) // top_k
        token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
        w = up + expert * stride_ue
        stride = tl.cast(stride_ui, tl.int64)
        size = tl.cast(i, tl.int32)
        out = hidden
    if first >= last:
        return
    # Rows of weights and slots beyond the end repeat the last one: loads need no mask for them, and they are not
    # stored.
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(offs_m, size - 1)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x + token[None, :] * stride_xn + offs_k[:, None]
    w_ptrs = w + inside[:, None] * stride + offs_k[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = value
    if ACTIVATION >= SILU_GATED:
        u_ptrs = w_ptrs + size * stride
    for start in range(0, h, BLOCK_K):
        left = h - start
        xs = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=offs_k[:, None] < left, other=0)
        ws = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=offs_k[None, :] < left, other=0)
        if ACTIVATION < SILU_GATED:
            value = tl.dot(ws, xs, value, input_precision="ieee")
        else:
            us = tl.load(u_ptrs) if EVEN_K else tl.load(u_ptrs, mask=offs_k[None, :] < left, other=0)
            gate = tl.dot(ws, xs, gate, input_precision="ieee")
            value = tl.dot(us, xs, value, input_precision="ieee")
            u_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if up_bias is not None:
        b_ptrs = up_bias + expert * stride_be + offs_m
        biased = (expert >= 0) & (offs_m < size)
        if ACTIVATION >= SILU_GATED:
            gate += tl.load(b_ptrs, mask=biased, other=0).to(tl.float32)[:, None]
            b_ptrs += size
        value += tl.load(b_ptrs, mask=biased, other=0).to(tl.float32)[:, None]
    result = activated(gate, value, alpha, limit, T, ACTIVATION)
    to = out + (first + offs_n)[None, :] * size + offs_m[:, None]
    tl.store(to, result, mask=(offs_m[:, None] < size) & ((first + offs_n)[None, :] < last))


@triton.jit
def down_kernel(
    hidden,  # [N k, I] by slot, then [N, J]
    down,  # [E, H, I]
    shared_down,  # [H, J]
    down_bias,  # [E, H] or None, of the routed experts
    expert_offsets,  # [E + 1]
    sorted_token_ids,  # [N k], token * k + choice of every slot
    y,  # [N k, H] in the order of token * k + choice, then [N, H]
    shared_tiles,
    num_tokens,
    top_k,
    num_experts,
    h,
    i,
    j,
    stride_de,
    stride_dh,
    stride_sj,
    stride_be,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides I and J
    BLOCK_E: tl.constexpr,  # a power of two, at least E
    PDL: tl.constexpr,  # programmatic dependent launch; numbers and addresses are divisible by 16
):
    T = hidden.dtype.element_ty
    CACHE: tl.constexpr = ".cg" if PDL else ""  # this kernel may begin where an older plan is in the L1
    offs_n = tl.arange(0, BLOCK_N)
    n = tl.cast(num_tokens, tl.int64)  # not num_tokens.to: Triton makes an argument that is 1 a Python number
    num_pairs = n * top_k
    num_m = tl.cdiv(h, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    index = tl.program_id(0) // num_m
    if index < shared_tiles:
        first = index.to(tl.int64) * BLOCK_N
        last = n
        slot = tl.minimum(first + offs_n, last - 1)
        y_row = num_pairs + slot
        expert = tl.full((), -1, tl.int64)
        w = shared_down
        stride = tl.cast(stride_sj, tl.int64)
        size = tl.cast(j, tl.int32)
        source = hidden + num_pairs * i
    else:
        index -= shared_tiles
        expert, first, last = _tile(expert_offsets, index, num_experts, num_pairs, BLOCK_N, BLOCK_E, CACHE)
        slot = tl.minimum(first + offs_n, last - 1)
        y_row = tl.load(sorted_token_ids + slot, mask=slot >= 0, other=0, cache_modifier=CACHE)
        y_row = tl.minimum(tl.maximum(y_row, 0), num_pairs - 1)
        w = down + expert * stride_de
        stride = tl.cast(stride_dh, tl.int64)
        size = tl.cast(i, tl.int32)
        source = hidden
    if PDL:
        if first < last:
            _prefetch(w, pid_m * BLOCK_M, h, stride, tl.minimum(size, AHEAD), BLOCK_M)
        _after_the_kernel_before()
    if first >= last:
        return
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = source + slot[None, :] * size + offs_k[:, None]
    w_ptrs = w + tl.minimum(offs_m, h - 1)[:, None] * stride + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        left = size - start
        xs = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=offs_k[:, None] < left, other=0)
        ws = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=offs_k[None, :] < left, other=0)
        acc = tl.dot(ws, xs, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if down_bias is not None:
        biased = (expert >= 0) & (offs_m < h)
        acc += tl.load(down_bias + expert * stride_be + offs_m, mask=biased, other=0).to(tl.float32)[:, None]
    to = y + y_row[None, :] * h + offs_m[:, None]
    tl.store(to, acc.to(T), mask=(offs_m[:, None] < h) & ((first + offs_n)[None, :] < last))


@triton.jit
def combine_kernel(
    y,  # [N k, H], then [N, H] if shared
    topk_weights,  # [N, k]
    topk_ids,  # [N, k]
    out,  # [N, H] contiguous
    num_tokens,
    top_k,
    num_experts,
    h,
    stride_wn,
    stride_tn,
    SHARED: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,  # a power of two, at least k
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch
):
    T = out.dtype.element_ty
    CACHE: tl.constexpr = ".cg" if PDL else ""
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs_h < h
    choice = tl.arange(0, BLOCK_TOPK)
    expert = tl.load(topk_ids + token * stride_tn + choice, mask=choice < top_k, other=0, cache_modifier=CACHE)
    expert = expert.to(tl.int64)
    known = (expert >= 0) & (expert < num_experts)
    # Ascending experts, and ascending choices of the same; what no expert here has made comes last, and is not added.
    key = tl.where(known, expert, num_experts) * top_k + choice
    key = tl.where(choice < top_k, key, 0x7FFFFFFFFFFFFFFF)
    none = tl.cast(num_experts, tl.int64) * top_k
    acc = tl.zeros((BLOCK_H,), tl.float32)
    last_key = tl.full((), -1, tl.int64)
    if PDL:
        _after_the_kernel_before()
    for _ in range(top_k):
        last_key = tl.min(tl.where(key > last_key, key, 0x7FFFFFFFFFFFFFFF))
        nth = last_key % top_k
        value = tl.load(y + (token * top_k + nth) * h + offs_h, mask=inside, other=0).to(tl.float32)
        weight = tl.load(topk_weights + token * stride_wn + nth).to(tl.float32)
        acc += tl.where(last_key < none, weight * value, 0)
    if SHARED:
        shared = y + (tl.cast(num_tokens, tl.int64) * top_k + token) * h
        acc = acc.to(T).to(tl.float32) + tl.load(shared + offs_h, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * h + offs_h, acc.to(T), mask=inside)


def _options(tile: Tuning) -> dict[str, int]:
    tiled = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    return tiled | dict(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _most_tiles(num_pairs: int, num_experts: int, block_n: int) -> int:
    """Each expert that was chosen has less than one tile's pairs beside its full tiles."""
    return (num_pairs + min(num_pairs, num_experts) * (block_n - 1)) // block_n


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
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """A given plan cannot be compared with the experts without waiting for the device: of a pair that it leaves out,
    though its expert is in [0, E), the result is undefined."""
    check_dtype("moe_experts", x=x)
    if offsets is None or pairs is None:
        _, offsets, pairs = torch.ops.twotower.moe_plan.default(experts, w_up.shape[0])
    offsets, pairs = offsets.contiguous(), pairs.contiguous()
    shared = shared_up is not None
    x, w_up, w_down, weights, experts = map(rows_contiguous, (x, w_up, w_down, weights, experts))  # type: ignore[assignment]
    shared_up, shared_down, up_bias, down_bias = map(rows_contiguous, (shared_up, shared_down, up_bias, down_bias))
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    (n, h), (e, _, i), k = x.shape, w_down.shape, experts.shape[1]
    j = 0 if shared_down is None else shared_down.shape[1]
    # A shared expert that is not there has no tiles, but is an argument: any matrix will do.
    if shared_up is None or shared_down is None:
        shared_up, shared_down = w_up, w_down
    up_strides = x.stride(0), *w_up.stride()[:2], shared_up.stride(-2)
    down_strides = *w_down.stride()[:2], shared_down.stride(-2)
    addresses = (tensor.data_ptr() for tensor in (x, w_up, w_down, shared_up, shared_down))
    aligned = not any(number % 16 for number in (h, i, j, *up_strides, *down_strides, *addresses))
    arch, _ = machine(x.device)
    kind = ACTIVATIONS[activation]
    up = tuning(x.dtype, n * k, e, kind >= SILU_GATED.value, aligned, arch)
    down = tuning(x.dtype, n * k, e, False, aligned, arch)
    shared_tiles = triton.cdiv(n, up.block_n) if shared else 0
    most = _most_tiles(n * k, e, up.block_n)
    hidden = x.new_empty(n * (k * i + j))
    y = x.new_empty((n * (k + shared), h))
    common = (shared_tiles, n, k, e, h, i, j)
    padded = triton.next_power_of_2(max(e, 1))
    up_programs = shared_tiles * triton.cdiv(j, up.block_m) + most * triton.cdiv(i, up.block_m)
    down_programs = (shared_tiles + most) * triton.cdiv(h, down.block_m)
    # Each of the three relies on what the one before waits for, so all of them or none.
    narrow = aligned and up.block_n <= NARROW and up_programs > 0 and down_programs > 0
    pdl = dict(PDL=True, launch_pdl=True) if narrow and overlaps(x.device, x.dtype, arch) else dict(PDL=False)
    with on_device_of(x):
        if up_programs:
            up_kernel[(up_programs,)](
                *(x, w_up, shared_up, up_bias, offsets, pairs, hidden, *common),
                *(*up_strides, 0 if up_bias is None else up_bias.stride(0), float(alpha), float(limit)),
                ACTIVATION=kind,
                EVEN_K=h % up.block_k == 0,
                BLOCK_E=padded,
                **_options(up) | pdl,
            )
        if down_programs:
            down_kernel[(down_programs,)](
                *(hidden, w_down, shared_down, down_bias, offsets, pairs, y, *common),
                *(*down_strides, 0 if down_bias is None else down_bias.stride(0)),
                EVEN_K=i % down.block_k == 0 and j % down.block_k == 0,
                BLOCK_E=padded,
                **_options(down) | pdl,
            )
        block = _block(h)
        combine_kernel[(n, triton.cdiv(h, block))](
            *(y, weights, experts, out, n, k, e, h, weights.stride(0), experts.stride(0)),
            SHARED=shared,
            BLOCK_TOPK=triton.next_power_of_2(max(k, 1)),
            BLOCK_H=block,
            **pdl,
        )
    return out


def _block(h: int) -> int:
    return min(triton.next_power_of_2(h), 512)


_SIZES = ("shared_tiles", "num_tokens", "top_k", "num_experts", "h", "i", "j")
_POINTERS = {
    up_kernel: ("x", "up", "shared_up", "up_bias", "expert_offsets", "sorted_token_ids", "hidden"),
    down_kernel: ("hidden", "down", "shared_down", "down_bias", "expert_offsets", "sorted_token_ids", "y"),
    combine_kernel: ("y", "topk_weights", "topk_ids", "out"),
}
_INTEGERS = {
    up_kernel: (*_SIZES, "stride_xn", "stride_ue", "stride_ui", "stride_sj", "stride_be"),
    down_kernel: (*_SIZES, "stride_de", "stride_dh", "stride_sj", "stride_be"),
    combine_kernel: ("num_tokens", "top_k", "num_experts", "h", "stride_wn", "stride_tn"),
}
# Not divided by 16.
_FEW = frozenset(("shared_tiles", "num_tokens", "top_k", "num_experts", "stride_wn", "stride_tn"))
_BIAS = {up_kernel: "up_bias", down_kernel: "down_bias"}


def _build(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], tile: Tuning | None, numbers: str, biased: bool = False
) -> Build:
    """numbers: "aligned" to 16, "any", or "one", which Triton compiles as constants."""
    types = {name: f"*{DTYPES[dtype]}" for name in _POINTERS[kernel]}
    if kernel in _BIAS and not biased:
        constants = constants | {_BIAS[kernel]: None}
        del types[_BIAS[kernel]]
    types |= {name: "*i64" for name in ("expert_offsets", "sorted_token_ids") if name in types}
    types |= {name: type for name, type in (("topk_weights", "*fp32"), ("topk_ids", "*i32")) if name in types}
    if numbers == "one":
        constants = constants | {name: 1 for name in _INTEGERS[kernel]}
    else:
        types |= {name: "i32" for name in _INTEGERS[kernel]}
    types |= {name: "fp32" for name in ("alpha", "limit") if kernel is up_kernel}
    odd = _FEW if numbers == "aligned" else frozenset(types)
    if tile is None:
        return Build(kernel, types, constants, odd=odd)
    constants = constants | dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    needs = () if dtype == torch.float32 else ("wgmma",)
    return Build(kernel, types, constants, tile.num_warps, tile.num_stages, odd, needs)


def builds(arch: int) -> Iterator[Build]:
    """Every tile that `tuning` gives, the narrowest for every activation, the narrowest and the widest with biases."""
    for dtype in DTYPES:
        widths = (96, 4096) if dtype == torch.float32 else (96, 4096, 8192, 16384)
        for pairs, gated in itertools.product(widths, (False, True)):
            kinds = [("aligned", True, 128, False)]  # numbers, EVEN_K, BLOCK_E, PDL
            if dtype != torch.float16:  # which is bfloat16 but for an instruction
                kinds += [("aligned", False, 128, False)] if pairs in (96, 16384) else []
                kinds += [("any", False, 128, False)] if pairs in (96, 4096) else []
                kinds += [("one", False, 1, False)] if pairs == 96 else []
            if dtype == torch.bfloat16 and pairs in (96, 4096) and arch >= 90:
                kinds += [("aligned", whole, 128, True) for whole in (False, True)]
            for numbers, whole, experts, pdl in kinds:
                tile = tuning(dtype, pairs, 128, gated, numbers == "aligned", arch)
                constants = {"EVEN_K": whole, "BLOCK_E": experts, "PDL": pdl}
                usual = numbers == "aligned" and whole and not pdl
                activations = [kind for kind in ACTIVATIONS.values() if gated == (kind >= SILU_GATED.value)]
                for biased in (False, True) if usual and pairs in (96, widths[-1]) else (False,):
                    for kind in activations if usual and pairs == 96 else activations[:1]:
                        yield _build(up_kernel, dtype, constants | {"ACTIVATION": kind}, tile, numbers, biased)
                    if not gated:
                        yield _build(down_kernel, dtype, constants, tile, numbers, biased)
        for shared, h, pdl in itertools.product((False, True), (64, 2688), (False, True)[: 1 + (arch >= 90)]):
            constants = dict(SHARED=shared, BLOCK_TOPK=8, BLOCK_H=_block(h), PDL=pdl)
            yield _build(combine_kernel, dtype, constants, None, "aligned")
        yield _build(combine_kernel, dtype, dict(SHARED=True, BLOCK_TOPK=1, BLOCK_H=1, PDL=False), None, "one")

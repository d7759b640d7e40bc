"""Launcher of `csrc/cuda/remask_*.cu`, with the arguments of the op in `ops/remask.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda.build import Kernel
from twotower_kernels.ops.remask import results
from twotower_kernels.ops.remask_checks import Arguments
from twotower_kernels.ops.remask_fields import filled
from twotower_kernels.options.remask_choices import CHOICES

_TYPES = {torch.float32: "type_float32", torch.bfloat16: "type_bfloat16", torch.float16: "type_float16"}  # in warp.h
_PER_THREAD = 32  # tokens of a piece that a thread takes
_PARTIAL_BYTES, _POSITION_BYTES = 64, 36  # Partial in remask.h, Positions in remask_selection.h
_SCAN_SHARED = 544  # bytes of Shared in remask_scan.cu; two bits for each token come behind it
_FILTER_SHARED = 26_384  # bytes of Shared in remask_filter.cu
_LONGEST = (cuda.SHARED_LIMIT - 8) // _POSITION_BYTES  # positions that fit into shared memory

_FILTERED, _POSTERIOR = CHOICES["statistics"].index("filtered"), CHOICES["schedule"].index("posterior")


def remask(*arguments: Any) -> tuple[Tensor, ...]:
    """The step in two launches, three with top-k or top-p. What tensors hold is not checked: looking would wait.

    Raises:
        NotImplementedError: float64 logits.
    """
    a = Arguments(*arguments)
    logits, tokens = a.logits, a.tokens
    if logits.dtype not in _TYPES:
        raise NotImplementedError(f"remask on cuda: expected float32, bfloat16 or float16 logits, got {logits.dtype}")
    batch, block, vocabulary = logits.shape
    if a.shift_logits is not None and a.shift_logits.stride(1) != logits.stride(2):  # kernels know one stride
        logits = logits.contiguous()
        a = a._replace(logits=logits, shift_logits=a.shift_logits.contiguous())
    out = results(logits, tokens)
    if batch == 0:
        return out
    step = filled(
        a,
        _ids(a.suppressed, a.suppress_ids, logits.device),
        _ids(a.unscored, a.confidence_suppress_ids, logits.device),
        out,
    )
    warps = min(8, -(-vocabulary // (32 * _PER_THREAD)))
    pieces = -(-vocabulary // (32 * _PER_THREAD * warps))
    partials = logits.new_empty((batch * block * pieces, _PARTIAL_BYTES // 8), dtype=torch.int64)
    sampled = not step.greedy and (a.temperature is not None or step.temperature > 0)
    some_filter = a.top_k is not None or 0 < step.top_k < vocabulary or a.top_p is not None or step.top_p < 1
    posterior = step.schedule == _POSTERIOR
    filters = None
    if block > 0 and some_filter and (sampled or posterior or step.statistics == _FILTERED):
        filters = logits.new_empty((batch * block, 2), dtype=torch.float32)  # Filter in remask.h
        kernel = Kernel("remask_filter", "remask_filter_kernel", _filter_defines(logits.dtype, posterior))
        threads = 32 * min(16 if posterior else 24, -(-vocabulary // (32 * _PER_THREAD)))
        cuda.launch(kernel, batch * block, threads, _FILTER_SHARED, (step, filters))
    if block > 0:
        kernel = Kernel("remask_scan", "remask_scan_kernel", _scan_defines(logits.dtype, posterior, sampled))
        shared = _SCAN_SHARED + 2 * 4 * 32 * warps
        cuda.launch(kernel, batch * block * pieces, 32 * warps, shared, (step, filters, partials, pieces))
    fits = block <= _LONGEST
    words = -(-_POSITION_BYTES * block // 8)  # of 8 bytes, of what is known of the positions
    scratch = None if fits else logits.new_empty((batch, words), dtype=torch.int64)
    kernel = Kernel("remask_select", "remask_select_kernel", _select_defines(not fits))
    shared = 8 if scratch is not None else 8 * (1 + words)
    arguments = (step, filters, partials, pieces, scratch, words)
    cuda.launch(kernel, batch, 32 * max(1, min(16, block)), shared, arguments, after_last=block > 0)
    return out


def _ids(numbers: list[int], tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Token numbers in any order, int64 `[n]`."""
    if tensor is None:
        return _listed(tuple(numbers), device) if numbers else None
    return tensor.to(torch.int64).contiguous()


@cache
def _listed(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, for good: a CUDA graph may hold its address."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("remask: these token numbers are not on the GPU yet; call it once before capturing")
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _filter_defines(dtype: torch.dtype, posterior: bool) -> tuple[tuple[str, str], ...]:
    return (("LOGIT_TYPE", _TYPES[dtype]), ("POSTERIOR", str(int(posterior))))


def _scan_defines(dtype: torch.dtype, posterior: bool, sampled: bool) -> tuple[tuple[str, str], ...]:
    return (*_filter_defines(dtype, posterior), ("SAMPLED", str(int(sampled))))


def _select_defines(long: bool) -> tuple[tuple[str, str], ...]:
    return (("LONG", str(int(long))),)


def builds() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of everything that the launcher asks for."""
    for long in (False, True):
        yield "remask_select", _select_defines(long)
    for dtype, posterior in product(_TYPES, (False, True)):
        yield "remask_filter", _filter_defines(dtype, posterior)
        for sampled in (False, True):
            yield "remask_scan", _scan_defines(dtype, posterior, sampled)

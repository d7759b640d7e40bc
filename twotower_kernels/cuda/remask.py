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
from twotower_kernels.ops.remask_checks import PER_ROW, WHOLE, Arguments
from twotower_kernels.options.remask_policy import CHOICES, OPTIONS

_TYPES = {torch.float32: "type_float32", torch.bfloat16: "type_bfloat16", torch.float16: "type_float16"}  # in warp.h
_PER_THREAD = 32  # tokens of a piece that a thread takes
_PARTIAL_BYTES, _PLACE_BYTES = 64, 36  # Partial in remask.h, Places in remask_selection.h
_SCAN_SHARED = 544  # bytes of Shared in remask_scan.cu; two bits for each token come behind it
_FILTER_SHARED = 26_384  # bytes of Shared in remask_filter.cu
_LONGEST = (cuda.SHARED_LIMIT - 8) // _PLACE_BYTES  # positions whose places fit into shared memory

_GREEDY, _STATISTICS, _SCHEDULE = (OPTIONS.index(name) for name in ("greedy", "statistics", "schedule"))
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
    out = results(logits, tokens)
    if batch == 0:
        return out
    columns: list[cuda.Argument] = []
    for name, rows, number in zip(PER_ROW, a.per_row, [*a.whole, *map(float, a.real)], strict=True):
        columns += _column(rows, number, torch.int64 if name in WHOLE else torch.float64, batch)
    common: list[cuda.Argument] = [
        logits,
        *(cuda.DTYPES.index(logits.dtype), *logits.stride(), block, vocabulary),
        tokens,
        *(cuda.DTYPES.index(tokens.dtype), *tokens.stride()),
        a.mask,
        *_ids(a.suppressed, a.suppress_ids, logits.device),
        *_ids(a.unscored, a.confidence_suppress_ids, logits.device),
        *_strided(a.editable, torch.bool, 2),
        *_strided(a.valid_lens, torch.int64, 1),
        *_strided(a.candidates, torch.int64, 2),
        *_strided(a.rank_noise, torch.float64, 2),
        *columns,
        *a.options,
        *a.bounds,
    ]
    warps = min(8, -(-vocabulary // (32 * _PER_THREAD)))
    pieces = -(-vocabulary // (32 * _PER_THREAD * warps))
    partials = logits.new_empty((batch * block * pieces, _PARTIAL_BYTES // 8), dtype=torch.int64)
    sampled = not a.options[_GREEDY] and (a.temperature is not None or a.real[0] > 0)
    some_filter = a.top_k is not None or 0 < a.whole[2] < vocabulary or a.top_p is not None or a.real[1] < 1
    posterior = a.options[_SCHEDULE] == _POSTERIOR
    filters = None
    if block > 0 and some_filter and (sampled or posterior or a.options[_STATISTICS] == _FILTERED):
        filters = logits.new_empty((batch * block, 2), dtype=torch.float32)  # Filter in remask.h
        kernel = Kernel("remask_filter", "remask_filter_kernel", _filter_defines(logits.dtype, posterior))
        threads = 32 * min(16 if posterior else 24, -(-vocabulary // (32 * _PER_THREAD)))
        cuda.launch(kernel, batch * block, threads, _FILTER_SHARED, (*common, filters))
    if block > 0:
        kernel = Kernel("remask_scan", "remask_scan_kernel", _scan_defines(logits.dtype, posterior, sampled))
        shared = _SCAN_SHARED + 2 * 4 * 32 * warps
        cuda.launch(kernel, batch * block * pieces, 32 * warps, shared, (*common, filters, partials, pieces))
    fits = block <= _LONGEST
    words = -(-_PLACE_BYTES * block // 8)  # of the places, of 8 bytes
    scratch = None if fits else logits.new_empty((batch, words), dtype=torch.int64)
    kernel = Kernel("remask_select", "remask_select_kernel", _select_defines(not fits))
    shared = 8 if scratch is not None else 8 * (1 + words)
    arguments = (*common, filters, partials, pieces, scratch, words, *out)
    cuda.launch(kernel, batch, 32 * max(1, min(16, block)), shared, arguments)
    return out


def _column(rows: Tensor | None, number: int | float, dtype: torch.dtype, batch: int) -> list[cuda.Argument]:
    """A parameter per row, as `column` in remask.h reads it."""
    if rows is None:
        return [None, 0, number]
    rows = rows.to(dtype).expand(batch)
    return [rows, rows.stride(0), number]


def _strided(tensor: Tensor | None, dtype: torch.dtype, ndim: int) -> list[cuda.Argument]:
    if tensor is None:
        return [None, *[0] * ndim]
    tensor = tensor.to(dtype)
    return [tensor, *tensor.stride()]


def _ids(numbers: list[int], tensor: Tensor | None, device: torch.device) -> list[cuda.Argument]:
    """Token numbers in any order, and how many."""
    if tensor is None and numbers:
        tensor = _listed(tuple(numbers), device)
    if tensor is None:
        return [None, 0]
    return [tensor.to(torch.int64).contiguous(), len(tensor)]


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

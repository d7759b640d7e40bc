"""Launcher of `csrc/cuda/remask_*.cu`, with the arguments of the op in `ops/remask.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cuda
from twotower_kernels.cuda import Kernel
from twotower_kernels.ops.remask import Arguments, results
from twotower_kernels.ops.remask_checks import PER_ROW, WHOLE
from twotower_kernels.remask_policy import CHOICES, OPTIONS

_TYPES = {torch.float32: "type_float32", torch.bfloat16: "type_bfloat16", torch.float16: "type_float16"}  # in warp.h
_PER_THREAD = 32  # tokens of a piece that a thread takes
_PARTIAL_BYTES, _PLACE_BYTES = 48, 36  # Partial in remask.h, Places in remask_select.cu
_SCAN_SHARED = 448  # bytes of Shared in remask_scan.cu; two bits for each token come behind it
_FILTER_SHARED = 26_384  # bytes of Shared in remask_filter.cu
_LONGEST = (cuda.SHARED_LIMIT - 8) // _PLACE_BYTES  # block whose places fit into shared memory

_GREEDY, _STATISTICS, _SCHEDULE = (OPTIONS.index(name) for name in ("greedy", "statistics", "schedule"))
_FILTERED, _POSTERIOR = CHOICES["statistics"].index("filtered"), CHOICES["schedule"].index("posterior")
_RENOISE, _EDIT, _REMASK = OPTIONS.index("renoise"), len(OPTIONS) + 4, len(OPTIONS) + 5


def remask(*arguments: Any) -> tuple[Tensor, ...]:
    """The step in two launches, three with top-k or top-p. What tensors hold is not checked: looking would wait.

    Raises:
        NotImplementedError: float64 logits, a block that is too long, or a policy with the posterior, edit_threshold,
            remask_threshold or renoise.
    """
    a = Arguments(*arguments)
    logits, tokens = a.logits, a.tokens
    _refuse(logits, a.options)
    batch, block, vocabulary = logits.shape
    out = results(logits, tokens)
    if batch * block == 0:
        out[5].zero_()
        out[6].fill_(True)
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
    least_kept = None
    if some_filter and (sampled or a.options[_STATISTICS] == _FILTERED):
        least_kept = logits.new_empty(batch * block, dtype=torch.float32)
        kernel = Kernel("remask_filter", "remask_filter_kernel", _defines(logits.dtype))
        threads = 32 * min(24, -(-vocabulary // (32 * _PER_THREAD)))
        cuda.launch(kernel, batch * block, threads, _FILTER_SHARED, (*common, least_kept))
    kernel = Kernel("remask_scan", "remask_scan_kernel", _defines(logits.dtype, sampled))
    shared = _SCAN_SHARED + 2 * 4 * 32 * warps
    cuda.launch(kernel, batch * block * pieces, 32 * warps, shared, (*common, least_kept, partials, pieces))
    kernel = Kernel("remask_select", "remask_select_kernel")
    threads = 32 * min(16, block)
    cuda.launch(kernel, batch, threads, 8 + _PLACE_BYTES * block, (*common, least_kept, partials, pieces, *out))
    return out


def _refuse(logits: Tensor, options: list[int]) -> None:
    if logits.dtype not in _TYPES:
        raise NotImplementedError(f"remask on cuda: expected float32, bfloat16 or float16 logits, got {logits.dtype}")
    if logits.shape[1] > _LONGEST:
        raise NotImplementedError(f"remask on cuda: expected at most {_LONGEST} positions, got {logits.shape[1]}")
    if options[_SCHEDULE] == _POSTERIOR:
        raise NotImplementedError("remask on cuda: expected another schedule, got 'posterior'")
    for name, place in (("edit_threshold", _EDIT), ("remask_threshold", _REMASK), ("renoise", _RENOISE)):
        if options[place]:
            raise NotImplementedError(
                f"remask on cuda: expected a policy without {name}, which judges committed tokens"
            )


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


def _defines(dtype: torch.dtype, sampled: bool | None = None) -> tuple[tuple[str, str], ...]:
    logit = (("LOGIT_TYPE", _TYPES[dtype]),)
    return logit if sampled is None else (*logit, ("SAMPLED", str(int(sampled))))


def builds() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of everything that the launcher asks for."""
    yield "remask_select", ()
    for dtype in _TYPES:
        yield "remask_filter", _defines(dtype)
        for sampled in (False, True):
            yield "remask_scan", _defines(dtype, sampled)

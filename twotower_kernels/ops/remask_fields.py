"""What the kernels of `remask` take, on a CPU and on a GPU: one struct of named fields, `Remask` in
`csrc/common/remask_arguments.h`, which is filled here once a call."""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops.remask_checks import REAL, WHOLE, Arguments
from twotower_kernels.options.remask_policy import BOUNDS, OPTIONAL_BOUNDS, OPTIONS

CODES = {dtype: code for code, dtype in enumerate(cpu.DTYPES)}  # as in csrc/cuda/warp.h, too
_POINTER, _WHOLE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

Field = tuple[str, type[Any]]


def _per_row(name: str, number: type[Any]) -> list[Field]:
    return [(name, number), (f"{name}_rows", _POINTER), (f"{name}_stride", _WHOLE)]


def _per_position(name: str) -> list[Field]:
    return [(name, _POINTER), (f"{name}_stride_b", _WHOLE), (f"{name}_stride_s", _WHOLE)]


def _ids(name: str) -> list[Field]:
    return [(name, _POINTER), (f"{name}_count", _WHOLE)]


class Fields(ctypes.Structure):
    """`Remask` of the header, its small structs laid out flat. What is never set is 0 or null: not given."""

    _fields_ = [
        *((name, _WHOLE) for name in (*OPTIONS, *(f"has_{name}" for name in OPTIONAL_BOUNDS))),
        *((name, _REAL) for name in BOUNDS),
        *_per_position("logits"),
        ("logits_stride_v", _WHOLE),
        ("logits_dtype", _WHOLE),
        ("shift", _WHOLE),
        ("shift_logits", _POINTER),
        ("shift_logits_stride_b", _WHOLE),
        *((name, _WHOLE) for name in ("batch", "block", "vocabulary")),
        *_per_position("tokens"),
        ("tokens_dtype", _WHOLE),
        ("mask_token_id", _WHOLE),
        ("by_sequence", _WHOLE),
        *(field for name in WHOLE for field in _per_row(name, _WHOLE)),
        *(field for name in REAL for field in _per_row(name, _REAL)),
        *_ids("suppressed"),
        *_ids("unscored"),
        *_per_row("valid_lens", _WHOLE),
        *_per_position("editable"),
        *_per_position("candidates"),
        *_per_position("rank_noise"),
        *((name, _POINTER) for name in ("tokens_out", "transfer_mask", "candidate", "confidence", "entropy")),
        *((name, _POINTER) for name in ("num_masked", "done")),
    ]
    tensors: dict[str, Tensor]  # that pointers point into: they must outlive the call


@lru_cache(maxsize=256)
def _of_policy(options: tuple[int, ...], bounds: tuple[float, ...]) -> bytes:
    """Fields of which the policy's are set."""
    names = (*OPTIONS, *(f"has_{name}" for name in OPTIONAL_BOUNDS), *BOUNDS)
    return bytes(Fields(**dict(zip(names, (*options, *bounds), strict=True))))


def filled(a: Arguments, suppressed: Tensor | None, unscored: Tensor | None, out: tuple[Tensor, ...]) -> Any:
    """`Fields` of an op's arguments, already checked.

    Args:
        a: the arguments, their logits of one stride over tokens.
        suppressed, unscored: int64 `[n]` contiguous, instead of the arguments' lists and tensors.
        out: the results to write, contiguous.
    """
    f: Any = Fields.from_buffer_copy(_of_policy(tuple(a.options), tuple(a.bounds)))
    logits, tokens = a.logits, a.tokens
    f.batch, f.block, f.vocabulary = logits.shape
    f.logits, f.logits_dtype = logits.data_ptr(), CODES[logits.dtype]
    f.logits_stride_b, f.logits_stride_s, f.logits_stride_v = logits.stride()
    f.tokens, f.tokens_dtype = tokens.data_ptr(), CODES[tokens.dtype]
    f.tokens_stride_b, f.tokens_stride_s = tokens.stride()
    f.mask_token_id, f.shift, f.by_sequence = a.mask, a.shift, a.by_sequence
    f.step, f.num_steps, f.top_k, f.seed, f.offset, f.initial_num_masked = a.whole
    f.temperature, f.top_p, f.gate_bound = a.real
    f.valid_lens = f.block
    tokens_out, transfer_mask, candidate, confidence, entropy, num_masked, done = out
    f.tokens_out, f.transfer_mask, f.candidate = tokens_out.data_ptr(), transfer_mask.data_ptr(), candidate.data_ptr()
    f.confidence, f.entropy = confidence.data_ptr(), entropy.data_ptr()
    f.num_masked, f.done = num_masked.data_ptr(), done.data_ptr()
    f.tensors = {
        "logits": logits,
        "tokens": tokens,
        "tokens_out": tokens_out,
        "transfer_mask": transfer_mask,
        "candidate": candidate,
        "confidence": confidence,
        "entropy": entropy,
        "num_masked": num_masked,
        "done": done,
    }
    if suppressed is not None:
        _point(f, "suppressed", suppressed)
        f.suppressed_count = suppressed.numel()
    if unscored is not None:
        _point(f, "unscored", unscored)
        f.unscored_count = unscored.numel()
    if a.shift_logits is not None:
        _point(f, "shift_logits", a.shift_logits)
        f.shift_logits_stride_b = a.shift_logits.stride(0)
    if a.gives_tensors:
        _add_tensors(f, a)
    return f


def _point(f: Any, name: str, tensor: Tensor) -> None:
    setattr(f, name, tensor.data_ptr())
    f.tensors[name] = tensor


def _add_tensors(f: Any, a: Arguments) -> None:
    """What may be given as a tensor, in the dtypes that the kernels read."""
    per_row = dict(zip((*WHOLE, *REAL), a.per_row, strict=True), valid_lens=a.valid_lens)
    for name, rows in per_row.items():
        if rows is not None:
            rows = rows.to(torch.float64 if name in REAL else torch.int64).expand(f.batch)
            _point(f, f"{name}_rows", rows)
            setattr(f, f"{name}_stride", rows.stride(0))
    per_position = (
        ("editable", a.editable, torch.bool),
        ("candidates", a.candidates, torch.int64),
        ("rank_noise", a.rank_noise, torch.float64),
    )
    for name, tensor, dtype in per_position:
        if tensor is not None:
            tensor = tensor.to(dtype)
            _point(f, name, tensor)
            setattr(f, f"{name}_stride_b", tensor.stride(0))
            setattr(f, f"{name}_stride_s", tensor.stride(1))

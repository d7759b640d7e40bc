"""What `remask` accepts. Types, shapes, devices and Python numbers are checked by the public function; what tensors
hold is checked by the kernel's entry, because looking at it would make a device wait."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.arguments import real, whole, wholes
from twotower_kernels.ops._library import check_float, refuse_gradients, same_device
from twotower_kernels.remask_policy import RemaskPolicy
from twotower_kernels.seeds import as_int64

INTEGERS = (torch.int64, torch.int32)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PerRow:
    """A parameter that is a number or one number per row: its kind, its range, and what stands for "not given"."""

    whole: bool
    low: float = -math.inf
    high: float = math.inf
    absent: int | None = None


# In the order of the op's `whole` and `real`, as RemaskWhole and RemaskReal in csrc/cpu/remask.h have it. The highest
# initial_num_masked is the length of the block, which is checked apart.
WHOLE = {
    "step": PerRow(True, 0),
    "num_steps": PerRow(True, 1),
    "top_k": PerRow(True, 0),
    "seed": PerRow(True),
    "offset": PerRow(True, 0, 2**32 - 1),
    "initial_num_masked": PerRow(True, 0, absent=-1),
}
REAL = {
    "temperature": PerRow(False, 0.0, 1e6),
    "top_p": PerRow(False, 0.0, 1.0),
    "gate_bound": PerRow(False),
}


PER_ROW = {**WHOLE, **REAL}
_LEAST, _MOST = -(2**63), 2**63 - 1


def split_all(rules: dict[str, PerRow], values: tuple[Any, ...], logits: Tensor) -> tuple[list[Any], list[Any]]:
    """Parameters of one kind as the op takes them: the numbers, and the tensors that replace them. Plain numbers, which
    nearly all are in nearly all calls, are through at the first comparison."""
    numbers, tensors = [], []
    for (name, rule), value in zip(rules.items(), values, strict=True):
        if rule.whole:
            plain = type(value) is int and rule.absent is None and _LEAST <= value <= _MOST
        else:
            plain = type(value) is float
        number, tensor = (value, None) if plain and rule.low <= value <= rule.high else split(name, value, logits)
        numbers.append(number)
        tensors.append(tensor)
    return numbers, tensors


def split(name: str, value: Any, logits: Tensor) -> tuple[Any, Tensor | None]:
    """A per-row parameter as the op takes it: a number, and a tensor that replaces it if one was given."""
    rule = PER_ROW[name]
    kind = "an int" if rule.whole else "a number"
    if value is None and rule.absent is not None:
        return rule.absent, None
    if isinstance(value, Tensor):
        if value.dtype not in (INTEGERS if rule.whole else INTEGERS + FLOATING):
            raise TypeError(f"{name}: expected {kind} or a tensor of them, got {value.dtype}")
        if value.ndim and value.shape != logits.shape[:1]:
            raise ValueError(f"{name}: expected {kind} or shape [{logits.shape[0]}], got {list(value.shape)}")
        if value.ndim == 0:
            value = value.to(logits.device)
        same_device(logits, **{name: value})
        return (1 if name == "num_steps" else 0), value
    value = (whole if rule.whole else real)(name, value, f"{kind} or a tensor of them")
    if name == "seed":
        return as_int64(value), None
    high = logits.shape[1] if name == "initial_num_masked" else rule.high
    if not rule.low <= value <= high:  # NaN too
        raise ValueError(f"{name}: expected {kind} in [{rule.low:g}, {high:g}], got {value}")
    if rule.whole and value >= 2**63:
        raise ValueError(f"{name}: expected a number of 64 bits, got {value}")
    return value, None


def ids(name: str, value: Any, logits: Tensor) -> tuple[list[int], Tensor | None]:
    """Token numbers as the op takes them: a list, or a tensor."""
    if value is None:
        return [], None
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS:
            raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
        if value.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {list(value.shape)}")
        same_device(logits, **{name: value})
        return [], value
    tokens = wholes(name, value, "a tensor or a sequence of integers")
    for token in tokens:
        if not 0 <= token < logits.shape[2]:
            raise ValueError(f"{name}: expected token numbers in [0, {logits.shape[2] - 1}], got {token}")
    return tokens, None


def check(
    logits: Tensor,
    tokens: Tensor,
    mask_token_id: int | None,
    policy: RemaskPolicy,
    editable: Tensor | None,
    valid_lens: Tensor | None,
    candidates: Tensor | None,
    rank_noise: Tensor | None,
) -> int | None:
    """TypeError or ValueError unless everything beside the per-row parameters and the suppressed tokens is right.

    Returns the mask token.
    """
    if not isinstance(policy, RemaskPolicy):
        raise TypeError(f"policy: expected a RemaskPolicy, got {type(policy).__name__}")
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    check_float(logits=logits)
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits: expected shape [B, S, V] with V > 0, got {list(logits.shape)}")
    refuse_gradients("remask", logits=logits)
    batch, block, vocabulary = logits.shape
    _tensor("tokens", tokens, INTEGERS, [batch, block])
    if mask_token_id is None:
        if not policy.renoise or policy.schedule == "posterior":
            raise ValueError("mask_token_id: expected a token, as only a policy with renoise has no mask, got None")
    else:
        mask_token_id = whole("mask_token_id", mask_token_id, "an int")
        if not 0 <= mask_token_id < vocabulary:
            raise ValueError(f"mask_token_id: expected a token in [0, {vocabulary - 1}], got {mask_token_id}")
    _tensor("editable", editable, (torch.bool,), [batch, block])
    _tensor("valid_lens", valid_lens, INTEGERS, [batch])
    _tensor("candidates", candidates, INTEGERS, [batch, block])
    _tensor("rank_noise", rank_noise, FLOATING, [batch, block])
    same_device(
        logits, tokens=tokens, editable=editable, valid_lens=valid_lens, candidates=candidates, rank_noise=rank_noise
    )
    return mask_token_id


def check_values(
    logits: Tensor,
    per_row: dict[str, Tensor],
    ids: dict[str, Tensor | None],
    valid_lens: Tensor | None,
    candidates: Tensor | None,
    rank_noise: Tensor | None,
) -> None:
    """ValueError unless what the tensors hold lies in its range: for the entry of a kernel on the host."""
    _, block, vocabulary = logits.shape
    for name, tensor in per_row.items():
        rule = PER_ROW[name]
        _within(name, tensor, rule.low, block if name == "initial_num_masked" else rule.high)
    for name, listed in ids.items():
        _within(name, listed, 0, vocabulary - 1)
    _within("valid_lens", valid_lens, 0, block)
    _within("candidates", candidates, -1, vocabulary - 1)
    if rank_noise is not None and not ((rank_noise >= 0) & (rank_noise < 1)).all():
        raise ValueError("rank_noise: expected numbers in [0, 1), got others")


def _tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: list[int]) -> None:
    if value is None and name != "tokens":
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def _within(name: str, value: Tensor | None, low: float, high: float) -> None:
    if value is None or (value.dtype in INTEGERS and low == -math.inf):
        return
    wrong = ~((value >= low) & (value <= high))
    if wrong.any():
        raise ValueError(f"{name}: expected values in [{low:g}, {high:g}], got {value[wrong][0].item()}")

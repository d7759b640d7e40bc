"""What `remask` accepts: every argument checked and brought to one form, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options.arguments import real, whole, wholes
from twotower_kernels.options.remask_choices import HIGHEST_TEMPERATURE, NOISES
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.options.seeds import as_int64
from twotower_kernels.reference import philox

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


@dataclass
class Arguments:
    """The arguments of `remask` beside logits and tokens, on the device of the logits; per row means [B]."""

    step: Tensor  # int64 [B]
    num_steps: Tensor  # int64 [B]
    temperature: Tensor  # float64 [B]
    top_k: Tensor  # int64 [B]
    top_p: Tensor  # float64 [B]
    seed: Tensor  # int64 [B]
    offset: Tensor  # int64 [B]
    gate_bound: Tensor  # float64 [B]
    initial: Tensor | None  # int64 [B]
    suppress_ids: Tensor  # int64 [n]
    confidence_suppress_ids: Tensor  # int64 [n]
    valid: Tensor  # bool [B, S]
    reach: Tensor  # bool [B, S], valid and editable
    candidates: Tensor | None  # int64 [B, S]
    rank_noise: Tensor | None  # float64 [B, S]
    by_sequence: bool  # how tokens are numbered that draw

    def token_words(self, vocabulary: int) -> Tensor:
        """The words with which the tokens of each position draw: int64 [B, S, V]."""
        positions = self.valid.shape[1]
        if not self.by_sequence:
            return philox.vocabulary_words(self.seed, self.offset, self.step, positions, vocabulary)
        zero = torch.zeros_like(self.offset)
        words = [
            philox.vocabulary_words(self.seed, self.offset + p, zero, 1, vocabulary)  # [B, 1, V], each at position 0
            for p in range(positions)
        ]
        return torch.cat(words, dim=1) if words else self.valid.new_zeros(len(zero), 0, vocabulary).long()

    def noise(self, number: int, own: bool = False) -> Tensor:
        """The caller's number of each position, or the op's own for this reserved token number: float64 [B, S]."""
        if self.rank_noise is not None and not own:
            return self.rank_noise
        word = philox.position_words(self.seed, self.offset, self.step, self.valid.shape[1], number)
        return philox.uniform(word)


def as_row(logits: Tensor, *, valid_lens: Any, shift_logits: Any, **positions: Any) -> tuple[Any, ...]:
    """The one row [1, N, V] of logits [N, V], and what belongs to it: arguments [N], then lengths, then logits [V].

    Returns logits, then the arguments in the order of `remask`.
    """
    for name, value in positions.items():
        if isinstance(value, Tensor) and value.ndim != 1:
            raise ValueError(
                f"{name}: expected shape [{logits.shape[0]}] as logits are [N, V], got {list(value.shape)}"
            )
    if isinstance(shift_logits, Tensor) and shift_logits.ndim != 1:
        expected = f"[{logits.shape[1]}] as logits are [N, V]"
        raise ValueError(f"shift_logits: expected shape {expected}, got {list(shift_logits.shape)}")
    tokens, editable, candidates, rank_noise = (
        value.unsqueeze(0) if isinstance(value, Tensor) else value for value in positions.values()
    )
    if isinstance(valid_lens, Tensor) and valid_lens.ndim == 0:
        valid_lens = valid_lens.unsqueeze(0)
    before = shift_logits.unsqueeze(0) if isinstance(shift_logits, Tensor) else shift_logits
    return logits.unsqueeze(0), tokens, editable, valid_lens, candidates, rank_noise, before


def check(
    *,
    logits: Tensor,
    tokens: Tensor,
    mask_token_id: int | None,
    policy: RemaskPolicy,
    step: int | Tensor,
    num_steps: int | Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    seed: int | Tensor,
    offset: int | Tensor,
    suppress_ids: Sequence[int] | Tensor | None,
    editable: Tensor | None,
    valid_lens: Tensor | None,
    initial_num_masked: int | Tensor | None,
    gate_bound: float | Tensor | None,
    confidence_suppress_ids: Sequence[int] | Tensor | None,
    candidates: Tensor | None,
    rank_noise: Tensor | None,
    shift: int,
    shift_logits: Tensor | None,
    noise: str,
) -> Arguments:
    """The arguments in one form; TypeError or ValueError, naming the argument, where one is not as `remask` says."""
    if not isinstance(policy, RemaskPolicy):
        raise TypeError(f"policy: expected a RemaskPolicy, got {type(policy).__name__}")
    _tensor("logits", logits, FLOATING)
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits: expected shape [B, S, V] or [N, V] with V > 0, got {list(logits.shape)}")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits: remask is not differentiable; detach them, or use torch.no_grad()")
    batch, block, vocab = logits.shape
    device = logits.device
    _tensor("tokens", tokens, INTEGERS, (batch, block), device)
    if mask_token_id is None:
        if not policy.renoise or policy.renoise_as == "mask":
            raise ValueError("mask_token_id: expected a token, as only a policy with renoise has no mask, got None")
    elif not 0 <= mask_token_id < vocab:
        raise ValueError(f"mask_token_id: expected a token in [0, {vocab - 1}], got {mask_token_id}")

    def per_row(name: str, value: Any, is_whole: bool, low: float, high: float = math.inf) -> Tensor:
        return _per_row(name, value, batch, device, is_whole, low, high)

    valid = torch.ones(batch, block, dtype=torch.bool, device=device)
    if valid_lens is not None:
        _tensor("valid_lens", valid_lens, INTEGERS, (batch,), device)
        _within("valid_lens", valid_lens, 0, block)
        valid = torch.arange(block, device=device) < valid_lens[:, None]
    reach = valid
    if editable is not None:
        _tensor("editable", editable, (torch.bool,), (batch, block), device)
        reach = valid & editable
    if candidates is not None:
        _tensor("candidates", candidates, INTEGERS, (batch, block), device)
        _within("candidates", candidates, -1, vocab - 1)
        candidates = candidates.long()
    if rank_noise is not None:
        _tensor("rank_noise", rank_noise, FLOATING, (batch, block), device)
        rank_noise = rank_noise.double()
        if not ((rank_noise >= 0) & (rank_noise < 1)).all():
            raise ValueError("rank_noise: expected numbers in [0, 1), got others")
    if whole("shift", shift, "0 or 1") not in (0, 1):
        raise ValueError(f"shift: expected 0 or 1, got {shift}")
    if shift_logits is not None:
        _tensor("shift_logits", shift_logits, (logits.dtype,), (batch, vocab), device)
        if not shift:
            raise ValueError("shift_logits: expected None with shift=0, which has no use for them")
        if shift_logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("shift_logits: remask is not differentiable; detach them, or use torch.no_grad()")
    if noise not in NOISES:
        raise ValueError(f"noise: expected 'block' or 'sequence', got {noise!r}")
    return Arguments(
        step=per_row("step", step, True, 0),
        num_steps=per_row("num_steps", num_steps, True, 1),
        temperature=per_row("temperature", temperature, False, 0.0, HIGHEST_TEMPERATURE),
        top_k=per_row("top_k", 0 if top_k is None else top_k, True, 0),
        top_p=per_row("top_p", 1.0 if top_p is None else top_p, False, 0.0, 1.0),
        seed=_per_row("seed", seed, batch, device, True),
        offset=per_row("offset", offset, True, 0, 2**32 - 1),
        gate_bound=_per_row(
            "gate_bound", policy.gate_bound if gate_bound is None else gate_bound, batch, device, False
        ),
        initial=None
        if initial_num_masked is None
        else per_row("initial_num_masked", initial_num_masked, True, 0, block),
        suppress_ids=_ids("suppress_ids", suppress_ids, vocab, device),
        confidence_suppress_ids=_ids("confidence_suppress_ids", confidence_suppress_ids, vocab, device),
        valid=valid,
        reach=reach,
        candidates=candidates,
        rank_noise=rank_noise,
        by_sequence=noise == "sequence",
    )


def _tensor(
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def _within(name: str, value: Tensor, low: float, high: float) -> None:
    """ValueError unless every entry is a number in [low, high]."""
    wrong = ~((value >= low) & (value <= high))
    if wrong.any():
        raise ValueError(f"{name}: expected values in [{low:g}, {high:g}], got {value[wrong][0].item()}")


def _per_row(
    name: str,
    value: Any,
    batch: int,
    device: torch.device,
    is_whole: bool,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """A number or a tensor [B] as int64 (is_whole) or float64 [B]."""
    kind = "an int" if is_whole else "a number"
    if isinstance(value, Tensor):
        allowed = INTEGERS if is_whole else FLOATING + INTEGERS
        if value.dtype not in allowed:
            raise TypeError(f"{name}: expected {kind} or a tensor of them, got {value.dtype}")
        if value.shape not in ((), (batch,)):
            raise ValueError(f"{name}: expected {kind} or shape [{batch}], got {list(value.shape)}")
        if value.device != device and value.ndim:
            raise ValueError(f"{name}: expected device {device}, got {value.device}")
    else:
        value = (whole if is_whole else real)(name, value, f"{kind} or a tensor of them")
        value = as_int64(value) if name == "seed" else value
        if is_whole and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected a number of 64 bits, got {value}")
    rows = torch.as_tensor(value, dtype=torch.int64 if is_whole else torch.float64, device=device).expand(batch)
    if low > -math.inf or high < math.inf:
        _within(name, rows if batch else torch.as_tensor(value), low, high)
    elif not is_whole and rows.isnan().any():
        raise ValueError(f"{name}: expected {kind}, got nan")
    return rows


def _ids(name: str, value: Any, vocab: int, device: torch.device) -> Tensor:
    """Token numbers as int64 [n]."""
    if value is None:
        return torch.zeros(0, dtype=torch.int64, device=device)
    if isinstance(value, Tensor) and value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
    if not isinstance(value, Tensor):
        value = wholes(name, value, "a tensor or a sequence of integers")
    ids = torch.as_tensor(value, dtype=torch.int64, device=device)
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(ids.shape)}")
    _within(name, ids, 0, vocab - 1)
    return ids

"""What `remask` accepts. The public function checks the types of Python's values and makes numbers of them; shapes,
dtypes, devices and numbers are checked before every kernel; what tensors hold by the kernel on the host alone, because
looking at it would make a device wait."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import le
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels.ops._library import as_index, check_float, same_device
from twotower_kernels.options.arguments import real, whole, wholes
from twotower_kernels.options.remask_choices import CHOICES, HIGHEST_TEMPERATURE
from twotower_kernels.options.remask_policy import BOUNDS, OPTIONAL_BOUNDS, OPTIONS, RemaskPolicy
from twotower_kernels.options.seeds import as_int64

INTEGERS = (torch.int64, torch.int32)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PerRow:
    """A parameter that is a number or one number per row: its kind, its range, and what stands for "not given"."""

    whole: bool
    low: float = -math.inf
    high: float = math.inf
    absent: float | None = None


# In the order of the op's `whole` and `real`. The highest initial_num_masked is the length of the block, which is
# checked apart.
WHOLE = {
    "step": PerRow(True, 0),
    "num_steps": PerRow(True, 1),
    "top_k": PerRow(True, 0, absent=0),
    "seed": PerRow(True),
    "offset": PerRow(True, 0, 2**32 - 1),
    "initial_num_masked": PerRow(True, 0, absent=-1),
}
REAL = {
    "temperature": PerRow(False, 0.0, HIGHEST_TEMPERATURE),
    "top_p": PerRow(False, 0.0, 1.0, absent=1.0),
    "gate_bound": PerRow(False),
}
PER_ROW = {**WHOLE, **REAL}
_LOW = [rule.low if rule.absent is None else min(rule.low, rule.absent) for rule in PER_ROW.values()]
_HIGH = [rule.high for rule in PER_ROW.values()]
_INITIAL = list(WHOLE).index("initial_num_masked")
_LEAST, _MOST = -(2**63), 2**63 - 1


class Arguments(NamedTuple):
    """What the operator takes, in the schema's order: for the kernels of all devices."""

    logits: Tensor
    tokens: Tensor
    mask_token_id: int | None
    options: list[int]
    bounds: list[float]
    whole: list[int]
    real: list[float]
    step: Tensor | None
    num_steps: Tensor | None
    top_k: Tensor | None
    seed: Tensor | None
    offset: Tensor | None
    initial_num_masked: Tensor | None
    temperature: Tensor | None
    top_p: Tensor | None
    gate_bound: Tensor | None
    suppressed: list[int]
    suppress_ids: Tensor | None
    unscored: list[int]
    confidence_suppress_ids: Tensor | None
    editable: Tensor | None
    valid_lens: Tensor | None
    candidates: Tensor | None
    rank_noise: Tensor | None
    shift: int
    shift_logits: Tensor | None
    by_sequence: bool = False  # the dispatcher leaves out what is as by default

    @property
    def mask(self) -> int:
        """-1, which no token is, where there is none."""
        return -1 if self.mask_token_id is None else self.mask_token_id

    @property
    def per_row(self) -> tuple[Tensor | None, ...]:
        """In the order of `PER_ROW`."""
        whole = self.step, self.num_steps, self.top_k, self.seed, self.offset, self.initial_num_masked
        return *whole, self.temperature, self.top_p, self.gate_bound

    @property
    def gives_tensors(self) -> bool:
        """Whether one of the arguments that may be tensors is one, beside logits and tokens."""
        whole = None is self.step is self.num_steps is self.top_k is self.seed is self.offset is self.initial_num_masked
        real = None is self.temperature is self.top_p is self.gate_bound
        ids = None is self.suppress_ids is self.confidence_suppress_ids
        others = None is self.editable is self.valid_lens is self.candidates is self.rank_noise is self.shift_logits
        return not (whole and real and ids and others)


# Per parameter: the type, the range and the stand-in of a number that needs no second look. No n0 is one: its range
# hangs on the block.
_PLAIN = {
    name: (
        int if rule.whole else float,
        max(rule.low, _LEAST) if rule.whole else rule.low,
        -1 if name == "initial_num_masked" else min(rule.high, _MOST) if rule.whole else rule.high,
        rule.absent,
    )
    for name, rule in PER_ROW.items()
}
PLAIN_WHOLE, PLAIN_REAL = ([(name, *_PLAIN[name]) for name in names] for names in (WHOLE, REAL))


def split_all(plain: list[Any], values: tuple[Any, ...], logits: Tensor) -> tuple[list[Any], list[Any]]:
    """Parameters of one kind as the op takes them: the numbers, and the tensors that replace them. Plain numbers, which
    nearly all are in nearly all calls, are through at the first comparison.

    Args:
        plain: `PLAIN_WHOLE` or `PLAIN_REAL`.
        values: of the parameters, in their order.
        logits: that they are for.
    """
    numbers, tensors = [], []
    for (name, kind, low, high, absent), value in zip(plain, values, strict=True):
        number, tensor = value, None
        if value is None and absent is not None:
            number = absent
        elif type(value) is not kind or not low <= value <= high:
            number, tensor = split(name, value, logits)
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
        value = as_index(value)
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
        return [], as_index(value)
    tokens = wholes(name, value, "a tensor or a sequence of integers")
    for token in tokens:
        if not 0 <= token < logits.shape[2]:
            raise ValueError(f"{name}: expected token numbers in [0, {logits.shape[2] - 1}], got {token}")
    return tokens, None


def check_kinds(
    logits: Any,
    tokens: Any,
    mask_token_id: Any,
    policy: Any,
    editable: Any,
    valid_lens: Any,
    candidates: Any,
    rank_noise: Any,
    shift_logits: Any,
) -> int | None:
    """TypeError unless everything beside the per-row parameters and the suppressed tokens is of its kind; ValueError
    for logits without their axes, which the others are measured by.

    Returns the mask token.
    """
    if not isinstance(policy, RemaskPolicy):
        raise TypeError(f"policy: expected a RemaskPolicy, got {type(policy).__name__}")
    if not (isinstance(logits, Tensor) and isinstance(tokens, Tensor)):
        name, wrong = ("tokens", tokens) if isinstance(logits, Tensor) else ("logits", logits)
        raise TypeError(f"{name}: expected a tensor, got {type(wrong).__name__}")
    if not (editable is valid_lens is candidates is rank_noise is shift_logits is None):
        optional = (("editable", editable), ("valid_lens", valid_lens), ("candidates", candidates))
        for name, tensor in (*optional, ("rank_noise", rank_noise), ("shift_logits", shift_logits)):
            if not isinstance(tensor, Tensor) and tensor is not None:
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    mask: int | None = None if mask_token_id is None else whole("mask_token_id", mask_token_id, "an int")
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [B, S, V] or [N, V] with V > 0, got {list(logits.shape)}")
    return mask


def as_row(
    logits: Tensor, valid_lens: Tensor | None, shift_logits: Tensor | None, **positions: Tensor | None
) -> list[Any]:
    """The one row `[1, N, V]` of logits `[N, V]`, then lengths `[1]`, logits `[1, V]` and what is `[N]` as `[1, N]`."""
    rows, vocabulary = logits.shape
    for name, tensor in (*positions.items(), ("shift_logits", shift_logits)):
        length = vocabulary if name == "shift_logits" else rows
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}] as logits are [N, V], got {list(tensor.shape)}")
    if valid_lens is not None and valid_lens.ndim > 0:
        valid_lens = valid_lens.squeeze(0)
    return [x if x is None else x.unsqueeze(0) for x in (logits, valid_lens, shift_logits, *positions.values())]


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits: expected shape [B, S, V] with V > 0, got {list(logits.shape)}")


def check_arguments(a: Arguments) -> None:
    """TypeError or ValueError unless shapes, dtypes, devices and numbers fit, whatever tensors hold."""
    logits, tokens = a.logits, a.tokens
    if logits.dtype not in FLOATING:
        check_float(logits=logits)
    _check_logits(logits)
    batch, block, vocabulary = logits.shape
    _tensor("tokens", tokens, INTEGERS, (batch, block))
    policy = _policy(tuple(a.options), tuple(a.bounds))
    if a.mask_token_id is None:
        if not policy.renoise or policy.renoise_as == "mask" or policy.schedule == "posterior":
            raise ValueError("mask_token_id: expected a token, as only a policy with renoise has no mask, got None")
    elif not 0 <= a.mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id: expected a token in [0, {vocabulary - 1}], got {a.mask_token_id}")
    if not _fit(a.whole, a.real, block):  # which nearly all do; else what does not is named
        _check_numbers("whole", WHOLE, a.whole, block)
        _check_numbers("real", REAL, a.real, block)
    if a.suppressed or a.unscored:
        for name, ids in (("suppress_ids", a.suppressed), ("confidence_suppress_ids", a.unscored)):
            for token in ids:
                if not 0 <= token < vocabulary:
                    raise ValueError(f"{name}: expected token numbers in [0, {vocabulary - 1}], got {token}")
    if a.shift not in (0, 1):
        raise ValueError(f"shift: expected 0 or 1, got {a.shift}")
    if a.gives_tensors:
        _check_tensors(a)
    if tokens.device != logits.device:
        same_device(logits, tokens=tokens)


def _check_tensors(a: Arguments) -> None:
    """Those beside logits and tokens."""
    batch, block, vocabulary = a.logits.shape
    for name, tensor in zip(PER_ROW, a.per_row, strict=True):
        if tensor is not None:
            rule = PER_ROW[name]
            if tensor.dtype not in (INTEGERS if rule.whole else INTEGERS + FLOATING):
                kind = "int64 or int32" if rule.whole else "a real number's"
                raise TypeError(f"{name}: expected {kind} dtype, got {tensor.dtype}")
            if tensor.ndim and tensor.shape != a.logits.shape[:1]:
                raise ValueError(f"{name}: expected shape [{batch}], got {list(tensor.shape)}")
            same_device(a.logits, **{name: tensor})
    ids = (("suppress_ids", a.suppress_ids), ("confidence_suppress_ids", a.confidence_suppress_ids))
    for name, listed in ids:
        if listed is not None and listed.dtype not in INTEGERS:
            raise TypeError(f"{name}: expected int64 or int32, got {listed.dtype}")
        if listed is not None and listed.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {list(listed.shape)}")
    others = (
        *(("editable", a.editable), ("valid_lens", a.valid_lens)),
        *(("candidates", a.candidates), ("rank_noise", a.rank_noise)),
    )
    kinds = (torch.bool,), INTEGERS, INTEGERS, FLOATING
    for (name, tensor), dtypes in zip(others, kinds, strict=True):
        if tensor is not None:
            _tensor(name, tensor, dtypes, (batch,) if name == "valid_lens" else (batch, block))
    if a.shift_logits is not None:
        _tensor("shift_logits", a.shift_logits, (a.logits.dtype,), (batch, vocabulary))
        if a.shift == 0:
            raise ValueError("shift_logits: expected None with shift=0, which has no use for them")
    for name, tensor in (*ids, *others, ("shift_logits", a.shift_logits)):
        if tensor is not None:
            same_device(a.logits, **{name: tensor})


@lru_cache(maxsize=256)
def _policy(options: tuple[int, ...], bounds: tuple[float, ...]) -> RemaskPolicy:
    """The policy of which these are the numbers. ValueError if there is none."""
    names = (*OPTIONS, *(f"has_{name}" for name in OPTIONAL_BOUNDS))
    for what, numbers, expected in (("options", options, names), ("bounds", bounds, BOUNDS)):
        if len(numbers) != len(expected):
            raise ValueError(f"{what}: expected {len(expected)} numbers, got {len(numbers)}")
    given, limits = dict(zip(names, options, strict=True)), dict(zip(BOUNDS, bounds, strict=True))
    fields: dict[str, Any] = {name: limits[name] for name in BOUNDS if given.get(f"has_{name}", 1)}
    for name, number in given.items():
        flag = name not in CHOICES and (name in names[len(OPTIONS) :] or isinstance(getattr(RemaskPolicy, name), bool))
        most = len(CHOICES[name]) - 1 if name in CHOICES else 1 if flag else 2**62
        if not 0 <= number <= most:
            raise ValueError(f"options: expected {name} in [0, {most}], got {number}")
        if name in OPTIONS:
            fields[name] = CHOICES[name][number] if name in CHOICES else bool(number) if flag else number
    return RemaskPolicy(**fields)


def _fit(whole: Sequence[Any], real: Sequence[Any], block: int) -> bool:
    """Whether these are all the numbers, each in its range; NaN is in none."""
    if len(whole) != len(WHOLE) or len(real) != len(REAL) or not whole[_INITIAL] <= block:
        return False
    numbers = *whole, *real
    return all(map(le, _LOW, numbers)) and all(map(le, numbers, _HIGH))


def _check_numbers(what: str, rules: dict[str, PerRow], numbers: Sequence[Any], block: int) -> None:
    if len(numbers) != len(rules):
        raise ValueError(f"{what}: expected {len(rules)} numbers, {', '.join(rules)}, got {len(numbers)}")
    for (name, rule), number in zip(rules.items(), numbers, strict=True):
        high = block if name == "initial_num_masked" else rule.high
        if not rule.low <= number <= high and number != rule.absent:  # NaN too
            raise ValueError(f"{name}: expected a number in [{rule.low:g}, {high:g}], got {number}")


def check_values(a: Arguments) -> None:
    """ValueError unless what the tensors hold lies in its range: for the entry of a kernel on the host."""
    _, block, vocabulary = a.logits.shape
    for name, tensor in zip(PER_ROW, a.per_row, strict=True):
        rule = PER_ROW[name]
        _within(name, tensor, rule.low, block if name == "initial_num_masked" else rule.high)
    _within("suppress_ids", a.suppress_ids, 0, vocabulary - 1)
    _within("confidence_suppress_ids", a.confidence_suppress_ids, 0, vocabulary - 1)
    _within("valid_lens", a.valid_lens, 0, block)
    _within("candidates", a.candidates, -1, vocabulary - 1)
    if a.rank_noise is not None and not ((a.rank_noise >= 0) & (a.rank_noise < 1)).all():
        raise ValueError("rank_noise: expected numbers in [0, 1), got others")


def _tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _within(name: str, value: Tensor | None, low: float, high: float) -> None:
    if value is None or (value.dtype in INTEGERS and low == -math.inf):
        return
    if not value.is_floating_point():
        value = value.long()  # bounds may be beyond int32
    wrong = ~((value >= low) & (value <= high))
    if wrong.any():
        raise ValueError(f"{name}: expected values in [{low:g}, {high:g}], got {value[wrong][0].item()}")

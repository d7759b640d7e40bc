"""What a field of a policy can hold: the values of its choices, the ranges of its numbers."""

import math
from typing import Literal, get_args

from twotower_kernels.options.arguments import real, whole

Statistics = Literal["raw", "filtered"]
Score = Literal["confidence", "margin", "neg_entropy", "top", "gap", "random", "leftmost"]
Gate = Literal["none", "threshold", "factor", "entropy_sum", "prefix"]
GateOn = Literal["confidence", "score"]
Schedule = Literal[
    "none",
    "remaining",
    "even",
    "carried",
    "noise",
    "truncated",
    "rounded",
    "coin",
    "uniform",
    "corrupt",
    "posterior",
]
Base = Literal["masks", "block", "editable"]
Alpha = Literal["linear", "cosine", "exponential", "sine", "cosine_floor"]
Combine = Literal["fill", "union", "cap"]
Renoise = Literal["random", "mask"]
Time = Literal["masked_fraction", "schedule"]

# The values of a choice, in the order of its enumeration in csrc/common/remask_policy.h.
CHOICES: dict[str, tuple[str, ...]] = {
    "statistics": get_args(Statistics),
    "score": get_args(Score),
    "gate": get_args(Gate),
    "gate_on": get_args(GateOn),
    "schedule": get_args(Schedule),
    "schedule_base": get_args(Base),
    "alpha": get_args(Alpha),
    "combine": get_args(Combine),
    "renoise_as": get_args(Renoise),
    "time": get_args(Time),
}

HIGHEST_TEMPERATURE = 1e6  # of temperatures
NOISES = ("block", "sequence")  # what numbers the draws of tokens: their place in a block, or in their text
RANGES = {
    "temperature_end": (0.0, HIGHEST_TEMPERATURE),
    "position_penalty": (-1e6, 1e6),
    "rank_temperature": (0.0, HIGHEST_TEMPERATURE),
    "gate_slack": (0.0, math.inf),
    "min_t": (0.0, 0.5),
    "alpha_floor": (0.0, 0.5),
    "warmup": (0.0, 1.0),
    "complete_threshold": (0.0, 1.0),
}


def checked(name: str, default: object, value: object) -> object:
    """The field's value, numbers as Python's; TypeError or ValueError unless the field can have it."""
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
        return value
    if default is None and value is None:
        return value
    kind, as_python = ("an int", whole) if isinstance(default, int) else ("a number", real)
    try:
        number = as_python(name, value)
    except TypeError:
        kind += " or None" if default is None else ""
        raise TypeError(f"{name}: expected {kind}, got {value!r}") from None
    low, high = (0, 2**63 - 1) if as_python is whole else RANGES.get(name, (-math.inf, math.inf))
    if not low <= number <= high:
        expected = "0 or larger" if as_python is whole else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return number

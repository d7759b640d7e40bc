"""What counts as an integer and what as a number: an integer has `__index__`, a number is a `numbers.Real`. The element
of an array or a tensor without dimensions counts, too; a boolean does not.
"""

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def whole(name: str, value: Any, expected: str = "an integer") -> int:
    """The Python int that an argument is, for exact arithmetic; TypeError with the argument's name if it is none."""
    element = _element(value)
    if isinstance(element, bool | Tensor | np.ndarray) or not hasattr(element, "__index__"):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return operator.index(element)


def wholes(name: str, value: Any, expected: str = "integers") -> list[int]:
    """The Python ints of a list, an array or a tensor."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple | range):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return [whole(f"{name}[{i}]", element) for i, element in enumerate(value)]


def are_several(value: Any) -> bool:
    """Whether an argument holds elements, and is not one."""
    return isinstance(value, list | tuple | range) or bool(getattr(value, "ndim", 0))


def real(name: str, value: Any, expected: str = "a number") -> float:
    """The Python float that an argument is, an integer beyond them as infinity."""
    element = _element(value)
    is_number = isinstance(element, numbers.Real) and not isinstance(element, bool)
    if not is_number:
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(element)
    except OverflowError:
        return math.inf if element > 0 else -math.inf


def tokens(name: str, value: Any) -> Tensor:
    """Integers of any dtype as int64; TypeError with the dtype that they have if they are none."""
    if isinstance(value, np.ndarray) or (isinstance(value, list) and any(isinstance(v, np.integer) for v in value)):
        array = np.asarray(value)  # PyTorch reads fewer dtypes
        value = array.astype(np.int64) if array.dtype.kind in "iu" else array
    value = torch.as_tensor(value)
    if value.numel() and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    return value.long()


def _element(value: Any) -> Any:
    has_one = isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0
    return value.item() if has_one else value

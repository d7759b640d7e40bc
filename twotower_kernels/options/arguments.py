"""What counts as an integer and what as a number, wherever an argument is one: the same for every op and for the model.

An integer is what Python takes for one (`__index__`): an int, a NumPy integer. A number is an integer or a
`numbers.Real`: a float, a fraction, a NumPy float. An array or a tensor without dimensions stands for its element; a
tensor must lie on the CPU for it, since no op may wait for a device. Booleans are neither. While a graph is traced,
torch's symbolic numbers pass as they are.
"""

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Integers = Tensor | np.ndarray | Sequence[Any]  # a tensor, an array, a list of numbers or of such lists


def whole(name: str, value: Any, expected: str = "an integer") -> Any:
    """An argument as a Python int, of any size, so that arithmetic with it is exact.

    Raises:
        TypeError: it is no integer, which is said with its name.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    element = _element(value)
    try:
        if not isinstance(element, bool):
            return operator.index(element)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")


def wholes(name: str, value: Any, expected: str = "integers") -> list[Any]:
    """A list of integers as Python's: any sequence, a one-dimensional array or tensor, which the host then reads.

    Raises:
        TypeError: it is none, or one of the elements is no integer, which is said with its index.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")
    found = []
    for index, element in enumerate(value):
        try:
            found.append(whole(name, element))
        except TypeError:
            raise TypeError(f"{name}: expected {expected}, got {kind_of(element)} at {index}") from None
    return found


def are_several(value: Any) -> bool:
    """Whether an argument is a sequence, an array or a tensor of elements, and not one of them."""
    return isinstance(value, Sequence) or bool(getattr(value, "ndim", 0))


def real(name: str, value: Any, expected: str = "a number") -> Any:
    """An argument as a Python float, one beyond them as infinity.

    Raises:
        TypeError: it is no number, which is said with its name.
    """
    if type(value) is float or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    element = value if type(value) is int else _element(value)
    is_number = type(element) is int or (isinstance(element, numbers.Real) and not isinstance(element, bool))
    if is_number:
        try:
            return float(element)
        except OverflowError:
            return math.inf if element > 0 else -math.inf
    raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")


def integers(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Integers of any dtype as an int64 tensor; floats and booleans as a tensor of theirs, for the caller to judge.

    Args:
        name: of the argument.
        value: a tensor, which stays where it is; or a NumPy array, or a list.
        device: of what was no tensor; None: the CPU.

    Raises:
        TypeError: neither. ValueError: integers too large for an int64, lists that are no array.
    """
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, (list, tuple)) and any(isinstance(element, Tensor) for element in value):
        parts = [integers(name, element, device).to(device) for element in value]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{name}: expected rows of one length, got {[list(part.shape) for part in parts]}")
        tensor = torch.stack(parts)
    elif torch.compiler.is_compiling():  # a trace cannot look at an array
        tensor = torch.as_tensor(value, device=device)
    else:
        tensor = torch.from_numpy(_array(name, value)).to(device)
    if tensor.dtype == torch.uint64 and tensor.device.type == "cpu" and bool((tensor.long() < 0).any()):
        raise ValueError(f"{name}: expected integers below 2^63, got {max(tensor.flatten().tolist())}")
    if tensor.dtype in (torch.int64, torch.bool) or tensor.is_floating_point() or tensor.is_complex():
        return tensor
    return tensor.long()


def _array(name: str, value: Any) -> np.ndarray:
    """A NumPy array that PyTorch can take over: of integers, floats or booleans."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected rows of one length, got {reprlib.repr(value)}") from error
    if array.size == 0 and not isinstance(value, np.ndarray):
        return array.astype(np.int64)  # an empty list
    if array.dtype.kind in "iu" and not (array.size and int(array.max()) >= 2**63):
        return array.astype(np.int64)
    if array.dtype.kind in "fb":
        size = min(array.dtype.itemsize, 8 if isinstance(value, np.ndarray) else 4)  # of a list as PyTorch has it
        return array.astype(f"={array.dtype.kind}{size}")
    if all(isinstance(element, (int, np.integer)) for element in array.flat):
        raise ValueError(f"{name}: expected integers below 2^63, got {reprlib.repr(value)}")
    raise TypeError(f"{name}: expected integers, got {reprlib.repr(value)}")


def readable(tensor: Tensor) -> bool:
    """Whether its values may be looked at for a better error message: where that stalls no device and no trace, and
    where it has any."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and type(tensor) is Tensor


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__


def _element(value: Any) -> Any:
    """The element of an array without dimensions, or of such a tensor on the CPU; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and value.device.type == "cpu" else None
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value

"""Checkpoints: a folder with `model.safetensors`, or with shards and their `model.safetensors.index.json`.

A checkpoint is listed first, from its files' headers alone, and read afterwards: what is wrong with its keys, shapes or
dtypes is said before the first of its gigabytes is copied. Only safetensors are read. Nothing is unpickled, no code
comes from the folder, and its index cannot name a file outside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower_kernels.options.files import named, read_json, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_BYTES = 2**25  # of an index; that of the largest checkpoints takes a third

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as its file's header describes it. dtype: the header's word if torch has none."""

    key: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * (self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 1)

    def check(self, shape: tuple[int, ...], whose: str = "") -> None:
        """Whether the entry can fill a parameter of this shape, by whoever wants it.

        Raises:
            ValueError: another shape, or no floating dtype. The message names file and key.
        """
        if self.shape != shape:
            raise ValueError(
                f"{self.path}: key {named(self.key)} has shape {shown(list(self.shape))}, expected {list(shape)}{whose}"
            )
        if self.dtype not in _WEIGHT_DTYPES or isinstance(self.dtype, str):
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WEIGHT_DTYPES)
            raise ValueError(f"{self.path}: key {named(self.key)} has dtype {self.dtype}, expected one of {expected}")


def entries(folder: str | Path) -> list[Entry]:
    """Every tensor of a checkpoint folder, ordered by file and key.

    Raises:
        FileNotFoundError: no such folder, neither weights nor index in it, or a shard missing and no whole file.
        ValueError: an index that is none, that leads out of the folder, or that promises a key its shard lacks; a file
            that is truncated or no safetensors; a key in two files.
    """
    folder = Path(folder)
    found: dict[str, Entry] = {}
    for path, promised in sorted(_files(folder).items()):
        with _open(path) as file:
            keys = sorted(file.keys())
            if missing := sorted(promised - set(keys)):
                raise ValueError(f"{path}: {INDEX} promises key {named(missing[0])} here, but the file lacks it")
            for key in keys:
                if key in found:
                    raise ValueError(f"{path}: key {named(key)} was already found in {found[key].path.name}")
                header = file.get_slice(key)
                dtype = header.get_dtype()
                found[key] = Entry(key, path, tuple(header.get_shape()), _DTYPES.get(dtype, dtype))
    return list(found.values())


def tensors(wanted: Iterable[Entry]) -> Iterator[tuple[Entry, Tensor]]:
    """Reads entries one after the other. Each tensor is a window onto its file, to be copied and let go.

    Raises:
        ValueError: a file that changed since it was listed.
    """
    for path, group in groupby(wanted, key=lambda entry: entry.path):
        with _open(path) as file:
            for entry in group:
                yield entry, file.get_tensor(entry.key)


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files to open, and the keys that the index promises of each."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json and safetensors")
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
        return {folder / WEIGHTS: set()}
    files: dict[str, set[str]] = {}
    for key, name in _weight_map(index).items():
        # A download must not be able to name a file elsewhere. (A link inside the folder is its owner's own doing.)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{index}: key {named(key)} names {shown(name)}, which is not a file inside the folder")
        files.setdefault(name, set()).add(key)
    if not files:
        raise ValueError(f"{index}: expected a weight_map that names files, got an empty one")
    missing = next((name for name in files if not _is_file(folder / name)), None)
    if WEIGHTS not in files and _is_file(folder / WEIGHTS):
        # Left behind by one of two savings into one folder. Shards that are incomplete cannot be meant.
        named_there = f"shards, beside {WEIGHTS}" if missing is None else f"{named(missing)}, which is not there"
        read = "the shards" if missing is None else WEIGHTS
        warnings.warn(f"{index}: it names {named_there}; {read} will be read", stacklevel=2)
        files, missing = {WEIGHTS: set()} if missing else files, None
    if missing is not None:
        raise FileNotFoundError(f"{folder}/{named(missing)}: this shard is named by {INDEX} but is missing")
    return {folder / name: keys for name, keys in files.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _weight_map(index: Path) -> dict[str, Any]:
    otherwise = "not an index with a weight_map"
    content = read_json(index, most=MOST_BYTES, otherwise=otherwise)
    weight_map = content.get("weight_map") if isinstance(content, dict) else content
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: {otherwise}: it is a {type(weight_map).__name__}")
    return weight_map


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; its errors name it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {named(str(error))}") from None
    except (OSError, MemoryError) as error:  # a file larger than the address space is not mapped
        raise ValueError(f"{path}: cannot be read: {named(str(error))}") from None

"""Reading a folder of safetensors: one `model.safetensors`, or shards with `model.safetensors.index.json`.

Only safetensors are read: nothing is unpickled and no code comes from the folder.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower_kernels.options.files import named, read_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_BYTES = 2**25  # of an index
LONGEST = 200  # letters of a file's name
MORE_TOKENS = ("mtp.", "backbone.mtp.", "model.mtp.")  # keys of multi-token prediction, which no tower has


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files to read and the keys expected of each (empty: whatever it holds).

    Raises:
        FileNotFoundError: neither a single file nor an index, or a shard that the index names is missing, and there is
            no single file.
        ValueError: an index that is no JSON, has no weight map, or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return {folder / SINGLE: set()}
    raw = read_json(index, most=MOST_BYTES, otherwise="not an index with a weight_map")
    try:
        pairs = [(str(key), str(name)) for key, name in raw["weight_map"].items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index with a weight_map: {error!r}") from None
    shards: dict[Path, set[str]] = {}
    for key, name in pairs:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name) > LONGEST:
            raise ValueError(f"{index}: key {named(key)} names {shown(name)}, which is not a file inside the folder")
        shards.setdefault(folder / name, set()).add(key)
    missing = [path for path in shards if not path.is_file()]
    if missing and (folder / SINGLE).is_file():
        warnings.warn(f"{index}: it names {missing[0].name}, which is not there; {SINGLE} will be read", stacklevel=2)
        return {folder / SINGLE: set()}
    if missing:
        raise FileNotFoundError(f"{missing[0]}: this shard is named by {INDEX} but is missing")
    return shards


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with errors that name it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {named(str(error))}") from None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json and safetensors")


def listed(folder: Path) -> dict[str, tuple[str, int]]:
    """The dtype (the header's word) and the count of numbers of every key, by headers alone. Raises as `tensors`."""
    _check_folder(folder)
    found = {}
    for path in _shards(folder):
        with _opened(path) as file:
            for key in sorted(file.keys()):
                if key.startswith(MORE_TOKENS):
                    continue
                header = file.get_slice(key)
                found[key] = header.get_dtype(), math.prod(header.get_shape())
    return found


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields every (key, tensor) of a checkpoint folder, one tensor in memory at a time.

    Raises:
        FileNotFoundError, ValueError: as named by the message, which gives the file and the key.
    """
    _check_folder(folder)
    seen: dict[str, Path] = {}
    for path, expected in sorted(_shards(folder).items()):
        with _opened(path) as file:
            keys = set(file.keys())
            if missing := sorted(expected - keys):
                raise ValueError(f"{path}: {INDEX} promises key {named(missing[0])} here, but the file lacks it")
            if passed := [key for key in keys if key.startswith(MORE_TOKENS)]:
                warnings.warn(f"{path}: {len(passed)} keys of multi-token prediction are passed over", stacklevel=2)
            for key in sorted(keys - set(passed)):
                if key in seen:
                    raise ValueError(f"{path}: key {named(key)} was already read from {seen[key].name}")
                seen[key] = path
                yield key, file.get_tensor(key)

"""Reading a folder of safetensors: one `model.safetensors`, or shards with `model.safetensors.index.json`.

Only safetensors are read: nothing is unpickled and no code comes from the folder.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files to read and the keys expected of each (empty: whatever it holds).

    Raises:
        FileNotFoundError: neither a single file nor an index, or a shard that the index names is missing.
        ValueError: an index that is no JSON, has no weight map, or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return {folder / SINGLE: set()}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(key), str(name)) for key, name in weight_map.items()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index with a weight_map: {error!r}") from None
    shards: dict[Path, set[str]] = {}
    for key, name in pairs:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: key {key} names {name!r}, which is not a file inside the folder")
        shards.setdefault(folder / name, set()).add(key)
    for path in shards:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this shard is named by {INDEX} but is missing")
    return shards


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with errors that name it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json and safetensors")


def has_prefix(folder: Path, prefix: str) -> bool:
    """Whether any key of the checkpoint starts with `prefix`. Errors as `tensors`."""
    _check_folder(folder)
    for path, expected in _shards(folder).items():
        with _opened(path) as file:
            if any(key.startswith(prefix) for key in expected or file.keys()):
                return True
    return False


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
                raise ValueError(f"{path}: {INDEX} promises key {missing[0]} here, but the file lacks it")
            for key in sorted(keys):
                if key in seen:
                    raise ValueError(f"{path}: key {key} was already read from {seen[key].name}")
                seen[key] = path
                yield key, file.get_tensor(key)

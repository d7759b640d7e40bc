"""From a checkpoint's files into a model's parameters: key by key, each straight to its place, dtype and device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twotower_kernels import checkpoint
from twotower_kernels.checkpoint import Entry
from twotower_kernels.config import TwoTowerConfig
from twotower_kernels.layers import KEPT_WIDE, Stacked

LARGE = 10**9  # bytes from which on loading shows a bar


def tower_of(key: str) -> str:
    """The tower that a key of the released layout belongs to: "context" or "denoiser"."""
    return "context" if key.startswith("context_") else "denoiser"


class Place(NamedTuple):
    """Where a key's tensor goes: a parameter, or a piece of a stacked one."""

    module: nn.Module
    name: str
    piece: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(getattr(self.module, self.name).shape)
        return whole if self.piece is None else whole[1:]


def weight_dtype(config: TwoTowerConfig, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the config's.

    Raises:
        TypeError: not float64, float32, bfloat16 or float16.
    """
    dtype = getattr(torch, config.torch_dtype) if dtype is None else dtype
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype!r}")
    return dtype


def places(model: nn.Module) -> dict[str, Place]:
    """Per key of the released layout, its place in the model: the keys of `model.state_dict()`."""
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Stacked):
                for i in range(len(parameter)):
                    found[f"{prefix}.{module.pieces[name].format(i)}"] = Place(module, name, i)
            else:
                found[f"{prefix}.{name}"] = Place(module, name, None)
    return found


@torch.inference_mode(False)  # parameters made in inference mode could not be loaded into later
@torch.no_grad()
def fill(
    model: nn.Module,
    folder: Path,
    devices: Mapping[str, torch.device],
    dtype: torch.dtype,
    known: set[str],
    progress: bool | None,
) -> None:
    """Fills a model on the meta device from a checkpoint folder.

    Args:
        devices: of each tower's weights.
        known: keys that a checkpoint may hold, whether or not this model wants them.
        progress: as in `TwoTowerModel.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as `TwoTowerModel.from_pretrained`.
    """
    listed = checkpoint.entries(folder)
    open_places = places(model)
    sources = _sources(listed, set(open_places), known, folder)  # checked in full before anything is read
    dtypes = {key: entry.check(open_places[key].shape) for entry, keys in sources.items() for key in keys}
    total = sum(entry.nbytes for entry in sources)
    shown = total > LARGE and sys.stderr.isatty() if progress is None else progress
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {folder.name}", disable=not shown) as bar:
        for entry, tensor in checkpoint.tensors(sources):
            for key in sources[entry]:
                _put(open_places.pop(key), key, tensor, dtype, dtypes[key], devices[tower_of(key)])
            bar.update(entry.nbytes)
    _leave_unconditioned(open_places, devices["denoiser"])


def _sources(listed: list[Entry], wanted: set[str], known: set[str], folder: Path) -> dict[Entry, list[str]]:
    """The entries to read and the keys that each fills; all of `wanted`, each once.

    A backbone's checkpoint has one tower, which fills both, and no time conditioning.
    """
    backbone = any(entry.key.startswith("backbone.") for entry in listed)
    if backbone:
        wanted = {key for key in wanted if not _is_conditioning(key)}
        known = {key for key in known if not _is_conditioning(key)}
    sources: dict[Entry, list[str]] = {}
    filled: dict[str, str] = {}
    for entry in listed:
        keys = _filled_by(entry.key, backbone)
        for key in keys:
            if key not in known:
                raise ValueError(f"{entry.path}: key {entry.key} is not part of this model")
            if key in filled:
                raise ValueError(f"{entry.path}: key {entry.key} was already given, as {filled[key]}")
            filled[key] = entry.key
        if keys := [key for key in keys if key in wanted]:
            sources[entry] = keys
    if missing := wanted - set(filled):
        raise ValueError(f"{folder}: key {min(missing)} is missing ({len(missing)} keys in all)")
    return sources


def _filled_by(key: str, backbone: bool) -> list[str]:
    """The model's keys that a checkpoint's key fills. Some files say `embedding` for `embeddings`."""
    key = key.replace(".embedding.weight", ".embeddings.weight")
    if key.startswith("backbone."):
        return [key.replace("backbone", tower, 1) for tower in ("context_tower", "denoiser_tower")]
    if backbone and key == "lm_head.weight":
        return ["context_lm_head.weight", "lm_head.weight"]
    return [key]


def _is_conditioning(key: str) -> bool:
    return key.startswith(("t_embedder.", "t_block.", "scale_shift_tables."))


def _put(
    place: Place, key: str, tensor: Tensor, dtype: torch.dtype, file_dtype: torch.dtype, device: torch.device
) -> None:
    """Copies a tensor to its place, making the parameter real when its first piece comes."""
    parameter = getattr(place.module, place.name)
    if parameter.is_meta:
        if key.endswith(KEPT_WIDE):
            dtype = torch.promote_types(dtype, file_dtype)
        parameter = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
        setattr(place.module, place.name, parameter)
    (parameter if place.piece is None else parameter[place.piece]).copy_(tensor)


def _leave_unconditioned(open_places: dict[str, Place], device: torch.device) -> None:
    """What a backbone's checkpoint leaves open becomes no conditioning: shift 0, scale 0, gate 1, whatever the time."""
    for place in open_places.values():
        parameter = getattr(place.module, place.name)
        if parameter.is_meta:
            parameter = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(place.module, place.name, nn.Parameter(parameter, requires_grad=False))
        if isinstance(place.module, Stacked):
            parameter[place.piece, 2] = 1  # rows: shift, scale, gate

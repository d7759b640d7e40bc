"""From a checkpoint's files into a model's parameters: key by key, each straight to its dtype and device."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twotower_kernels.model import checkpoint
from twotower_kernels.model.checkpoint import Entry
from twotower_kernels.model.layers import NEVER_NARROWED, Stacked
from twotower_kernels.model.layout import STACKED, Layout, tower_of
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.files import named, shown
from twotower_kernels.quantization import BITS, GROUP, QuantizedTensor, quantize

TOWERS = ("both", "context", "denoiser")
LARGE = 10**9  # bytes from which on loading shows a bar
BACKBONE = ("backbone.", "model.")  # how keys of a single tower begin: in files, and in transformers' own modules
MORE_TOKENS = ("mtp.", "backbone.mtp.", "model.mtp.")  # keys of layers that predict further tokens, which no tower has


class Target(NamedTuple):
    """Where a key's tensor goes: a parameter, or a piece of a stacked one."""

    module: nn.Module
    name: str
    piece: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(getattr(self.module, self.name).shape)
        return whole if self.piece is None else whole[1:]


class Plan(NamedTuple):
    """A checkpoint that was compared with its config, and fits: what to read, and the keys that each tensor fills."""

    sources: dict[Entry, list[str]]
    layout: Layout
    dtype: torch.dtype
    format_of: Callable[[str], str | None]

    def saved(self) -> dict[str, int]:
        """Bytes of each tower that quantized weights do not need."""
        saved = dict.fromkeys(self.layout.towers, 0)
        for entry, keys in self.sources.items():
            for key in keys:
                if format := self.format_of(key):
                    saved[tower_of(key)] += int(math.prod(entry.shape) * (self.dtype.itemsize - BITS[format] / 8))
        return saved


def weight_dtype(config: TwoTowerConfig, dtype: torch.dtype | None, listed: Iterable[Entry] = ()) -> torch.dtype:
    """The dtype asked for, or the config's, which may be that of most of a checkpoint's weights.

    Raises:
        TypeError: not float64, float32, bfloat16 or float16.
    """
    if dtype is None and config.torch_dtype == "auto":
        held: Counter[torch.dtype] = Counter()
        for entry in listed:
            if isinstance(entry.dtype, torch.dtype) and entry.dtype.is_floating_point:
                held[entry.dtype] += math.prod(entry.shape)
        dtype = max(held, key=held.__getitem__, default=torch.float32)
    dtype = getattr(torch, config.torch_dtype) if dtype is None else dtype
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype!r}")
    return dtype


def targets(model: nn.Module, *, stacked: bool = False) -> dict[str, Target]:
    """Per key of the released layout, what holds it in the model: the keys of `model.state_dict()`.

    stacked: a layer's experts under two keys, as in `Layout`.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, Stacked):
                found[f"{prefix}.{name}"] = Target(module, name, None)
            elif stacked and (whole := f"{prefix}.{name}_proj").endswith(STACKED):
                found[whole] = Target(module, name, None)
            else:
                for i in range(len(parameter)):
                    found[f"{prefix}.{module.pieces[name].format(i)}"] = Target(module, name, i)
    return found


def plan(
    folder: Path,
    listed: list[Entry],
    config: TwoTowerConfig,
    towers: str,
    dtype: torch.dtype | None = None,
    format_of: Callable[[str], str | None] = lambda key: None,
) -> Plan:
    """What loading a folder's entries comes to. All is checked by the files' headers; nothing is read or made yet.

    Raises:
        ValueError, TypeError: as `TwoTowerModel.from_pretrained`.
    """
    passed = [entry for entry in listed if entry.key.startswith(MORE_TOKENS)]
    if passed:
        what = f"{len(passed)} keys of multi-token prediction (mtp.*)"
        warnings.warn(f"{folder}: {what} are passed over: no tower has such layers", stacklevel=2)
        listed = [entry for entry in listed if not entry.key.startswith(MORE_TOKENS)]
    backbone = any(entry.key.startswith(BACKBONE) for entry in listed)
    stacked = any(entry.key.endswith(STACKED) for entry in listed)
    layout, whole = (Layout(config, t, conditioning=not backbone, stacked=stacked) for t in (towers, "both"))
    sources = _sources(listed, layout, whole, backbone, folder)
    whose = f" by a config of model_type {shown(config.model_type)}"
    for entry, keys in sources.items():
        for key in keys:
            if (shape := layout.shape(key)) is not None:
                entry.check(shape, whose)
                if format := format_of(key):
                    _check_groups(key, shape, format)
    return Plan(sources, layout, weight_dtype(config, dtype, listed), format_of)


@torch.inference_mode(False)  # parameters made in inference mode could not be loaded into later
@torch.no_grad()
def fill(
    model: nn.Module, plan: Plan, devices: Mapping[str, torch.device], progress: bool | None, name: str = "weights"
) -> None:
    """Fills a model on the meta device by its plan.

    Args:
        devices: of each tower's weights.
        progress: as in `TwoTowerModel.from_pretrained`.
        name: what is loaded, for the bar.

    Raises:
        ValueError: a file that changed since it was listed.
    """
    open_targets = targets(model, stacked=plan.layout.stacked)
    total = sum(entry.nbytes for entry in plan.sources)
    watched = total > LARGE and sys.stderr.isatty() if progress is None else progress
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {name}", disable=not watched) as bar:
        for entry, tensor in checkpoint.tensors(plan.sources):
            for key in plan.sources[entry]:
                target, device = open_targets.pop(key), devices[tower_of(key)]
                if format := plan.format_of(key):
                    _put_quantized(target, tensor, format, device)
                else:
                    _put(target, key, tensor, plan.dtype, device)
            bar.update(entry.nbytes)
    _leave_unconditioned(open_targets, devices["denoiser"])


def _sources(
    listed: list[Entry], wanted: Layout, known: Layout, backbone: bool, folder: Path
) -> dict[Entry, list[str]]:
    """The entries to read and the keys that each fills; all of `wanted`, each once.

    A backbone's checkpoint has one tower, which fills both, and no time conditioning.
    """
    sources: dict[Entry, list[str]] = {}
    filled: dict[str, str] = {}
    for entry in listed:
        keys = _filled_by(entry.key, backbone)
        for key in keys:
            if known.shape(key) is None:
                raise ValueError(f"{entry.path}: key {named(entry.key)} is not part of this model")
            if key in filled:
                raise ValueError(f"{entry.path}: key {entry.key} was already given, as {filled[key]}")
            filled[key] = entry.key
        # Keys that another choice of towers would read are passed over.
        if keys := [key for key in keys if tower_of(key) in wanted.towers]:
            sources[entry] = keys
    if missing := len(wanted) - sum(map(len, sources.values())):
        first = next(key for key in wanted if key not in filled)
        raise ValueError(f"{folder}: key {first} is missing ({missing} keys in all: {wanted} has {len(wanted)})")
    return sources


def _filled_by(key: str, backbone: bool) -> list[str]:
    """The model's keys that a checkpoint's key fills. Some files say `embedding` for `embeddings`."""
    key = key.replace(".embedding.weight", ".embeddings.weight")
    if key.startswith(BACKBONE):
        rest = key.partition(".")[2]
        return [f"context_tower.{rest}", f"denoiser_tower.{rest}"]
    if backbone and key == "lm_head.weight":
        return ["context_lm_head.weight", "lm_head.weight"]
    return [key]


def _put(target: Target, key: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Copies a tensor to its parameter, which is made real when its first piece comes."""
    parameter = getattr(target.module, target.name)
    if parameter.is_meta:
        if key.endswith(NEVER_NARROWED):
            dtype = torch.promote_types(dtype, tensor.dtype)
        parameter = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
        setattr(target.module, target.name, parameter)
    (parameter if target.piece is None else parameter[target.piece]).copy_(tensor)


def _group(format: str, columns: int) -> int | None:
    """Columns per scale: the format's, of int4 16 where 32 do not divide the columns."""
    return 16 if format == "int4" and columns % 32 else GROUP.get(format)


def _check_groups(key: str, shape: tuple[int, ...], format: str) -> None:
    group = _group(format, shape[-1])
    if group and shape[-1] % group:
        raise ValueError(f"quantize: expected a multiple of {group} columns for {format}, got {shape[-1]} in {key}")


def _put_quantized(target: Target, tensor: Tensor, format: str, device: torch.device) -> None:
    """Quantizes a matrix, or every matrix of a stack, in its place."""
    made = quantize(tensor.to(device), format, group_size=_group(format, tensor.shape[-1]))
    if target.piece is None:
        _replace(target, made)
        return
    held = getattr(target.module, target.name)
    if not isinstance(held, QuantizedTensor):
        parts = [None if x is None else x.new_empty(len(held), *x.shape) for x in made.parts]
        held = QuantizedTensor(format, *parts)  # type: ignore[arg-type]
        _replace(target, held)
    for whole, piece in zip(held.parts, made.parts, strict=True):
        if whole is not None and piece is not None:
            whole[target.piece].copy_(piece)


def _replace(target: Target, weight: QuantizedTensor) -> None:
    delattr(target.module, target.name)  # a parameter's place takes no module
    setattr(target.module, target.name, weight)


def _leave_unconditioned(open_targets: dict[str, Target], device: torch.device) -> None:
    """What a backbone's checkpoint leaves open becomes no conditioning: shift 0, scale 0, gate 1, whatever the time."""
    for target in open_targets.values():
        parameter = getattr(target.module, target.name)
        if parameter.is_meta:
            parameter = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(target.module, target.name, nn.Parameter(parameter, requires_grad=False))
        if isinstance(target.module, Stacked):
            parameter[target.piece, 2] = 1  # rows: shift, scale, gate


def devices_of(
    towers: str,
    device: torch.device | str,
    context_device: torch.device | str | None,
    denoiser_device: torch.device | str | None,
) -> dict[str, torch.device]:
    """The device of each tower, checked."""
    if towers not in TOWERS:
        raise ValueError(f"towers: expected one of {TOWERS}, got {towers!r}")
    found = {}
    for tower, own in (("context", context_device), ("denoiser", denoiser_device)):
        if own is not None and towers not in ("both", tower):
            raise ValueError(f"{tower}_device: expected None for towers={towers!r}, got {str(own)!r}")
        name, chosen = ("device", device) if own is None else (f"{tower}_device", own)
        try:
            found[tower] = torch.empty(0, device=chosen).device  # "cuda" is the current GPU
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{name}: expected a device of this machine, got {str(chosen)!r} ({reason})") from error
    return found

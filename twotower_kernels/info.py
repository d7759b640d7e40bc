"""What is installed, what it runs on, and what a checkpoint needs: the contents of `twotower info`."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import twotower_kernels
from twotower_kernels import checkpoint, cpu
from twotower_kernels.config import TwoTowerConfig

KEYS = ("CPU", "CUDA", "Autograd", "Meta")  # the dispatcher's; Meta is what torch.compile traces with
LONG_CONTEXT = 128 * 1024  # tokens


def machine() -> dict[str, str]:
    """Versions, instruction sets, threads, devices."""
    try:
        kernels = cpu.kernels()
        instructions = f"{kernels.isa()} in use; this processor has {', '.join(kernels.isas())}"
    except ImportError as error:
        instructions = f"none: {error}"
    devices = [f"cpu ({platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({device.name}, {size(device.total_memory)})")
    return {
        "twotower-kernels": twotower_kernels.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "instruction set": instructions,
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
    }


def ops() -> dict[str, dict[str, bool]]:
    """Every registered op, and which of `KEYS` PyTorch's dispatcher has a kernel for."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("twotower::"))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name.removeprefix("twotower::"): {key: has(name, key) for key in KEYS} for name in names}


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint holds and needs, in bytes unless said otherwise."""

    parameters: dict[str, int]  # numbers per tower ("backbone": a single tower, which seeds both)
    weights: dict[str, int]  # per tower, in the dtypes of the files
    kv_per_token: int  # keys and values of one token of one row, in the config's dtype
    state_per_row: int  # Mamba-2 states of one row, whatever its length

    @property
    def long_context(self) -> int:
        """Weights, and one row of 128 K tokens."""
        return sum(self.weights.values()) + LONG_CONTEXT * self.kv_per_token + self.state_per_row


def sizes(folder: Path) -> Sizes:
    """The sizes of a checkpoint folder, from its config and its files' headers alone.

    Raises:
        FileNotFoundError, ValueError: as the config and the files do, naming what is wrong.
    """
    config = TwoTowerConfig.from_file(folder / "config.json")
    entries = checkpoint.entries(folder)
    single = any(entry.key.startswith("backbone.") for entry in entries)
    parameters: dict[str, int] = {}
    weights: dict[str, int] = {}
    for entry in entries:
        tower = "backbone" if single else "context" if entry.key.startswith("context_") else "denoiser"
        parameters[tower] = parameters.get(tower, 0) + math.prod(entry.shape)
        weights[tower] = weights.get(tower, 0) + entry.nbytes
    width = getattr(torch, config.torch_dtype).itemsize
    attention, mamba = (config.hybrid_override_pattern.count(letter) for letter in "*M")
    conv = config.mamba_channels * max(0, config.conv_kernel - 1) * width
    scan = config.mamba_inner * config.ssm_state_size * max(4, width)  # float32, or wider
    return Sizes(
        parameters=parameters,
        weights=weights,
        kv_per_token=2 * attention * config.num_key_value_heads * config.head_dim * width,
        state_per_row=mamba * (conv + scan),
    )


def size(number: int) -> str:
    """Bytes for a reader: three digits and a unit."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"

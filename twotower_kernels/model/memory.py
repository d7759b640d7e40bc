"""What a model needs of memory, and how much there is: weights that no device could hold are refused, instead of the
machine standing still."""

from __future__ import annotations

import resource

import torch

from twotower_kernels.model.layout import Layout
from twotower_kernels.options.config import TwoTowerConfig

UNKNOWN = 2**63 - 1  # what an address reaches


def check_room(
    layout: Layout, dtype: torch.dtype, devices: dict[str, torch.device], saved: dict[str, int] | None = None
) -> None:
    """Refuses weights that no device could hold, before the first of them is made.

    Args:
        devices: of each tower.
        saved: bytes of each tower that are not needed, because weights are quantized.

    Raises:
        ValueError: they need more than all of a device's memory.
    """
    for device in {devices[tower] for tower in layout.towers}:
        here = [tower for tower in layout.towers if devices[tower] == device]
        needed = sum(dtype.itemsize * layout.numbers(tower) - (saved or {}).get(tower, 0) for tower in here)
        if needed > (room := memory(device)):
            raise ValueError(f"{layout} needs {needed} bytes in {dtype}, more than the {room} that {device} has in all")


def kv_per_token(config: TwoTowerConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token of one row, at so many bytes per number."""
    return 2 * config.hybrid_override_pattern.count("*") * config.num_key_value_heads * config.head_dim * itemsize


def state_per_row(config: TwoTowerConfig, itemsize: int) -> int:
    """Bytes of one row's Mamba-2 states, whatever its length: the last inputs of the convolution, and the state itself
    in float32 or wider."""
    conv = config.mamba_channels * max(0, config.conv_kernel - 1) * itemsize
    scan = config.mamba_inner * config.ssm_state_size * max(4, itemsize)
    return config.hybrid_override_pattern.count("M") * (conv + scan)


def memory(device: torch.device) -> int:
    """Bytes that a device has in all, used or not; `UNKNOWN` where there is no telling."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(_machine(), _group(), _process()) if device.type == "cpu" else UNKNOWN


def _machine() -> int:
    """Memory and swap."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return 1024 * sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):  # another system
        return UNKNOWN


def _group() -> int:
    """The limit of this process's control group."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # no such groups, or no limit: "max"
        return UNKNOWN


def _process() -> int:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return UNKNOWN if limit == resource.RLIM_INFINITY else limit

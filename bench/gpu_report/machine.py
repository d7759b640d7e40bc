"""What a report says of its machine: versions, driver, card and its limits. Asked for one by one; nothing that names
the machine or whom it belongs to is among them."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from twotower_kernels import cpu
from twotower_kernels.bench.report import tables
from twotower_kernels.bench.report.saved import write_json
from twotower_kernels.cuda import build as cuda

PACKAGES = ("torch", "triton", "numpy", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
PACKAGES += ("transformers", "safetensors", "tokenizers")
# As nvidia-smi calls them: none of its serial numbers, addresses on a bus, or processes.
FIELDS = (
    "name", "driver_version", "vbios_version", "memory.total", "memory.used", "power.limit", "power.default_limit",
    "power.max_limit", "power.draw", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "clocks.mem",
    "clocks_throttle_reasons.active", "temperature.gpu", "utilization.gpu", "persistence_mode", "ecc.mode.current",
    "mig.mode.current", "compute_mode", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
SECONDS = 20  # that nvidia-smi may take


def _said(fact: Callable[[], Any]) -> Any:
    """A fact, or why there is none: a report of what is there does not fail for what is not."""
    try:
        return fact()
    except Exception as error:
        return f"unknown: {type(error).__name__}: {' '.join(str(error).split())}"


def versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "NVRTC", str(_said(cuda.compiler))
    yield "CUDA of torch", str(torch.version.cuda)
    yield "libc", " ".join(platform.libc_ver()).strip() or "unknown"
    yield "architecture", platform.machine()


def card() -> dict[str, Any]:
    """As PyTorch sees the first GPU."""
    found = torch.cuda.get_device_properties(0)
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size", "shared_memory_per_multiprocessor")
    facts = {name: getattr(found, name) for name in names if hasattr(found, name)}
    facts |= {"compute capability": "{}.{}".format(*torch.cuda.get_device_capability(0))}
    return facts | {"architecture": _said(lambda: cuda.architecture(0)), "GPUs": torch.cuda.device_count()}


def _queried(which: Sequence[str], fields: Sequence[str]) -> list[str] | None:
    command = ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if done.returncode == 0 and lines else []
    return cells if len(cells) == len(fields) else None


def limits() -> dict[str, str]:
    """Driver, power, clocks and modes of the GPU that PyTorch calls its first, as nvidia-smi says them."""
    number = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = [] if number is None else ["-i", f"GPU-{number}"]
    whole = _queried(which, FIELDS)
    if whole is not None:
        return dict(zip(FIELDS, whole, strict=True))
    one_by_one = {name: _queried(which, [name]) for name in FIELDS}  # another driver does not know them all
    return {name: cells[0] for name, cells in one_by_one.items() if cells}


def memory() -> int | None:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def facts(device: str) -> dict[str, Any]:
    """All of it, as it is saved."""
    about = tables.machine(device)
    about |= {"instruction sets": _said(cpu.kernels().isas), "memory": memory()}
    about |= {"load average": _said(lambda: round(os.getloadavg()[0], 1)), "versions": dict(versions())}
    if device == "cuda":
        about |= {"card": _said(card), "nvidia-smi": _said(limits)}
    return about


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.machine", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--save", type=Path, required=True, metavar="FOLDER", help="write FOLDER/machine.json")
    options = parser.parse_args(arguments)
    found = facts(options.device)
    write_json(options.save / "machine.json", found)
    print(found["gpu"] or found["processor"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the kernels of this package must show on a machine: `twotower check` without a kernel of another's."""

from __future__ import annotations

import importlib

import torch


def run(device: str) -> int:
    """Checks every operation and the models on a device, in processes side by side, and prints what fails.

    Args:
        device: "cpu", or "cuda" for the first GPU.

    Returns:
        0 if everything held, 1 if something failed, 130 after Ctrl-C.

    Raises:
        ValueError: another device, or none there.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, which is the first GPU, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU, PyTorch sees none; --device cpu checks the kernels for CPUs")
    command = importlib.import_module("twotower_kernels.bench.checks.command")
    code: int = command.main(["--device", device])
    return code

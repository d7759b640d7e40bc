"""Whether the GPU still answers this process."""

from __future__ import annotations

import torch

LOST = 77  # the exit code of a process to which its GPU is lost


def lost(device: str = "cuda") -> bool:
    """An illegal access takes the GPU from its process for good: whatever that process asks of it fails from then on,
    so that the next check or measurement needs a process of its own."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it is, it is no answer
        return True
    return False

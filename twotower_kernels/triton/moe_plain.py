"""The router's product on GPUs in plain PyTorch: a stand-in until it is part of the routing kernel, no kernel itself.

Formula: `reference/moe.py`. Three small launches. None waits for the device, so a graph captures them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    return torch.mm(x.double(), gate_weight.double().t())

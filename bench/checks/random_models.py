"""TwoTower models of random weights, the same in the specification and in the package."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels import TwoTowerConfig, TwoTowerModel
from twotower_kernels.reference.model import TwoTower

VOCABULARY = 61
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, conv_kernel=4)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SIZES |= dict(mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=16, n_groups=2)
SIZES |= dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_group=4, topk_group=2)
SIZES |= dict(moe_shared_expert_intermediate_size=20, routed_scaling_factor=2.5)


class Models(NamedTuple):
    """The package's model, the specification's in the same dtype, and that one in float64."""

    ours: TwoTowerModel
    naive: TwoTower
    exact: TwoTower


def models(pattern: str, dtype: torch.dtype, **options: Any) -> Models:
    """Weights of the size that training leaves, rounded to `dtype`, in all three."""
    sizes = SIZES | options | {"hybrid_override_pattern": pattern}
    torch.manual_seed(len(pattern))
    naive = TwoTower(TwoTowerConfig(**sizes)).requires_grad_(False)
    for name, p in naive.named_parameters():
        normal = torch.randn(p.shape)
        if name.endswith("A_log"):
            p.copy_(normal.abs().add(0.1).log())
        elif name.endswith("dt_bias"):
            p.copy_(normal - 2)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            p.copy_(1 + 0.3 * normal)
        elif name.endswith(("bias", "scale_shift_tables.0")):
            p.copy_(0.2 * normal)
        else:
            p.copy_(normal / p.shape[-1] ** 0.5)
    naive.to(dtype)
    ours = TwoTowerModel(TwoTowerConfig(**sizes), dtype=dtype)
    ours.load_state_dict(naive.state_dict())
    return Models(ours, naive, copy.deepcopy(naive).double())


def with_wide_residual(models: Models) -> Models:
    """The same weights, the residual stream of the narrow ones in float32."""
    for model in models[:2]:
        model.config = replace(model.config, residual_in_fp32=True)  # type: ignore[assignment, type-var]
    return models


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

"""The operations. One file per family; each holds public functions, checks, schemas, fakes and gradients."""

from twotower_kernels.ops.adaln import adaln_norm, gated_residual, gated_residual_adaln_norm, rms_norm
from twotower_kernels.ops.attention import (
    append_kv,
    block_attention,
    block_causal_attention,
    context_attention,
    merge_attention,
)
from twotower_kernels.ops.linear import linear
from twotower_kernels.ops.mamba2 import gated_rms_norm, mamba2_scan
from twotower_kernels.ops.moe import moe_experts, moe_gate, moe_route
from twotower_kernels.ops.moe_packing import pack_experts
from twotower_kernels.ops.moe_plans import MoePlan, moe_plan
from twotower_kernels.ops.remask import RemaskResult, remask

__all__ = [
    "MoePlan",
    "RemaskResult",
    "adaln_norm",
    "append_kv",
    "block_attention",
    "block_causal_attention",
    "context_attention",
    "gated_residual",
    "gated_residual_adaln_norm",
    "gated_rms_norm",
    "linear",
    "mamba2_scan",
    "merge_attention",
    "moe_experts",
    "moe_gate",
    "moe_plan",
    "moe_route",
    "pack_experts",
    "remask",
    "rms_norm",
]

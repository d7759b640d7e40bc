"""The operations. One file per family; each holds public functions, checks, schemas, fakes and gradients."""

from twotower_kernels.ops.adaln import adaln_norm, gated_residual, gated_residual_adaln_norm, rms_norm
from twotower_kernels.ops.remask import RemaskResult, remask

__all__ = ["RemaskResult", "adaln_norm", "gated_residual", "gated_residual_adaln_norm", "remask", "rms_norm"]

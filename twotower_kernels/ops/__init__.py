"""The operations. One file per family; each holds public functions, checks, schemas, fakes and gradients."""

from twotower_kernels.ops.adaln import adaln_norm, gated_residual, gated_residual_adaln_norm, rms_norm
from twotower_kernels.ops.mamba2 import gated_rms_norm, mamba2_scan

__all__ = ["adaln_norm", "gated_residual", "gated_residual_adaln_norm", "gated_rms_norm", "mamba2_scan", "rms_norm"]

"""Kernels for block diffusion language models, and a TwoTower model composed of them."""

from pathlib import Path

from twotower_kernels.generation import GenerateResult, StepEvent, Stream, generate_blocks, stream_blocks
from twotower_kernels.model import ContextState, TwoTowerModel
from twotower_kernels.ops import (
    MoePlan,
    adaln_norm,
    append_kv,
    block_attention,
    block_causal_attention,
    context_attention,
    gated_residual,
    gated_residual_adaln_norm,
    gated_rms_norm,
    linear,
    mamba2_scan,
    merge_attention,
    moe_experts,
    moe_gate,
    moe_plan,
    moe_route,
    pack_experts,
    rms_norm,
)
from twotower_kernels.ops.remask import RemaskResult, remask
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.generation import GenerationConfig
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.options.seeds import sequence_seed
from twotower_kernels.quantization import QuantizedTensor, quantize

__version__ = "0.1.0.dev0"
__all__ = [
    "ContextState",
    "GenerateResult",
    "GenerationConfig",
    "MoePlan",
    "QuantizedTensor",
    "RemaskPolicy",
    "RemaskResult",
    "StepEvent",
    "Stream",
    "TwoTowerConfig",
    "TwoTowerModel",
    "__version__",
    "adaln_norm",
    "append_kv",
    "block_attention",
    "block_causal_attention",
    "context_attention",
    "demo_path",
    "gated_residual",
    "gated_residual_adaln_norm",
    "gated_rms_norm",
    "generate_blocks",
    "linear",
    "mamba2_scan",
    "merge_attention",
    "moe_experts",
    "moe_gate",
    "moe_plan",
    "moe_route",
    "pack_experts",
    "quantize",
    "remask",
    "rms_norm",
    "sequence_seed",
    "stream_blocks",
]


def demo_path() -> Path:
    """The folder of the small trained model that is shipped with the package.

    It holds `config.json` and `model.safetensors` in the released checkpoint's layout, and a model card, `README.md`.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    folder = Path(__file__).resolve().parent / "demo"
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: the shipped model lacks {', '.join(missing)}; reinstall twotower-kernels")
    return folder

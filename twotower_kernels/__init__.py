"""Kernels for block diffusion language models, and a TwoTower model composed of them."""

from pathlib import Path

from twotower_kernels.generate import GenerateResult, StepEvent, Stream
from twotower_kernels.ops import adaln_norm, gated_residual, gated_residual_adaln_norm, rms_norm

__version__ = "0.1.0.dev0"
__all__ = [
    "GenerateResult",
    "StepEvent",
    "Stream",
    "__version__",
    "adaln_norm",
    "demo_path",
    "gated_residual",
    "gated_residual_adaln_norm",
    "rms_norm",
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

"""Kernels for block diffusion language models with two towers.

The kernels arrive one by one; what they must compute is already here, as the executable specification in `reference/`.
Until then this package carries the small trained model that the specification, the tests and the demo run on.
"""

from pathlib import Path

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "demo_path"]


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

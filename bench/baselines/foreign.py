"""Programs nobody here wrote, imported so that they run on any CPU: parts of mamba_ssm and of transformers.

mamba_ssm's modules hold plain PyTorch references beside their Triton kernels, and import Triton and a CUDA extension
on the way. Neither is needed to run a reference, so both are replaced by stand-ins for the time of the import.
transformers takes mamba_ssm's kernels instead of its own PyTorch code wherever they can be imported; here they cannot.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock


@contextmanager
def _replaced(stand_ins: dict[str, ModuleType | MagicMock | None], forget: str) -> Iterator[None]:
    """Imports find `stand_ins` (None: nothing) under these names, and nobody later finds them or package `forget`."""
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name in stand_ins or name.split(".")[0] == forget]:
            del sys.modules[name]
        sys.modules.update(before)


def _mamba_ssm() -> SimpleNamespace:
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("mamba_ssm is not installed (make test installs it in a checkout)")
    package = ModuleType("mamba_ssm")  # without running its __init__, which imports every model
    package.__path__ = list(spec.submodule_search_locations)
    triton = MagicMock(__version__="3.0.0")
    triton.Config = lambda kwargs, **options: SimpleNamespace(kwargs=kwargs, **options)
    triton.autotune = lambda configs, **_: lambda kernel: SimpleNamespace(configs=configs)
    stand_ins = {
        "mamba_ssm": package,
        "triton": triton,
        "triton.language": triton.language,
        "selective_scan_cuda": MagicMock(),
    }
    with _replaced(stand_ins, forget="mamba_ssm"):
        modules = [
            importlib.import_module(f"mamba_ssm.{name}")
            for name in (
                "ops.triton.selective_state_update",
                "ops.triton.ssd_combined",
                "ops.triton.layernorm_gated",
                "ops.selective_scan_interface",
                "modules.ssd_minimal",
            )
        ]
    update, combined, norm, selective, minimal = modules
    return SimpleNamespace(
        selective_state_update=update.selective_state_update_ref,
        selective_scan=selective.selective_scan_ref,
        chunk_scan=combined.ssd_chunk_scan_combined_ref,
        ssd_minimal=minimal.ssd_minimal_discrete,
        rms_norm=norm.rms_norm_ref,
    )


def _nemotron_h() -> SimpleNamespace:
    with _replaced({"mamba_ssm": None, "causal_conv1d": None}, forget="mamba_ssm"):
        model = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
    return SimpleNamespace(
        Config=model.NemotronHConfig,
        Model=model.NemotronHForCausalLM,
        Mixer=model.NemotronHMamba2Mixer,
        GatedNorm=model.NemotronHRMSNormGated,
        Norm=model.NemotronHRMSNorm,
        Router=model.NemotronHTopkRouter,
        Experts=model.NemotronHExperts,
        MLP=model.NemotronHMLP,
        conv=model.causal_conv1d_fn,
        conv_update=model.causal_conv1d_update,
    )


mamba_ssm, nemotron_h = _mamba_ssm(), _nemotron_h()

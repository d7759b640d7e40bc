"""Every Triton kernel, in every configuration that is shipped, compiles for every GPU, without spills."""

import json
import os
import subprocess
import sys

from tests.gpu.build_kernels import ARCHITECTURES, SHARED_LIMIT, modules
from tests.paths import ROOT
from twotower_kernels.ops import _library

TABLE = ROOT / "build" / "kernels.json"


def test_every_kernel_builds_everywhere_without_spills() -> None:
    """In a process of its own: here Triton interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-m", "tests.gpu.build_kernels", str(TABLE)], cwd=ROOT, env=environment, check=True)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    kernels = {row["kernel"] for row in table}
    assert kernels and all(name.endswith("_kernel") for name in kernels)
    for arch in ARCHITECTURES:
        built = [row for row in table if row["arch"] == f"sm_{arch}"]
        assert {row["kernel"] for row in built} == kernels
        for row in built:
            assert row["spills"] == 0, row
            assert row["registers"] <= 255, row
            assert row["shared"] <= SHARED_LIMIT[arch], row
            assert not row["missing"], row


def test_every_file_of_kernels_is_built() -> None:
    modules_of_kernels = {target.split(":")[0] for target in _library.CUDA.values()}
    files = {name.removeprefix("triton.") for name in modules_of_kernels if name.startswith("triton.")}
    folder = ROOT / "twotower_kernels" / "triton"
    assert {stem for stem in files if "@triton.jit" in (folder / f"{stem}.py").read_text()} == set(modules())


def test_what_launchers_ask_for_compiles() -> None:
    """With the constants and alignments that Triton sees in the arguments."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.launch_kernels"]
    launched = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    expected = {"adaln_norm_kernel", "up_kernel", "down_kernel", "combine_kernel", "gated_rms_norm_kernel"}
    expected |= {f"mamba2_{name}_kernel" for name in ("convolve", "states", "scan")}
    assert expected <= set(launched.split())

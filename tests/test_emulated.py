"""The paths of AVX512-BF16 on a processor without it: `make emulate` for the kernels that have one."""

import os
import subprocess
import sys

from tests.paths import ROOT

BUILD = ROOT / "build" / "emulate"
KERNELS = ("attention", "moe_experts", "linear")


def test_the_paths_of_avx512_bf16_are_right() -> None:
    environment = os.environ | {"TT_EMULATE": "1", "CXXFLAGS": "-march=native -Wno-psabi"}
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    subprocess.run([sys.executable, *build], cwd=ROOT, env=environment, check=True)
    (library,) = BUILD.glob("lib/twotower_kernels/_C*.so")
    tests = [f"tests/test_{name}_kernel.py" for name in KERNELS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tests],
        cwd=ROOT,
        env=environment | {"KERNEL_LIBRARY": str(library), "CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]

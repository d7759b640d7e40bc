"""CUDA C++ kernels compile with versions of NVRTC that others have: here the hardest builds with the oldest one, with
`make kernels` all builds with all."""

from pathlib import Path

import pytest

from tests.gpu import nvrtc
from twotower_kernels.cuda import build as cuda


@pytest.fixture(scope="module")
def compilers() -> list[nvrtc.Nvrtc]:
    return list(nvrtc.installed())


def test_the_oldest_versions_are_there(compilers: list[nvrtc.Nvrtc]) -> None:
    """12.9, 13.0: what PyTorch 2.8 to 2.11 brings for CUDA 12 and 13."""
    assert [compiler.version for compiler in compilers] == ["12.9", "13.0"]


@pytest.mark.thorough  # as make kernels does, every build with every version
def test_every_source_compiles_for_every_gpu(compilers: list[nvrtc.Nvrtc]) -> None:
    builds = nvrtc.builds(only_hardest=True)
    assert {source for source, _ in builds} == {path.stem for path in cuda.folder().glob("*.cu")}
    assert nvrtc.refused(compilers[0], builds) == []


def test_what_older_versions_refuse_is_noticed(
    compilers: list[nvrtc.Nvrtc], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And named: source, GPU, version, and what the compiler says."""
    (tmp_path / "nested.cu").write_text(
        """template <class F> __device__ auto call(F f) { return f(1); }
        extern "C" __global__ void nested_kernel(int* out) {
            *out = call([&](auto a) { return call([&](auto b) { return a + b; }); });
        }"""
    )
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path)
    for compiler in compilers:
        (said,) = nvrtc.refused(compiler, [("nested", ())], [90])
        assert said.startswith(f"nested.cu {{}} for sm_90a with NVRTC {compiler.version}: nested.cu(3): error")


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nvidia-cuda-nvrtc-cu12==12\.9.*make kernels"):
        next(nvrtc.installed())

"""The executor of CUDA C++ on a host catches what it is there for: small kernels, and faults put into the real ones."""

import ctypes
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.kernels.kernel_checks import laid_over
from tests.kernels.remask_cases import assert_step_agrees
from tests.paths import ROOT
from tests.simt import executor
from tests.simt.executor import SimtError, launch
from tests.simt.overlay import simulated
from twotower_kernels.cuda import moe as cuda_moe
from twotower_kernels.cuda import remask as cuda_remask
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import moe
from twotower_kernels.reference.remask import make_inputs

# Reverses each block's part of an array through shared memory.
REVERSE = """
#include "warp.h"
extern "C" __global__ void reverse_kernel(const double* in, double* out, int64 n) {
    SHARED_MEMORY(shared);
    double* held = reinterpret_cast<double*>(shared);
    const int64 first = int64(blockIdx.x) * blockDim.x;
    held[threadIdx.x] = in[first + threadIdx.x];
    __syncthreads();
    out[first + threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
"""
# The same within a warp.
WARP = """
#include "warp.h"
extern "C" __global__ void warp_kernel(const double* in, double* out, int64 n) {
    SHARED_MEMORY(shared);
    double* held = reinterpret_cast<double*>(shared);
    held[lane_id()] = in[lane_id()];
    __syncwarp();
    out[lane_id()] = warp_sum(held[31 - lane_id()]);
}
"""


def run(text: str, *, build: str = "plain", block: int = 64, grid: int = 3, seed: int = 0) -> np.ndarray:
    (name,) = re.findall(r"\w+_kernel", text)
    array = np.arange(float(grid * block))
    out = np.empty_like(array)
    launch(text, name, {}, grid, block, 8 * block, (array, out, len(array)), build=build, seed=seed)
    return out


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("build", ["plain", "race"])
def test_sound_kernels_run(build: str) -> None:
    for seed in range(3):
        expected = np.arange(192.0).reshape(3, 64)[:, ::-1].ravel()
        np.testing.assert_array_equal(run(REVERSE, build=build, seed=seed), expected)
        np.testing.assert_array_equal(run(WARP, build=build, block=32, grid=1, seed=seed), np.full(32, 496.0))


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "removed block barrier": (
        lambda: run(changed(REVERSE, "__syncthreads();", ""), build="race"),
        "race: .* byte",
    ),
    "removed warp barrier": (
        lambda: run(changed(WARP, "__syncwarp();", ""), build="race", block=32, grid=1),
        "race: .* byte",
    ),
    "write behind the end": (
        lambda: run(changed(REVERSE, "out[first + threadIdx.x]", "out[first + threadIdx.x + 1]")),
        "wrote outside array 1",
    ),
    "write before the start": (
        lambda: run(changed(REVERSE, "out[first + threadIdx.x]", "out[first + threadIdx.x - 1ll]")),
        "wrote outside array 1",
    ),
    "divergent shuffle": (
        lambda: run(changed(WARP, "out[lane_id()] =", "if (lane_id() < 31) out[lane_id()] ="), block=32, grid=1),
        "waits at line .* for its warp, part of which never comes",
    ),
    "divergent barrier": (
        lambda: run(changed(REVERSE, "__syncthreads();", "if (threadIdx.x < 32) __syncthreads();")),
        "waits at line .* for its block, part of which never comes",
    ),
    "different barriers": (
        lambda: run(
            changed(REVERSE, "__syncthreads();", "if (threadIdx.x < 32) __syncthreads();\nelse\n__syncthreads();")
        ),
        "thread 0 waits at line .*, thread 32 at line",
    ),
    "partial mask": (
        lambda: run(changed(WARP, "warp_sum(held", "__shfl_xor_sync(1u, held").replace("()]);", "()], 1);")),
        "mask",
    ),
    "wrong number of arguments": (
        lambda: launch(REVERSE, "reverse_kernel", {}, 1, 32, 256, (1,)),
        "takes 3 arguments, got 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    call, message = FAULTS[fault]
    with pytest.raises(SimtError, match=message):
        call()


def test_shared_memory_starts_as_nan() -> None:
    """So what a kernel forgot to write cannot look right."""
    assert np.isnan(run(changed(REVERSE, "held[threadIdx.x] = in[first + threadIdx.x];", ""))).all()


# --- faults in the shipped sources ------------------------------------------------------------------------------------


def exercise_moe() -> None:
    """Every path of the router's kernels, some warps with two tokens. The gate's numbers are whole, its sums exact."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-9, 10, (rows, 300), generator=generator).float() for rows in (5, 6))
    logits = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for groups, scale in ((1, None), (3, logits[0])):
        arguments = logits, None, scale, 4, False, groups, min(groups, 2), True, 1.0, groups > 1
        _, experts, *plan = cuda_moe.moe_route_plan(*arguments)
        for got, expected in zip(plan, moe.moe_plan(experts, 24), strict=True):
            assert torch.equal(got, expected)
    cuda_moe.moe_plan(torch.full((600, 2), 35), 40)  # two rounds of every warp
    for switches in ({}, dict(MANY_LOGITS=1, PLANNED_PAIRS=50)):  # three blocks plan
        with patch.dict(vars(cuda_moe), switches):
            assert torch.equal(cuda_moe.moe_gate(x.half(), weight), moe.moe_gate(x, weight)), "logits"
            for got, expected in zip(cuda_moe.moe_plan(experts, 24), moe.moe_plan(experts, 24), strict=True):
                assert torch.equal(got, expected), "plan"


def exercise_remask() -> None:
    """Every path of a step's kernels: two pieces and a filter's two sections; penalties, a gate that few pass; the
    posterior's mask in a nucleus."""
    policy = RemaskPolicy(gate="threshold", gate_bound=0.5, run_threshold=0.3, position_penalty=0.01, min_commits=2)
    lists = dict(suppress_ids=[9, 8600], confidence_suppress_ids=[7])
    sizes = dict(batch=1, block=5, vocab=8700, num_steps=9, temperature=1.0, top_k=90, top_p=0.9, policy=policy)
    with laid_over({"remask": cuda_remask.remask}):
        drawn = dict(policy=replace(policy, rank_temperature=0.5))
        for changes in ({}, lists, drawn, dict(top_k=0, policy=RemaskPolicy.posterior())):
            assert_step_agrees(make_inputs("remask", sizes | changes))


EXERCISES = {"moe": exercise_moe, "remask": exercise_remask}  # by the first part of the sources' names
BARRIERS = [
    (path.name, match.start())
    for path in sorted(executor.SOURCES.iterdir())
    for match in re.finditer(r"__sync(threads|warp)\(\);", path.read_text("utf-8"))
]


def sources_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, change: Callable[[str], str]) -> None:
    """The executor finds sources in which one is changed."""
    folder = tmp_path / "cuda"
    shutil.copytree(executor.SOURCES, folder)
    shutil.copytree(executor.SOURCES.parent / "common", tmp_path / "common")
    (folder / source).write_text(change((folder / source).read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(executor, "SOURCES", folder)


@pytest.mark.parametrize(("source", "at"), BARRIERS)
def test_every_barrier_is_needed(source: str, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources_with(monkeypatch, tmp_path, source, lambda text: text[:at] + ";" + text[text.index(";", at) + 1 :])
    with simulated(build="race"), pytest.raises(SimtError, match=r"race: |a write outside"):
        EXERCISES[re.split("[_.]", source)[0]]()


@pytest.mark.parametrize(
    ("source", "old", "new", "message"),
    [
        (
            "moe_route.cu",
            "sorted_token_ids[starts[expert] +",
            "sorted_token_ids[1 + starts[expert] +",
            "wrote outside array 5",
        ),
        ("moe_gate.cu", "return warp_sum_of(half);", "return upper ? 0 : warp_sum_of(half);", "waits"),
        ("moe_gate.cu", "i < h ? x.start", "i <= h ? x.start", "logits"),  # behind the last row is NaN
        (
            "moe_route.cu",
            "const Key next = warp_max(first);",
            "const Key next = lane < 9 ? warp_max(first) : 0;",
            "waits",
        ),
        ("moe_gate_tiled.cu", "first + lane_id() < h", "first + lane_id() <= h", "logits"),
        ("moe_plan.cu", "if (i < mine)", "if (i <= mine)", "plan"),
        ("moe_plan.cu", "const unsigned same =", "if (pair >= stretch.last) continue;\nconst unsigned same =", "waits"),
        ("remask_scan.cu", "    tops = warp_sum(tops);\n", "    if (tops) tops = warp_sum(tops);\n", "waits"),
        ("remask_scan.cu", "% unsigned(pieces)) * per_thread", "% unsigned(pieces)) * (per_thread - 1)", "confidence"),
        ("remask_scan.cu", "(i + j) < size", "(i + j) <= size", "candidate"),  # a guard is NaN
        ("remask_merge.h", "if (partial.tops == 0) return;", "if (lane_id() == 1) return;", "confidence"),
        ("remask_filter.cu", "if (shift < 32 && key >> shift != prefix) return;", "", "tokens"),
    ],
)
def test_faults_in_the_sources_are_caught(source, old, new, message, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    sources_with(monkeypatch, tmp_path, source, lambda text: changed(text, old, new))
    with simulated(), pytest.raises((SimtError, AssertionError), match=message):
        EXERCISES[source.split("_")[0]]()


# --- under AddressSanitizer -------------------------------------------------------------------------------------------


def sanitized(code: str) -> subprocess.CompletedProcess:
    environment = executor.sanitized_environment()
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_the_sources_are_clean_under_address_sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launched again by a process without PyTorch, which takes long to load there."""
    launches = []

    def without_torch(value: Any) -> Any:
        if isinstance(value, ctypes.Structure):
            struct = executor.Struct.of(value)
            return executor.Struct(struct.content, {at: without_torch(array) for at, array in struct.arrays.items()})
        return value.numpy() if isinstance(value, torch.Tensor) else value

    def recorded(*arguments: Any, **options: Any) -> None:
        *how, values = arguments
        launches.append((*how, [without_torch(value) for value in values]))
        launch(*arguments, **options)

    monkeypatch.setattr(executor, "launch", recorded)
    with simulated():
        for exercise in EXERCISES.values():
            exercise()
    (tmp_path / "launches").write_bytes(pickle.dumps(launches))
    done = sanitized(
        "import pickle\n"
        "from tests.simt.executor import launch\n"
        f"launches = pickle.load(open({str(tmp_path / 'launches')!r}, 'rb'))\n"
        "for arguments in launches: launch(*arguments, build='address')\n"
        "print(len(launches))"
    )
    assert done.returncode == 0 and done.stdout == f"{len(launches)}\n", done.stderr


@pytest.mark.parametrize("read", ["held[blockDim.x - threadIdx.x]", "in[first + threadIdx.x + blockDim.x]"])
def test_address_sanitizer_sees_reads_outside(read: str) -> None:
    """One word behind shared memory; behind an array."""
    text = changed(REVERSE, "held[blockDim.x - 1 - threadIdx.x]", read)
    done = sanitized(
        "import numpy as np\n"
        "from tests.simt.executor import launch\n"
        f"launch({text!r}, 'reverse_kernel', {{}}, 1, 32, 256, (np.zeros(32), np.zeros(32), 32), build='address')\n"
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr

"""Does anything run here at all? `python -m bench.gpu_smoke`, the first thing to try on a GPU; less than a minute.

Says what is installed, compiles every CUDA C++ kernel in processes side by side, and calls each operation once at the
released model's sizes in bfloat16, beside the specification in float32 on the same GPU. Every call stands for itself: a
kernel that fails takes nothing with it but its own line: if it takes the GPU from this process, another one goes on
behind it. How exact results are is checked by `bench.checks`; here an error of a twentieth of the result's norm is
a mistake, and less is rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.measure.device import lost
from twotower_kernels.bench.report.saved import write_json
from twotower_kernels.cuda import build as cuda

FAMILIES = ("adaln", "attention", "mamba2", "moe", "remask")
LAUNCHERS = ("cuda.moe", "cuda.remask")
TOLERANCE = 0.05  # of the norm; bfloat16 rounds to 0.004
PACKAGES = ("torch", "triton", "numpy", "cuda-core", "cuda-bindings", "transformers")


def versions() -> Iterator[str]:
    """What is installed, and the card."""
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    yield f"NVRTC {cuda.compiler()}"
    yield f"{torch.cuda.get_device_name()}, {cuda.architecture(0)}, CUDA {torch.version.cuda}"


def builds() -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of every CUDA C++ kernel."""
    modules = (importlib.import_module(f"twotower_kernels.{name}") for name in LAUNCHERS)
    return [build for module in modules for build in module.builds()]


def compiled(build: tuple[str, tuple[tuple[str, str], ...]], arch: str) -> str | None:
    """What the compiler says against a build, which is kept on the disk; None if nothing."""
    try:
        cuda.cubin(*build, arch)
    except Exception as error:
        return f"{build[0]} {dict(build[1])}: {type(error).__name__}: {error}"
    return None


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(op: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    result = op(**given)
    if result is None:
        return given["k_context"], given["v_context"]
    return result if isinstance(result, tuple) else (result,)


def difference(got: Tensor, expected: Tensor) -> float:
    """Of numbers: the norm of the difference over that of what is expected, where both are finite, which they must be
    at the same places. Of others: the share that differs."""
    if not got.is_floating_point():
        return float((got != expected).float().mean()) if got.numel() else 0.0
    if not got.isfinite().equal(expected.isfinite()):
        return float("inf")
    got, expected = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (got, expected))
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def call(family: str, op: str, case: str, device: str) -> float:
    """The largest difference of an operation's results."""
    reference = importlib.import_module(f"twotower_kernels.reference.{family}")
    inputs = reference.make_inputs(op, case, dtype=torch.bfloat16, device=device)
    ours = inputs
    if "policy" in inputs:
        ours = inputs | {"policy": tt.RemaskPolicy(**dataclasses.asdict(inputs["policy"]))}
    got = _results(getattr(tt, op), ours)
    in_float32 = {name: _in_float32(value) for name, value in inputs.items()}
    expected = _results(getattr(reference, op), in_float32)
    return max(difference(g, e.to(g.dtype)) for g, e in zip(got, expected, strict=True))


def cases() -> Iterator[tuple[str, str, str]]:
    """Family, operation and case of everything at the released sizes."""
    for family in FAMILIES:
        reference = importlib.import_module(f"twotower_kernels.reference.{family}")
        for op, named in reference.CASES.items():
            yield from ((family, op, case) for case in named if case.startswith("released"))


def check_device() -> None:
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none")


def main(arguments: list[str] | None = None) -> int:
    """Returns how many things failed, 125 at most."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description="Does anything run on this GPU?")
    parser.add_argument("--only", action="append", default=[], help="operations of this name; may be given again")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out what comes before, builds too")
    parser.add_argument("--failed", type=int, default=0, metavar="N", help="things that failed before")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/smoke.json, anew after every call")
    options = parser.parse_args(arguments)
    failed, path = options.failed, options.save and options.save / "smoke.json"
    found: dict[str, Any] = {"builds": 0, "build seconds": 0.0, "failed builds": [], "calls": []}
    if path and options.first and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))  # of the process before this one
    if options.first == 0:
        # Forked before this process has anything to do with the GPU, which a child of it could not use.
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            pool.submit(int).result()
            check_device()
            for line in versions():
                print(line, flush=True)
            start, wanted = time.perf_counter(), [] if options.only else builds()
            for said in pool.map(compiled, wanted, [cuda.architecture(0)] * len(wanted)):
                if said is not None:
                    failed += 1
                    found["failed builds"].append(said)
                    print(f"FAILED {said}", flush=True)
        found |= {"builds": len(wanted), "build seconds": time.perf_counter() - start}
        print(f"{len(wanted)} CUDA C++ builds in {time.perf_counter() - start:.1f} s", flush=True)
    check_device()
    for number, (family, op, case) in enumerate(cases()):
        if number < options.first or (options.only and op not in options.only):
            continue
        print(f"{op}, {case}: ", end="", flush=True)  # named before it can hang
        entry: dict[str, Any] = {"op": op, "case": case}
        found["calls"].append(entry)
        if path:
            write_json(path, found)
        start = time.perf_counter()
        try:
            off = call(family, op, case, "cuda")
            torch.cuda.synchronize()
        except Exception as error:
            failed += 1
            entry["failed"] = f"{type(error).__name__}: {error}"
            print(f"FAILED, {entry['failed']}", flush=True)
            if path:
                write_json(path, found)
            if lost():
                print("the GPU is lost to this process; another one goes on", flush=True)
                only = [word for op in options.only for word in ("--only", op)]
                only += ["--save", str(options.save)] if path else []
                again = ["-m", "twotower_kernels.bench.gpu_smoke", "--first", str(number + 1), "--failed", str(failed)]
                os.execv(sys.executable, [sys.executable, *again, *only])
            continue
        failed += off > TOLERANCE
        word = "WRONG, " if off > TOLERANCE else ""
        entry |= {"off": off, "wrong": off > TOLERANCE, "first call seconds": time.perf_counter() - start}
        print(f"{word}off by {off:.2g}, first call {entry['first call seconds']:.1f} s", flush=True)
    if path:
        write_json(path, found)
    return min(failed, 125)


if __name__ == "__main__":
    raise SystemExit(main())

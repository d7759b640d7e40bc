"""What a GPU must show: `python -m tests.gpu_checks`. (`--interpret`: the same on a CPU, in Triton's interpreter.)

Every operation that has a GPU kernel, on every case of its specification, in every dtype: within the error budget
against float64, bit for bit the same twice, and on the device bit for bit the same when replayed from a CUDA graph.
Needs neither pytest nor hypothesis.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("adaln", "attention", "mamba2", "moe", "remask")


def on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def outputs(result: Any) -> tuple[Tensor, ...]:
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(part for part in parts if isinstance(part, Tensor))


def compare(results: tuple[Tensor, ...], reference: Callable[..., Any], inputs: dict[str, Any]) -> None:
    from tests.compare import assert_within_budget
    from tests.kernel_checks import as_tuple, assert_gate_faithful, widened

    if reference.__name__ == "moe_gate":
        return assert_gate_faithful(results[0].cpu(), **inputs)
    exact, naive = as_tuple(reference(**widened(inputs))), as_tuple(reference(**inputs))
    for n, (got, plain, truth) in enumerate(zip(results, naive, exact, strict=True)):
        got = got.cpu()
        if got.is_floating_point():
            assert_within_budget(got, plain, truth.double(), what=f"result {n}")
        else:
            assert torch.equal(got.to(plain.dtype), plain), f"result {n}"


def check(ours: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Any], device: str) -> None:
    """One call of one operation, all that is demanded of it."""
    given = {name: on(device, value) for name, value in inputs.items()}
    first, second = outputs(ours(**given)), outputs(ours(**given))
    compare(first, reference, inputs)
    for n, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.cpu().equal(b.cpu()) or a.isnan().any(), f"result {n} differs from run to run"
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = outputs(ours(**given))
        graph.replay()
        torch.cuda.synchronize()
        for n, (a, b) in enumerate(zip(first, replayed, strict=True)):
            assert a.equal(b) or a.isnan().any(), f"result {n} of a replayed graph differs"


def package_op(name: str) -> Callable[..., Any]:
    """The package's op, which also takes the specification's policy."""
    import twotower_kernels as tt

    op = getattr(tt, name)

    def with_policy(**inputs: Any) -> Any:
        if "policy" in inputs:
            inputs["policy"] = tt.RemaskPolicy(**dataclasses.asdict(inputs["policy"]))
        return op(**inputs)

    return with_policy


def calls(interpreted: bool) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    """(label, op, reference, make_inputs of a dtype) of every case of every op that runs on GPUs."""
    from twotower_kernels.ops import _library

    through = {"rms_norm": "adaln_norm"}
    for family in FAMILIES:
        module = importlib.import_module(f"reference.{family}")
        for op, cases in module.CASES.items():
            target = _library.CUDA.get(through.get(op, op))
            if target is None or (interpreted and not target.startswith("triton.")):
                continue
            wanted: list[dict[str, Any]] = [{}]
            wanted += [dict(return_states=True), dict(states_every=5)] if op == "mamba2_scan" else []
            for case, options in itertools.product(cases, wanted):

                def make(
                    dtype: torch.dtype, module: Any = module, op: str = op, case: str = case, options: Any = options
                ) -> Any:
                    return module.make_inputs(op, case, dtype=dtype) | options

                label = ", ".join([case, *(f"{name}={value}" for name, value in options.items())])
                yield f"{op}[{label}]", package_op(op), getattr(module, op), make


def check_draws(device: str) -> None:
    """Sampled tokens follow the tempered softmax (Pearson's statistic, within 5 standard deviations), and are those
    that the CPU draws."""
    import twotower_kernels as tt

    rows, block, vocabulary, t = 4096, 8, 33, 0.7
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(mask_token_id=vocabulary - 1, temperature=t, policy=tt.RemaskPolicy.twotower())
    tokens = torch.full((rows, block), vocabulary - 1)
    found = [
        tt.remask(
            logits.to(where).expand(rows, block, vocabulary),
            tokens.to(where),
            seed=torch.arange(rows).to(where),
            **options,
        ).candidate.cpu()
        for where in (device, "cpu")
    ]
    assert found[0].equal(found[1]), f"{int((found[0] != found[1]).sum())} other candidates than the CPU's"
    expected = (logits[:-1].double() / t).softmax(0) * rows * block
    counts = found[0].flatten().bincount(minlength=vocabulary).double()
    assert counts[-1] == 0, "the mask was drawn"
    free = len(expected) - 1
    off = (((counts[:-1] - expected) ** 2 / expected).sum().item() - free) / (2 * free) ** 0.5
    assert abs(off) < 5, f"off the softmax by {off:.1f} standard deviations"


def router_calls() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    """The same of the model's router: product, choice and plan together."""
    from reference import moe
    from tests.kernel_checks import router_inputs
    from twotower_kernels.ops.moe import moe_router

    def ours(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts, plan = moe_router(x, gate_weight, **options)
        return weights, experts, *plan

    def reference(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts = moe.moe_route(moe.moe_gate(x, gate_weight), **options)
        return weights, experts, *moe.moe_plan(experts, len(gate_weight))

    for case in moe.CASES["moe_route"]:

        def make(dtype: torch.dtype, case: str = case) -> Any:
            return router_inputs(case, dtype)

        yield f"moe_router[{case}]", ours, reference, make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_checks", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter, on the CPU")
    parser.add_argument("--only", action="append", default=[], help="cases whose label holds this; may be given again")
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none (--interpret runs the same checks without)")
    from tests.triton_checks import triton_kernels

    device, passed, failed, start = "cpu" if options.interpret else "cuda", 0, [], time.perf_counter()
    with triton_kernels() if options.interpret else nullcontext():
        router = () if options.interpret else router_calls()
        for label, ours, reference, make in itertools.chain(calls(options.interpret), router):
            if options.only and not any(part in label for part in options.only):
                continue
            for dtype in DTYPES:
                try:
                    check(ours, reference, make(dtype), device)
                    passed += 1
                except NotImplementedError as error:
                    print(f"refused {label} {dtype}: {error}")
                except Exception as error:
                    failed.append(f"{label} {dtype}")
                    print(f"FAILED {failed[-1]}: {type(error).__name__}: {error}")
                    if not isinstance(error, AssertionError):
                        traceback.print_exc(limit=-3)
    if device == "cuda" and not options.only:
        try:
            check_draws(device)
            passed += 1
        except AssertionError as error:
            failed.append("draws")
            print(f"FAILED draws: {error}")
    print(f"{passed} passed, {len(failed)} failed in {time.perf_counter() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

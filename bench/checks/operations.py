"""Every operation on every case of its specification: what is demanded of its results.

In every dtype: within the error budget against float64, bit for bit the same twice, and on a GPU bit for bit the same
when replayed from a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.model.capture import cuda_graph
from twotower_kernels.ops import _library
from twotower_kernels.ops.moe import moe_router
from twotower_kernels.reference import moe
from twotower_kernels.reference.remask import RemaskResult
from twotower_kernels.testing.budget import assert_gate_faithful, assert_within_budget, widened
from twotower_kernels.testing.layouts import same_bits
from twotower_kernels.testing.properties import results_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("adaln", "attention", "linear", "mamba2", "moe", "remask")
RELEASED = "released"  # in the names of cases at the released model's sizes
WRITTEN = ("k_context", "v_context")  # arguments of operations that return nothing
CANDIDATE = RemaskResult._fields.index("candidate")
THROUGH = {"rms_norm": "adaln_norm"}  # operations whose kernel is another's
# Released sizes whose truths in float64 take up to 16 GB, and minutes of a processor.
LARGE = ("released_128k", "released_4k_batch_64", "released_prefill", "released_b64", "moe_experts[released]")

Operation = Callable[..., Any]
Task = tuple[str, Callable[[], None]]  # what is checked, and the check, which raises AssertionError


def outputs(op: Operation, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What an operation returns, or what it writes: then each call begins with the same."""
    return results_of(op, inputs, [name for name in WRITTEN if name in inputs])


def compare(results: tuple[Tensor, ...], reference: Operation, inputs: dict[str, Any]) -> None:
    if reference.__name__ == "moe_gate":
        return assert_gate_faithful(results[0].cpu(), **{name: tensor.cpu() for name, tensor in inputs.items()})
    exact: Any = outputs(reference, widened(inputs))
    naive: Any = outputs(reference, inputs)
    # In rounded logits another token may be the best: its probabilities are then compared with no truth.
    same = reference.__name__ != "remask" or exact[CANDIDATE].equal(naive[CANDIDATE])
    for n, (got, plain, truth) in enumerate(zip(results, naive, exact, strict=True)):
        assert got.shape == plain.shape, f"result {n}: {list(got.shape)}, expected {list(plain.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got.to(plain.dtype), plain), f"result {n}"
        elif same:
            assert_within_budget(got, plain, truth.double(), what=f"result {n}")


def check(ours: Operation, reference: Operation, inputs: dict[str, Any], device: str, graphs: bool = True) -> None:
    """One call of one operation, all that is demanded of it. The specification runs where the inputs are. Without
    PyTorch's cache of memory no graph can be recorded: `graphs=False`."""
    first = outputs(ours, inputs)
    again = {"from run to run": outputs(ours, inputs)}
    if device == "cuda" and graphs:
        replay, again["when a graph is replayed"] = cuda_graph(lambda: outputs(ours, inputs), torch.device(device))
        replay()
        torch.cuda.synchronize()
    for when, results in again.items():
        for n, (a, b) in enumerate(zip(first, results, strict=True)):
            assert same_bits(a, b), f"result {n} differs {when}"
    compare(first, reference, inputs)


def package_op(name: str) -> Operation:
    """The package's op, which also takes the specification's policy."""
    op = getattr(tt, name)

    def with_policy(**inputs: Any) -> Any:
        if "policy" in inputs:
            inputs["policy"] = tt.RemaskPolicy(**dataclasses.asdict(inputs["policy"]))
        return op(**inputs)

    return with_policy


def check_case(
    family: str, op: str, case: str, options: dict[str, Any], dtype: torch.dtype, device: str, graphs: bool = True
) -> None:
    module = importlib.import_module(f"twotower_kernels.reference.{family}")
    inputs = module.make_inputs(op, case, dtype=dtype, device=device) | options
    check(package_op(op), getattr(module, op), inputs, device, graphs)


def too_large() -> None:
    raise NotImplementedError("a GPU's to check: its truth in float64 takes minutes of a processor, and gigabytes")


def has_kernel(op: str, device: str, interpreted: bool) -> bool:
    """Whether a device has a kernel of an operation; in Triton's interpreter, one that Triton compiles."""
    if device == "cpu" and not interpreted:
        return True
    target = _library.CUDA.get(THROUGH.get(op, op))
    return target is not None and (not interpreted or target.startswith("triton."))


def of_operations(device: str, *, graphs: bool = True, interpreted: bool = False) -> Iterator[Task]:
    """Every case of every operation that has a kernel there. The largest are refused on a CPU; in the interpreter all
    released sizes would take hours."""
    for family in FAMILIES:
        module = importlib.import_module(f"twotower_kernels.reference.{family}")
        for op, cases in module.CASES.items():
            if not has_kernel(op, device, interpreted):
                continue
            wanted: list[dict[str, Any]] = [{}]
            wanted += [dict(return_states=True), dict(states_every=5)] if op == "mamba2_scan" else []
            for case, options, dtype in itertools.product(cases, wanted, DTYPES):
                if interpreted and RELEASED in case:
                    continue
                label = ", ".join([case, *(f"{name}={value}" for name, value in options.items())])
                label = f"{op}[{label}] {dtype}"
                if device == "cpu" and any(part in label for part in LARGE):
                    yield label, too_large
                else:
                    yield label, partial(check_case, family, op, case, options, dtype, device, graphs)


def check_draws(device: str) -> None:
    """Sampled tokens follow the tempered softmax (Pearson's statistic, within 5 standard deviations), and are those
    that the CPU draws."""
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


def router_inputs(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `moe_router` for a case of `moe_route`: logits of about 1, x of this dtype."""
    inputs = moe.make_inputs("moe_route", case)
    n, e = inputs.pop("logits").shape
    product = moe.make_inputs("moe_gate", dict(n=n, e=e, h=100), dtype=dtype)
    return dict(x=product["x"], gate_weight=product["gate_weight"] / 10, **inputs)


def check_router(case: str, dtype: torch.dtype, device: str, graphs: bool = True) -> None:
    """The same of the model's router: product, choice and plan together."""

    def ours(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts, plan = moe_router(x, gate_weight, **options)
        return weights, experts, *plan

    def reference(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts = moe.moe_route(moe.moe_gate(x, gate_weight), **options)
        return weights, experts, *moe.moe_plan(experts, len(gate_weight))

    inputs = router_inputs(case, dtype)
    check(ours, reference, {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}, device, graphs)


def of_the_router(device: str, *, graphs: bool = True) -> Iterator[Task]:
    for case, dtype in itertools.product(moe.CASES["moe_route"], DTYPES):
        yield f"moe_router[{case}] {dtype}", partial(check_router, case, dtype, device, graphs)

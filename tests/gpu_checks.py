"""What a GPU must show: `python -m tests.gpu_checks`. (`--interpret`: the same on a CPU, in Triton's interpreter.)

Every operation that has a GPU kernel, on every case of its specification, in every dtype: within the error budget
against float64, bit for bit the same twice, and on the device bit for bit the same when replayed from a CUDA graph. The
model too: recorded tensors and texts, and a text through recorded graphs. Needs neither pytest nor hypothesis.

With `--jobs`, processes share the checks. One that hangs, crashes, or takes the GPU from its process costs its own
result alone: another process goes on behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.model.capture import cuda_graph

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("adaln", "attention", "mamba2", "moe", "remask")
RELEASED = "released"  # in the names of cases at the released model's sizes
THROUGH_GRAPHS = "through graphs"
EAGER = False  # nothing is recorded
HANGS = 80.0  # seconds without a word, after which a process is ended
INTERRUPTED = 130


Operation = Callable[..., Any]
Task = tuple[str, Callable[[], None]]  # what is checked, and the check, which raises AssertionError


def outputs(op: Operation, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What an operation returns, or what it writes: then each call begins with the same."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    result = op(**given)
    if result is None:
        return given["k_context"], given["v_context"]
    return result if isinstance(result, tuple) else (result,)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def compare(results: tuple[Tensor, ...], reference: Operation, inputs: dict[str, Any]) -> None:
    from tests.kernels.kernel_checks import assert_gate_faithful
    from twotower_kernels.testing.budget import assert_within_budget, widened

    if reference.__name__ == "moe_gate":
        return assert_gate_faithful(results[0].cpu(), **{name: tensor.cpu() for name, tensor in inputs.items()})
    exact: Any = outputs(reference, widened(inputs))
    naive: Any = outputs(reference, inputs)
    # In rounded logits another token may be the best: its probabilities are then compared with no truth.
    same = reference.__name__ != "remask" or exact.candidate.equal(naive.candidate)
    for n, (got, plain, truth) in enumerate(zip(results, naive, exact, strict=True)):
        assert got.shape == plain.shape, f"result {n}: {list(got.shape)}, expected {list(plain.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got.to(plain.dtype), plain), f"result {n}"
        elif same:
            assert_within_budget(got, plain, truth.double(), what=f"result {n}")


def check(ours: Operation, reference: Operation, inputs: dict[str, Any], device: str) -> None:
    """One call of one operation, all that is demanded of it. The specification runs where the inputs are. Without
    PyTorch's cache of memory (`--eager`) no graph can be recorded."""
    first = outputs(ours, inputs)
    again = {"from run to run": outputs(ours, inputs)}
    if device == "cuda" and not EAGER:
        replay, again["when a graph is replayed"] = cuda_graph(lambda: outputs(ours, inputs), torch.device(device))
        replay()
        torch.cuda.synchronize()
    for when, results in again.items():
        for n, (a, b) in enumerate(zip(first, results, strict=True)):
            assert bits(a).equal(bits(b)), f"result {n} differs {when}"
    compare(first, reference, inputs)


def package_op(name: str) -> Operation:
    """The package's op, which also takes the specification's policy."""
    import twotower_kernels as tt

    op = getattr(tt, name)

    def with_policy(**inputs: Any) -> Any:
        if "policy" in inputs:
            inputs["policy"] = tt.RemaskPolicy(**dataclasses.asdict(inputs["policy"]))
        return op(**inputs)

    return with_policy


def check_case(family: str, op: str, case: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    module = importlib.import_module(f"twotower_kernels.reference.{family}")
    check(
        package_op(op), getattr(module, op), module.make_inputs(op, case, dtype=dtype, device=device) | options, device
    )


def of_operations(device: str) -> Iterator[Task]:
    """Every case of every op that runs on GPUs; in the interpreter without CUDA C++, and without the released sizes,
    which would take hours."""
    from twotower_kernels.ops import _library

    interpreted, through = device == "cpu", {"rms_norm": "adaln_norm"}
    for family in FAMILIES:
        module = importlib.import_module(f"twotower_kernels.reference.{family}")
        for op, cases in module.CASES.items():
            target = _library.CUDA.get(through.get(op, op))
            if target is None or (interpreted and not target.startswith("triton.")):
                continue
            wanted: list[dict[str, Any]] = [{}]
            wanted += [dict(return_states=True), dict(states_every=5)] if op == "mamba2_scan" else []
            for case, options, dtype in itertools.product(cases, wanted, DTYPES):
                if interpreted and RELEASED in case:
                    continue

                label = ", ".join([case, *(f"{name}={value}" for name, value in options.items())])
                yield f"{op}[{label}] {dtype}", partial(check_case, family, op, case, options, dtype, device)


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


def check_router(case: str, dtype: torch.dtype, device: str) -> None:
    """The same of the model's router: product, choice and plan together."""
    from tests.kernels.kernel_checks import router_inputs
    from twotower_kernels.ops.moe import moe_router
    from twotower_kernels.reference import moe

    def ours(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts, plan = moe_router(x, gate_weight, **options)
        return weights, experts, *plan

    def reference(x: Tensor, gate_weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weights, experts = moe.moe_route(moe.moe_gate(x, gate_weight), **options)
        return weights, experts, *moe.moe_plan(experts, len(gate_weight))

    inputs = router_inputs(case, dtype)
    check(ours, reference, {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}, device)


def of_the_router(device: str) -> Iterator[Task]:
    from twotower_kernels.reference import moe

    for case, dtype in itertools.product(moe.CASES["moe_route"], DTYPES):
        yield f"moe_router[{case}] {dtype}", partial(check_router, case, dtype, device)


def tasks(device: str) -> Iterator[Task]:
    """Everything that is checked on a device."""
    yield from of_operations(device)
    if device == "cuda":
        from tests.gpu_model_checks import of_the_model

        yield from of_the_router(device)
        yield "draws", lambda: check_draws(device)
        yield from of_the_model(device)


def of_part(number: int, parts: int, labels: Sequence[str]) -> list[str]:
    """The labels that a process takes, those that take longest first. The released sizes are shared by the first few,
    one dtype each: the float64 truths of three of them fit into a large GPU's memory side by side."""
    large = [label for label in labels if RELEASED in label]
    small = [label for label in labels if RELEASED not in label]
    small.sort(key=lambda label: not label.startswith("model"))
    few = len(DTYPES)
    if parts <= few:
        return [*large, *small][number::parts]
    return large[number::few] if number < few else small[number - few :: parts - few]


def run(device: str, only: Sequence[str], number: int, parts: int, first: int = 0, announced: bool = False) -> int:
    """Runs a part of the checks, without those before the first, and prints what fails. Returns 0, or 1 if one did,
    INTERRUPTED, or LOST: then those behind the last one that began need another process.

    announced: says of each check that it begins, and its number in the part.
    """
    from tests.gpu.triton_checks import triton_kernels

    passed, failed, start = 0, 0, time.perf_counter()
    found = dict(tasks(device))
    wanted = [label for label in found if not only or any(part in label for part in only)]
    if EAGER:
        wanted = [label for label in wanted if THROUGH_GRAPHS not in label]
    with triton_kernels() if device == "cpu" else nullcontext():
        for index, label in enumerate(of_part(number, parts, wanted)):
            if index < first:
                continue
            if announced:
                print(f"begins {index} {label}", flush=True)
            try:
                found[label]()
                passed += 1
            except NotImplementedError as error:
                print(f"refused {label}: {error}")
            except Exception as error:
                failed += 1
                print(f"FAILED {label}: {type(error).__name__}: {error}")
                if not isinstance(error, AssertionError):
                    traceback.print_exc(limit=-3)
                if lost(device):
                    return LOST
            except KeyboardInterrupt:
                print(f"interrupted in {label}")
                return INTERRUPTED
    print(f"part {number} of {parts}: {passed} passed, {failed} failed in {time.perf_counter() - start:.0f} s")
    return int(failed > 0)


def ended(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """Runs a process, printing what it says but for what it begins. Its exit code, negative if a signal ended it, and
    what began last: number and label. A process that says nothing for long is ended."""
    began = ""
    child = subprocess.Popen(
        command, env=environment, text=True, bufsize=1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    while True:
        timer = threading.Timer(HANGS, child.kill)
        timer.start()
        line = child.stdout.readline()
        timer.cancel()
        if not line:
            return child.wait(), began
        if line.startswith("begins "):
            began = line.removeprefix("begins ").rstrip()
        else:
            print(line, end="", flush=True)


def part_in_processes(number: int, parts: int, arguments: Sequence[str]) -> int:
    """A part of the checks in a process, and behind one that ends it, in another. Returns how many did not end well."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parts))}
    command = [sys.executable, "-m", "tests.gpu_checks", "--part", str(number), str(parts), *arguments]
    first, failed = 0, 0
    while True:
        code, began = ended([*command, "--first", str(first)], os.environ | threads)
        failed += code != 0
        if code in (0, 1, INTERRUPTED, -signal.SIGINT):
            return failed
        if not began:
            print(f"FAILED part {number} of {parts}: its process ended with {code} before it began", flush=True)
            return failed
        index, label = began.split(" ", 1)
        why = "the GPU is lost to its process" if code == LOST else f"its process ended with {code}"
        print(f"FAILED {label}: {why}, or said nothing for {HANGS:.0f} s; another one goes on", flush=True)
        first = int(index) + 1


def in_processes(jobs: int, arguments: Sequence[str]) -> int:
    """The checks in so many processes: most of their time goes into compiling kernels. Returns how many failed to end
    well."""
    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(lambda number: part_in_processes(number, jobs, arguments), range(jobs)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_checks", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter, on the CPU")
    parser.add_argument("--only", action="append", default=[], help="cases whose label holds this; may be given again")
    parser.add_argument("--eager", action="store_true", help="record no graphs, for runs under a checker of memory")
    parser.add_argument("--jobs", type=int, default=1, help="processes to share the checks (default: 1)")
    parser.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), help="one such process's share")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out those of the share before this")
    options = parser.parse_args()
    global EAGER
    EAGER = options.eager
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none (--interpret runs the same checks without)")
    if options.jobs > 1 and options.part is None:
        given = [f"--{name}" for name in ("interpret", "eager") if getattr(options, name)]
        given += [f"--only={part}" for part in options.only]
        sys.exit(bool(in_processes(options.jobs, given)))
    number, parts = options.part or (0, 1)
    device = "cpu" if options.interpret else "cuda"
    sys.exit(run(device, options.only, number, parts, options.first, announced=options.part is not None))


if __name__ == "__main__":
    main()

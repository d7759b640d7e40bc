"""The short way from a public function to a CPU kernel (`ops/_direct.py`): it changes the price of a call and nothing
else, and gives way to whoever wants to see the call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import twotower_kernels as tt
from tests.kernels.op_arguments import OPS, arguments, overload, written
from twotower_kernels.ops import _direct
from twotower_kernels.ops._traced import call
from twotower_kernels.testing.budget import as_tuple
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward

FAMILIES = ("adaln", "attention", "linear", "mamba2", "moe")
CASES = [
    (family, op, case)
    for family in FAMILIES
    for op, cases in importlib.import_module(f"twotower_kernels.reference.{family}").CASES.items()
    for case in cases
    if "released" not in case
]
ENTRIES = {name for name in dir(_direct.entries()) if not name.startswith("_")} - {"is_direct", "is_open", "set"}


def inputs_of(family: str, op: str, case: str, dtype: torch.dtype) -> dict[str, Any]:
    module = importlib.import_module(f"twotower_kernels.reference.{family}")
    return dict(module.make_inputs(op, case, dtype=dtype, device="cpu"))


def results(returned: Any) -> list[Any]:
    """The tensors that an op returned."""
    return [x for part in as_tuple(() if returned is None else returned) for x in as_tuple(part)]


def outcome(op: str, inputs: dict[str, Any]) -> list[Tensor] | str:
    """What the public function returns, and what its tensors hold then; or what it raises."""
    own = {k: v.clone(memory_format=torch.preserve_format) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    try:
        returned = getattr(tt, op)(**own)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return [*results(returned), *(v for v in own.values() if isinstance(v, Tensor))]


def assert_same(op: str, inputs: dict[str, Any]) -> None:
    directly = outcome(op, inputs)
    with _direct.off():
        expected = outcome(op, inputs)
    if isinstance(expected, str) or isinstance(directly, str):
        by_the_schema = "Expected a value of type" in expected  # the dispatcher speaks
        assert isinstance(directly, str) and (by_the_schema or directly == expected)
        return
    assert len(directly) == len(expected)
    for got, wanted in zip(directly, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert got.shape == wanted.shape and got.stride() == wanted.stride() and got.dtype == wanted.dtype
            assert got.requires_grad == wanted.requires_grad and got.is_inference() == wanted.is_inference()
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_to_the_bit(dtype: torch.dtype, layout: int) -> None:
    for family, op, case in CASES:
        inputs = inputs_of(family, op, case, dtype)
        assert_same(op, {k: awkward(v, layout) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def test_plain_calls_take_it() -> None:
    """Every entry serves at least one case of its op; without that, all of this would say nothing."""
    served = dict.fromkeys([*ENTRIES, "context_attention"], 0)
    for family, op, case in CASES:
        if op in served:
            inputs = inputs_of(family, op, case, torch.float32)
            with mock.patch.object(_direct, "call", wraps=_direct.call) as called:  # what an entry leaves goes there
                getattr(tt, op)(**inputs)
            served[op] += not called.called
            with Seen() as seen:
                getattr(tt, op)(**inputs)
            assert seen.names, (op, case)
    assert all(served.values()), served


class Seen(TorchDispatchMode):
    """The names of our operators that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "twotower":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


ODD = [
    None,
    True,
    0,
    -1,
    3,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "sigmoid",
    "other",
    np.float32(0.25),
    np.int64(2),
    torch.tensor(2),
    torch.tensor(0.5),
    torch.empty(0),
    torch.randn(2, 3),
    torch.randn(1, 2, 3, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.int64),
    torch.ones(2, dtype=torch.int16),
    torch.randn(2, 4, dtype=torch.complex64).imag,
    [1, 2],
]


@st.composite
def changed(draw: Any) -> tuple[str, dict[str, Any]]:
    """A case of an op with one or two arguments replaced: by something odd, another dtype, a slice, another layout."""
    family, op, case = draw(st.sampled_from(CASES))
    inputs = inputs_of(family, op, case, draw(st.sampled_from(DTYPES)))
    for name in draw(st.lists(st.sampled_from(sorted(inputs)), min_size=1, max_size=2)):
        value = inputs[name]
        if not isinstance(value, Tensor) or draw(st.booleans()):
            inputs[name] = draw(st.sampled_from(ODD))
            continue
        way = draw(st.sampled_from(["dtype", "slice", "layout", "expand", "negative", "gradient", "squeeze", "more"]))
        if way == "dtype":
            inputs[name] = value.to(draw(st.sampled_from([*DTYPES, torch.int32, torch.int64])))
        elif way == "slice" and value.ndim:
            dim = draw(st.integers(0, value.ndim - 1))
            inputs[name] = value.narrow(dim, 0, value.shape[dim] // 2)
        elif way == "layout":
            inputs[name] = awkward(value, draw(st.integers(1, 3)))
        elif way == "expand" and value.ndim and value.shape[0]:
            inputs[name] = value[:1].expand(value.shape)
        elif way == "negative":
            inputs[name] = -value if value.dtype != torch.bool else ~value
        elif way == "gradient" and value.is_floating_point():
            inputs[name] = value.detach().requires_grad_()
        elif way == "squeeze" and value.ndim:
            inputs[name] = value[0] if value.shape[0] else value
        else:
            inputs[name] = value[None]
    return op, inputs


@settings(max_examples=400)
@given(change=changed())
def test_right_and_wrong_arguments(change: tuple[str, dict[str, Any]]) -> None:
    """The same result to the bit, or the same error."""
    assert_same(*change)


@settings(max_examples=150)
@given(data=st.data())
def test_what_is_written_and_read_at_once(data: st.DataObject) -> None:
    """append_kv into storage that overlaps itself or what is read, or has no room: the same, or the same error."""
    base = torch.randn(400, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))

    def view(tokens: int) -> dict[str, Any]:
        offset = data.draw(st.integers(0, 60))
        strides = data.draw(st.sampled_from([(tokens * 8, 8, 4, 1), (tokens * 8, 4, tokens * 4, 1), (4, 8, 4, 1)]))
        return dict(size=(2, tokens, 2, 4), stride=strides, storage_offset=offset)

    places = [view(6), view(6), view(2), view(2)]
    if data.draw(st.booleans()):  # apart
        for n, place in enumerate(places):
            place["storage_offset"] += n * 100
    lens = data.draw(st.sampled_from([0, 4, 5, torch.tensor([1, 3]), torch.tensor([4, 5]), torch.tensor([-1, 0])]))
    found = []
    for directly in (True, False):
        storage = base.clone()
        tensors = [storage.as_strided(**place) for place in places]
        version = storage._version
        try:
            if directly:
                tt.append_kv(*tensors, lens)
            else:
                with _direct.off():
                    tt.append_kv(*tensors, lens)
            found.append((storage, storage._version > version))
        except (ValueError, RuntimeError) as error:
            found.append((storage, f"{type(error).__name__}: {error}"))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


# --- who wants to see a call, sees it -------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def is_direct(op: str) -> bool:
    return _direct.serves(op, *arguments(op))


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Seen,
    "function mode": Functions,
    "fake tensors": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "default device": lambda: torch.device("meta"),
    "forward mode": torch.autograd.forward_ad.dual_level,
    "off": _direct.off,
}


@pytest.mark.parametrize("around", AROUND)
def test_modes(around: str) -> None:
    given = {op: arguments(op) for op in OPS}
    assert all(_direct.serves(op, *given[op]) for op in OPS)
    with AROUND[around]():
        assert not any(_direct.serves(op, *given[op]) for op in OPS)
    assert all(is_direct(op) for op in OPS)


def test_transforms() -> None:
    given = {op: arguments(op) for op in OPS}
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.extend(_direct.serves(op, *given[op]) for op in OPS)
        return x * 2

    torch.vmap(ask)(torch.randn(3))
    torch.func.grad(lambda x: ask(x).sum())(torch.randn(3))
    torch.func.jvp(ask, (torch.randn(3),), (torch.randn(3),))
    torch.func.functionalize(ask)(torch.randn(3))
    make_fx(ask)(torch.randn(3))
    assert len(asked) >= 5 * len(OPS) and not any(asked)


class Subclass(torch.Tensor):
    pass


STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "meta": lambda x: x.to("meta"),
    "negative view": torch._neg_view,
    "requires grad": lambda x: x.detach().requires_grad_(),
    "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_of_other_kinds(kind: str) -> None:
    for op in OPS:
        for n, x in enumerate(arguments(op)):
            if isinstance(x, Tensor) and x.is_floating_point():
                given = arguments(op)
                given[n] = STRANGE[kind](x)
                assert not _direct.serves(op, *given), (op, n)


def test_the_profiler_names_the_operators() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tt.linear(x, weight)
        tt.rms_norm(x, weight[0], eps=1e-5)
    names = {event.key for event in profile.key_averages()}
    assert {"twotower::linear", "twotower::rms_norm"} <= names


@pytest.mark.parametrize("op", [op for op in OPS if written(op)])
def test_versions_of_what_is_written(op: str) -> None:
    given = arguments(op)
    before = [given[n]._version for n in written(op)]
    call(op, *given)
    assert [given[n]._version for n in written(op)] == [version + 1 for version in before]


def test_results_are_ordinary_tensors() -> None:
    out = tt.linear(torch.randn(3, 4), torch.randn(5, 4))
    out.resize_(4, 7)
    with torch.inference_mode():
        assert tt.linear(torch.randn(3, 4), torch.randn(5, 4)).is_inference()


def test_older_versions_of_pytorch_go_through_the_dispatcher() -> None:
    """Without the table of functions every call is dispatched, and tensors are asked for their attributes."""
    import subprocess
    import sys

    program = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
        "import twotower_kernels as tt\n"
        "from twotower_kernels.ops import _direct\n"
        "x, w = torch.randn(3, 4), torch.randn(5, 4)\n"
        "assert _direct.entries().linear(x, w, None) is None and not _direct.serves('linear', x, w, None)\n"
        "torch.testing.assert_close(tt.linear(x, w), x @ w.T)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_overload_of_a_call_is_the_operator() -> None:
    """What `call` runs without the dispatcher is what the dispatcher would run."""
    for op in OPS:
        given, other = arguments(op), arguments(op)
        got, expected = call(op, *given), overload(op)(*other)
        for a, b in zip(results(got), results(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

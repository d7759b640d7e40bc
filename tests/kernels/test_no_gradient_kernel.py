"""An op without a gradient raises in the backward, and never in the forward: for every op and argument, through the
dispatcher and the public functions, eager and compiled. What writes in place refuses at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import twotower_kernels as tt
from tests.kernels.op_arguments import OPS, arguments, floating, overload, written
from tests.kernels.test_compile_kernel import INPUTS
from tests.kernels.test_transforms_kernel import DIFFERENTIABLE, PLACES, results

BY_PYTORCH = {"pack_experts"}  # public functions that PyTorch itself differentiates
SMALL = (2, 3)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_leaf(op: str, argument: str) -> tuple[list[Any], Tensor]:
    given = arguments(op)
    leaf = given[floating(op, given)[argument]].requires_grad_()
    return given, leaf


def total(outcome: Any) -> Tensor:
    return sum((x.sum() for x in results(outcome)), torch.zeros(()))


# --- the dispatcher's ops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "argument"), [place for place in PLACES if not written(place[0])])
def test_the_forward_is_the_same(op: str, argument: str) -> None:
    """Its results are, and they say that they came of something that requires grad."""
    given, _ = with_leaf(op, argument)
    got, expected = results(overload(op)(*given)), results(overload(op)(*arguments(op)))
    assert expected and all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert all(x.requires_grad for x in got)
    with torch.no_grad():
        assert not any(x.requires_grad for x in results(overload(op)(*given)))


@pytest.mark.parametrize(("op", "argument"), [place for place in PLACES if not written(place[0])])
def test_the_backward_raises_if_there_is_no_gradient(op: str, argument: str) -> None:
    given, leaf = with_leaf(op, argument)
    loss = total(overload(op)(*given))
    if argument in DIFFERENTIABLE.get(op, ()):
        loss.backward()
        assert leaf.grad is not None
        return
    with pytest.raises(NotImplementedError, match=rf"^twotower::{op} is not differentiable( in {argument})?$"):
        loss.backward()


@pytest.mark.parametrize(("op", "argument"), [place for place in PLACES if written(place[0])])
def test_what_writes_refuses_at_once_and_writes_nothing(op: str, argument: str) -> None:
    given, _ = with_leaf(op, argument)
    before = [given[n].detach().clone() for n in written(op)]
    with pytest.raises(NotImplementedError, match=rf"^twotower::{op} is not differentiable, expected no tensor"):
        overload(op)(*given)
    assert all(torch.equal(given[n], x) for n, x in zip(written(op), before, strict=True))


def test_the_places_are_all_of_them() -> None:
    assert {op for op, _ in PLACES} == {op for op in OPS if floating(op, arguments(op))}


# --- the public functions -------------------------------------------------------------------------------------------


def with_parameters(op: str) -> tuple[dict[str, Any], list[nn.Parameter]]:
    """Arguments of a public function of which all that can are parameters, as a module has them."""
    given = INPUTS[op](*SMALL)
    leaves = {n: nn.Parameter(x) for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return given | leaves, list(leaves.values())


FORWARD = sorted(op for op in INPUTS if op != "append_kv" and with_parameters(op)[1])
GOES_THROUGH = BY_PYTORCH | {"block_causal_attention", "linear", "merge_attention"}


def call(op: str, given: dict[str, Any]) -> Any:
    return getattr(tt, op)(**given)


def backward_of(op: str, outcome: Any, leaves: list[nn.Parameter]) -> None:
    loss = total(tree_leaves(outcome))
    if op in GOES_THROUGH:
        loss.backward()
        assert all(x.grad is not None for x in leaves)
        return
    with pytest.raises(NotImplementedError, match=rf"^twotower::{op}(\.traced)? is not differentiable"):
        loss.backward()


@pytest.mark.parametrize("op", FORWARD)
def test_public_functions_take_parameters(op: str) -> None:
    given, leaves = with_parameters(op)
    expected = tree_leaves(call(op, INPUTS[op](*SMALL)))
    outcome = call(op, given)
    for got, x in zip(tree_leaves(outcome), expected, strict=True):
        assert torch.equal(got.nan_to_num(), x.nan_to_num())
    backward_of(op, outcome, leaves)


@pytest.mark.parametrize("op", FORWARD)
def test_compiled_functions_take_parameters(op: str) -> None:
    """The backward is traced with the forward, and still it is the backward that raises."""
    given, leaves = with_parameters(op)
    outcome = torch.compile(call, backend="aot_eager", fullgraph=True)(op, given)
    backward_of(op, outcome, leaves)


def test_a_frozen_part_costs_no_gradient_of_the_rest() -> None:
    """A differentiable layer behind one without a gradient is trained; the error comes with what lies before."""
    x, weight, matrix = torch.randn(3, 8), nn.Parameter(torch.ones(8)), nn.Parameter(torch.randn(4, 8))
    normed = tt.rms_norm(x, weight, eps=1e-5)
    tt.linear(normed.detach(), matrix).sum().backward()
    assert matrix.grad is not None and weight.grad is None
    with pytest.raises(NotImplementedError, match=re.escape("twotower::rms_norm is not differentiable")):
        tt.linear(normed, matrix).sum().backward()


@pytest.mark.parametrize("which", ["k", "k_context"])
def test_in_place_functions_refuse_as_ever(which: str) -> None:
    given = INPUTS["append_kv"](*SMALL)
    given[which].requires_grad_()
    before = given["v_context"].clone()
    with pytest.raises(ValueError, match="append_kv is not differentiable in it"):
        tt.append_kv(**given)
    assert torch.equal(given["v_context"], before)
    attention = INPUTS["block_attention"](*SMALL)
    out = torch.zeros_like(attention["q"])
    attention[which].requires_grad_()
    with pytest.raises(ValueError, match=r"^out: expected no tensor that requires grad"):
        tt.block_attention(**attention, out=out)
    assert not out.any()

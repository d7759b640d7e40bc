"""Every public op under `torch.compile` and `torch.export`: whole, as the op itself answers, and once for all sizes and
all values of its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map

import twotower_kernels as tt
from twotower_kernels import RemaskPolicy
from twotower_kernels.options.remask_policy import OPTIONAL_BOUNDS

SIZES = ((3, 5), (4, 7), (6, 30))  # rows and tokens; no other size is any of these, as sizes that are equal
# when a graph is made are taken to be equal always
MASK = 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths(batch: int, most: int) -> Tensor:
    return torch.arange(batch) % (most + 1)


def attention_inputs(b: int, s: int) -> dict[str, Any]:
    keys, context = drawn(b, s, 2, 8), drawn(b, 2 * s + 1, 2, 8)
    lens = lengths(b, 2 * s + 1)
    return dict(q=drawn(b, s, 8, 8), k=keys, v=keys + 1, k_context=context, v_context=context - 1, context_lens=lens)


def context_inputs(b: int, s: int) -> dict[str, Any]:
    inputs = attention_inputs(b, s)
    return dict(q=inputs["q"], k_context=inputs["k_context"], v_context=inputs["v_context"], block_lens=lengths(b, s))


def scan_inputs(b: int, s: int) -> dict[str, Any]:
    channels, heads = 8 * 12 + 2 * 2 * 16, 8
    return dict(
        xbc=drawn(b, s, channels), dt=drawn(b, s, heads), conv_weight=drawn(channels, 4), conv_bias=drawn(channels),
        a_log=drawn(heads), d=drawn(heads), dt_bias=drawn(heads), n_groups=2, head_dim=12,
        ssm_state=drawn(b, heads, 12, 16), seq_lens=lengths(b, s), return_states=True,
    )  # fmt: skip


def experts_inputs(b: int, s: int) -> dict[str, Any]:
    experts = (torch.arange(b * s * 2).view(b * s, 2) % 16).int()
    plan = tt.moe_plan(experts, 16)
    return dict(
        x=drawn(b * s, 24), w_up=drawn(16, 40, 24), w_down=drawn(16, 24, 20), weights=drawn(b * s, 2), experts=experts,
        plan=plan, up_bias=drawn(16, 40), activation="clamped_gated",
    )  # fmt: skip


def remask_inputs(b: int, s: int) -> dict[str, Any]:
    tokens = torch.where(drawn(b, s) > 0.5, torch.tensor(5), torch.tensor(MASK))
    per_row = torch.arange(b)
    return dict(
        logits=drawn(b, s, 40), tokens=tokens, mask_token_id=MASK, policy=RemaskPolicy.twotower(), temperature=1.0,
        seed=per_row, top_k=per_row + 1, valid_lens=lengths(b, s),
    )  # fmt: skip


def append(b: int, s: int) -> dict[str, Any]:
    storage = drawn(b, 2 * s + 1, 2, 8)
    return dict(k_context=storage, v_context=storage + 1, k=drawn(b, s, 2, 8), v=drawn(b, s, 2, 8), context_lens=1)


def modulated(b: int, s: int) -> dict[str, Any]:
    return dict(x=drawn(b, s, 24), weight=drawn(24), shift=drawn(b, 24), scale=drawn(b, 24), eps=1e-5)


def residual(b: int, s: int) -> dict[str, Any]:
    return dict(residual=drawn(b, s, 24), y=drawn(b, s, 24), gate=drawn(b, 24))


def lse(b: int, s: int) -> dict[str, Any]:
    return dict(out_a=drawn(b, s, 8), lse_a=drawn(b, s), out_b=drawn(b, s, 8) + 1, lse_b=drawn(b, s) - 1)


INPUTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "adaln_norm": modulated,
    "append_kv": append,
    "block_attention": attention_inputs,
    "block_causal_attention": lambda b, s: dict(
        q=drawn(b, s, 4, 8), k=drawn(b, s, 2, 8), v=drawn(b, s, 2, 8), block_size=2, seq_lens=lengths(b, s)
    ),
    "context_attention": context_inputs,
    "gated_residual": residual,
    "gated_residual_adaln_norm": lambda b, s: residual(b, s) | {k: v for k, v in modulated(b, s).items() if k != "x"},
    "gated_rms_norm": lambda b, s: dict(y=drawn(b, s, 24), z=drawn(b, s, 24), weight=drawn(24), n_groups=2, eps=1e-5),
    "linear": lambda b, s: dict(x=drawn(b, s, 24), weight=drawn(20, 24), bias=drawn(20)),
    "mamba2_scan": scan_inputs,
    "merge_attention": lse,
    "moe_experts": experts_inputs,
    "moe_gate": lambda b, s: dict(x=drawn(b * s, 24), gate_weight=drawn(16, 24)),
    "moe_plan": lambda b, s: dict(experts=experts_inputs(b, s)["experts"], num_experts=16),
    "moe_route": lambda b, s: dict(logits=drawn(b * s, 16), top_k=2, scaling=2.5),
    "remask": remask_inputs,
    "pack_experts": lambda b, s: dict(gate=drawn(b, s, 24), up=drawn(b, s, 24), down=drawn(b, 24, s)),
    "rms_norm": lambda b, s: dict(x=drawn(b, s, 24), weight=drawn(24), eps=1e-5),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def answer(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    """What the op gives for a copy of the inputs, and those of them that it writes to."""
    result = getattr(tt, op)(**inputs)
    return tree_leaves(result) if op != "append_kv" else [inputs["k_context"], inputs["v_context"]]


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def test_every_public_op_is_here() -> None:
    """A function of the package is one if it is of an operator's module."""
    functions = [getattr(tt, name) for name in tt.__all__ if inspect.isfunction(getattr(tt, name))]
    assert set(INPUTS) == {function.__name__ for function in functions if ".ops." in function.__module__}


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("op", INPUTS)
def test_one_graph_serves_all_sizes(op: str, dynamic: bool | None) -> None:
    """Two, if the compiler must first see that they vary."""
    backend = "aot_eager" if dynamic else "eager"
    compiled = torch.compile(answer, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in SIZES:
        inputs = INPUTS[op](*size)
        assert_same(compiled(op, copied(inputs)), answer(op, copied(inputs)))
    assert graphs() == (1 if dynamic else 2)


class Exported(nn.Module):
    """An op as a program: of tensors, the rest of its arguments given beforehand."""

    def __init__(self, op: str, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.rest = op, {name: value for name, value in inputs.items() if not tensors(value)}

    def forward(self, given: dict[str, Any]) -> list[Tensor]:
        return answer(self.op, given | self.rest)


def tensors(value: Any) -> bool:
    return all(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


@pytest.mark.parametrize("op", INPUTS)
def test_an_exported_program_takes_all_sizes(op: str) -> None:
    inputs = INPUTS[op](*SIZES[0])
    given = {name: value for name, value in inputs.items() if tensors(value)}
    weights = {"weight", "conv_weight", "conv_bias", "a_log", "d", "dt_bias", "w_up", "w_down", "gate_weight"}
    every = torch.export.Dim.AUTO
    shapes = {
        name: tree_map(lambda t: {} if name in weights else dict.fromkeys(range(t.ndim), every), value)  # noqa: B023
        for name, value in given.items()
    }
    module = Exported(op, inputs)
    program = torch.export.export(module, (copied(given),), dynamic_shapes=(shapes,), strict=False).module()
    for size in SIZES:
        given = {name: value for name, value in INPUTS[op](*size).items() if tensors(value)}
        assert_same(program(copied(given)), module(copied(given)))


class OwnSizes(nn.Module):
    """Ops whose numbers are sizes of their tensors."""

    def forward(self, given: dict[str, Tensor], logits: Tensor, tokens: Tensor) -> list[Tensor]:
        context, block = given["k_context"].shape[1], given["q"].shape[1]
        keys, values = given["k_context"].clone(), given["v_context"].clone()
        tt.append_kv(keys, values, given["k"], given["v"], context - block, block_lens=block)
        numbers = dict(context_lens=context, block_lens=block, window=block)
        attended: Any = tt.block_attention(**given | dict(k_context=keys, v_context=values), **numbers)
        filled = tt.remask(logits, tokens, mask_token_id=MASK, initial_num_masked=block, num_steps=block, top_k=block)
        return [attended, *filled]


def test_an_exported_program_takes_sizes_for_numbers() -> None:
    def inputs(b: int, s: int) -> tuple[Any, ...]:
        given = attention_inputs(b, s)
        del given["context_lens"]
        return given, drawn(b, s, 40), torch.full((b, s), MASK)

    first = inputs(*SIZES[0])
    shapes = tree_map(lambda t: dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO), first)
    program = torch.export.export(OwnSizes(), first, dynamic_shapes=shapes, strict=False).module()
    for size in SIZES:
        assert_same(program(*inputs(*size)), OwnSizes()(*inputs(*size)))


# --- numbers --------------------------------------------------------------------------------------------------------

EPS = (1e-5, 1e-6, 1e-3, 0.1)
ATTENTION: dict[str, Sequence[Any]] = {
    "scale": (0.5, 0.25, 3.0, -1.0),
    "softcap": (1.0, 2.5, 0.0, 7.0),
    "window": (2, 3, 0, 5),
    "context_lens": (3, 4, 0, 9),
    "block_lens": (2, 3, 0, 5),
}
NUMBERS: dict[str, dict[str, Sequence[Any]]] = {
    "adaln_norm": {"eps": EPS},
    "append_kv": {"context_lens": (2, 3, 0, 5), "block_lens": (2, 3, 0, 5)},
    "block_attention": ATTENTION,
    "context_attention": ATTENTION,
    "gated_residual_adaln_norm": {"eps": EPS},
    "gated_rms_norm": {"eps": EPS, "n_groups": (2, 3, 4, 6)},
    "mamba2_scan": {
        "time_step_limit": ((0.1, 0.2), (0.2, 0.3), (0.1, 2.0), (0.0, 7.0)),
        "states_every": (2, 3, 4, 4),  # more than one block, as a size of one is a graph of its own
    },
    "moe_experts": {"alpha": (1.5, 2.0, 0.5, 3.0), "limit": (2.5, 1.0, 0.5, 3.0)},
    "moe_plan": {"num_experts": (16, 17, 20, 40)},
    "moe_route": {"top_k": (2, 3, 4, 9), "scaling": (2.5, 1.0, 0.5, 3.0)},
    "remask": {
        "mask_token_id": (5, 3, 4, 9),
        "step": (0, 1, 2, 3),
        "num_steps": (2, 3, 4, 9),
        "temperature": (0.5, 1.0, 0.0, 2.0),
        "top_k": (2, 3, 0, 9),
        "top_p": (0.5, 0.9, 0.1, 1.0),
        "seed": (2, 3, -4, 2**62),
        "offset": (2, 3, 0, 2**32 - 1),
        "initial_num_masked": (5, 4, 3, 2),
        "gate_bound": (0.5, 0.1, 0.9, 1.0),
        "suppress_ids": ([2], [4], [7], [9]),
        "confidence_suppress_ids": ([2], [4], [7], [9]),
    },
    "rms_norm": {"eps": EPS},
}


@pytest.mark.parametrize("op", NUMBERS)
def test_one_graph_serves_all_values_of_all_numbers(op: str) -> None:
    """Beside that of the first values."""
    compiled = torch.compile(answer, fullgraph=True, backend="aot_eager")
    for values in zip(*NUMBERS[op].values(), strict=True):
        inputs = INPUTS[op](*SIZES[0]) | dict(zip(NUMBERS[op], values, strict=True))
        assert_same(compiled(op, copied(inputs)), answer(op, copied(inputs)))
    assert graphs() == 2


def test_gradients_follow_numbers_that_vary() -> None:
    inputs, context = attention_inputs(*SIZES[0]), context_inputs(*SIZES[0])

    def loss(leaves: dict[str, Tensor], **numbers: Any) -> Any:
        out: Any = tt.block_attention(**inputs | leaves, **numbers)
        part: Any = tt.context_attention(**context | {"q": leaves["q"]}, **numbers)
        return (out * part).sum()

    def gradients(function: Callable[..., Any], **numbers: Any) -> list[Tensor]:
        leaves = {name: inputs[name].clone().requires_grad_() for name in "qkv"}
        return list(torch.autograd.grad(function(leaves, **numbers), list(leaves.values())))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale, softcap, window in ((0.5, 2.0, 2), (0.25, 3.0, 3), (3.0, 1.0, 5)):
        numbers = dict(scale=scale, softcap=softcap, window=window)
        assert_same(gradients(compiled, **numbers), gradients(loss, **numbers))
    assert graphs() == 2


def test_the_default_compiler_keeps_a_graph_too() -> None:
    inputs = INPUTS["rms_norm"](*SIZES[0])
    compiled = torch.compile(answer, fullgraph=True)
    for eps in EPS:
        assert_same(compiled("rms_norm", inputs | {"eps": eps}), answer("rms_norm", inputs | {"eps": eps}))
    assert graphs() == 2


def test_registration_of_the_overloads() -> None:
    """Of operators that take numbers as tensors, the results are those of the operators that take numbers."""
    ops, number = torch.ops.twotower, lambda value: torch.tensor(value, dtype=torch.float64)
    q, k, v, past = drawn(2, 3, 4, 8), drawn(2, 3, 2, 8), drawn(2, 3, 2, 8), [None] * 8
    x, y, weight = drawn(2, 3, 8), drawn(2, 3, 8), drawn(8)
    scan = [scan_inputs(3, 5)[name] for name in ("xbc", "dt", "conv_weight", "conv_bias", "a_log", "d", "dt_bias")]
    calls = [
        (ops.adaln_norm, (x, weight, None, None), (1e-5, False)),
        (ops.gated_residual_adaln_norm, (x, y, None, weight, None, None), (1e-5, False)),
        (ops.gated_rms_norm, (x, y, weight, 2), (1e-5,)),
        (ops.block_attention, (q, k, v, *past, 1, None), (0.5, 2.0)),
        (ops.context_attention, (q, k, v, *[None] * 6, 0, 2), (0.5, 2.0)),
        (ops.attention_backward, (q, drawn(2, 3, 4), q, k, v, *past, 1, None), (0.5, 2.0)),
        (ops.mamba2_scan, (*scan, 2, 12, None, None, None, None), (0.0, 2.0, True, 0)),
        (ops.moe_route, (drawn(5, 8), None, None, 2, False, 1, 1, True), (2.5, False)),
        (ops.moe_router, (drawn(5, 8), drawn(6, 8), None, None, 2, False, 1, 1, True), (2.5, True)),
    ]
    for op, first, last in calls:
        as_tensors = [number(value) if type(value) is float else value for value in last]
        assert_same(tree_leaves(op.traced(*first, *as_tensors)), tree_leaves(op.default(*first, *last)))
        torch.library.opcheck(op.traced, (*first, *as_tensors))
    for op, first in (
        (ops.block_attention_out, (q, k, v, *past, 1, None)),
        (ops.context_attention_out, (q, k, v, *[None] * 6, 0, 2)),
    ):
        results = [[q.new_empty(2, 3, 4, 8), q.new_empty(2, 3, 4)] for _ in range(2)]
        op.traced(*first, number(0.5), number(2.0), *results[0])
        op.default(*first, 0.5, 2.0, *results[1])
        assert_same(*results)
        torch.library.opcheck(op.traced, (*first, number(0.5), number(2.0), *results[0]))


# --- policies -------------------------------------------------------------------------------------------------------

PRESETS = [name for name, _ in inspect.getmembers(RemaskPolicy, inspect.ismethod) if not name.startswith("_")]
FIELDS = {
    name: (2, 3, 4, 5) if name in ("min_commits", "sub_block") else (0.5, 0.25, 0.125, 0.375)
    for name in ("gate_bound", "position_penalty", "min_t", "warmup", "min_commits", "sub_block", *OPTIONAL_BOUNDS)
}


def step(inputs: dict[str, Any], policy: RemaskPolicy) -> list[Tensor]:
    return tree_leaves(tt.remask(**inputs | {"policy": policy}, num_steps=4))


def test_every_policy_can_be_made_inside() -> None:
    def encoded(x: Tensor) -> tuple[Tensor, list[Any]]:
        return x + 1, [getattr(RemaskPolicy, preset)().encoded() for preset in PRESETS]

    compiled = torch.compile(encoded, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1))[1] == encoded(torch.ones(1))[1]


def test_a_policy_made_inside_acts() -> None:
    """One graph for all that differ in numbers only."""
    inputs = remask_inputs(*SIZES[0])

    def call(inputs: dict[str, Any], fields: dict[str, Any]) -> list[Tensor]:
        return step(inputs, RemaskPolicy(gate="threshold", alpha="cosine", **fields))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for values in zip(*FIELDS.values(), strict=True):
        fields = dict(zip(FIELDS, values, strict=True))
        assert_same(compiled(inputs, fields), call(inputs, fields))
    assert graphs() == 2


def test_a_policy_that_was_never_used_comes_from_outside() -> None:
    inputs = remask_inputs(*SIZES[0])
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for threshold in (0.25, 0.5, 0.75):
        policies = [RemaskPolicy.twotower(threshold) for _ in range(2)]
        assert_same(compiled(inputs, policies[0]), step(inputs, policies[1]))
    assert graphs() == 2

"""Calls of the operators themselves, `torch.ops.twotower.*`, with arguments that fit and arguments that are damaged.

The calls that fit are recorded from the public functions, so their arguments are the operators' own. As a program,
`python -m tests.kernels.direct_calls SEED COUNT`, it makes COUNT damaged calls of every operator and dies of what it
should have refused: see `test_direct_calls.py`.
"""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tests.conftest  # noqa: F401 (it loads the library that is under test)
import twotower_kernels as tt
from twotower_kernels.ops.moe import moe_router
from twotower_kernels.quantization import FORMATS
from twotower_kernels.reference import adaln, attention, mamba2

Call = tuple[Any, list[Any]]  # an operator and its arguments

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.float8_e4m3fn)
NUMBERS = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 7, 400, 2**31, 2**40, 2**62, 2**63 - 1)
REALS = (float("-inf"), -1.0, 0.0, 1e-320, 0.5, 1e308, float("inf"), float("nan"))
REFUSED = (ValueError, TypeError, NotImplementedError, MemoryError)
# What PyTorch itself refuses: values that are not of the schema's types, and sizes that no memory has.
OF_PYTORCH = (
    *("Expected a value of type", "expected at most", "is missing value", "Overflow when unpacking", "Cast error"),
    *(
        "Unable to cast",
        "can't allocate memory",
        "Storage size calculation overflowed",
        "numel: integer multiplication",
    ),
    *("Invalid shape dimension", "is not differentiable", "a leaf Variable that requires grad", "without storage"),
    *("Trying to create tensor with negative dimension", "numel: integer multiplication overflow"),
)


# --- calls that fit ---------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Keeps the operators that are called inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "twotower":
            self.calls.append((func, list(args)))
        return func(*args, **(kwargs or {}))


def operators() -> set[str]:
    """Every operator that the dispatcher knows a CPU kernel of."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return {name.split("::")[1] for name in names if name.startswith("twotower::") and "." not in name}


def _attention_calls() -> None:
    sizes = {"context": 12, "context_lens": [7, 0], "block_lens": [3, 2], "block": 3}
    paged = sizes | {"page": 4, "context_index": [1, 0], "causal": True, "window": 3, "softcap": 2.0}
    cases = ("tiny", sizes, paged, paged | {"context_starts": [2, 0], "sinks": True, "value_dim": 5})
    for op in (tt.block_attention, tt.context_attention):
        for case in cases:
            inputs = attention.make_inputs(op.__name__, case)
            out = op(**inputs)
            op(**inputs, out=torch.empty_like(out))
            q = inputs["q"].clone().requires_grad_()
            op(**inputs | {"q": q}).nan_to_num().sum().backward()
    tt.block_causal_attention(**attention.make_inputs("block_causal_attention", "softcap"))
    for case in ("tiny", "empty_sides"):
        tt.merge_attention(**attention.make_inputs("merge_attention", case))
    for case in ("tiny", {"context": 12, "page": 4, "context_lens": [7, 0], "context_index": [1, 0]}):
        tt.append_kv(**attention.make_inputs("append_kv", case))


def _quantized_calls() -> None:
    x, experts, weights = torch.randn(3, 32), torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2)
    for format in FORMATS:
        up, down, shared = (tt.quantize(torch.randn(*n, 32), format) for n in ((3, 32), (3, 32), (32,)))
        tt.linear(x, shared, torch.randn(32))
        tt.moe_experts(x, up, down, weights, experts, shared_up=shared, shared_down=shared)
        tt.moe_experts(x, up.dequantize(), down.dequantize(), weights, experts, shared_up=shared, shared_down=shared)


def _router_calls() -> None:
    for score, groups in (("sigmoid", 2), ("softmax", 1)):
        options = {"top_k": 2, "score": score, "n_group": groups, "topk_group": 1}
        x, weight, bias = torch.randn(5, 7), torch.randn(8, 7), torch.randn(8)
        tt.moe_route(tt.moe_gate(x, weight), bias, **options)
        _, experts, plan = moe_router(x, weight, bias, **options)
        tt.moe_plan(experts, 8)
        options |= {"n_group": 4, "topk_group": 2, "dropped": "-inf", "per_expert_scale": torch.rand(8)}
        tt.moe_route(tt.moe_gate(x, weight).bfloat16(), bias, **options)
        for activation, rows in (("relu2", 3), ("clamped_gated", 6)):
            up, down, shared = torch.randn(8, rows, 7), torch.randn(8, 7, 3), (torch.randn(rows, 7), torch.randn(7, 3))
            tt.moe_experts(x, up, down, torch.rand(5, 2), experts, activation=activation)
            more = {"shared_up": shared[0], "shared_down": shared[1]}
            more |= {"up_bias": torch.randn(8, rows), "down_bias": torch.randn(8, 7)}
            tt.moe_experts(x, up, down, torch.rand(5, 2), experts, plan=plan, activation=activation, **more)


def _other_calls() -> None:
    for op in (tt.rms_norm, tt.adaln_norm, tt.gated_residual, tt.gated_residual_adaln_norm):
        for case in adaln.CASES[op.__name__]:
            if "released" not in case:
                op(**adaln.make_inputs(op.__name__, case))
    for dtype, bias in ((torch.float32, None), (torch.bfloat16, torch.randn(5).bfloat16())):
        tt.linear(torch.randn(2, 3, 7).to(dtype), torch.randn(5, 7).to(dtype), bias)
    tt.gated_rms_norm(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8), n_groups=2, eps=1e-5)
    for case, options in (("unseeded", {}), ("ragged", {"return_states": True}), ("shared_state", {"states_every": 5})):
        tt.mamba2_scan(**mamba2.make_inputs("mamba2_scan", case), **options)
    logits, tokens, ints = torch.randn(2, 3, 6), torch.full((2, 3), 1), torch.tensor([1, 2])
    for policy in (tt.RemaskPolicy.twotower(), tt.RemaskPolicy.llada2(0.9), tt.RemaskPolicy.posterior()):
        tt.remask(logits, tokens, mask_token_id=1, policy=policy, temperature=1.0, num_steps=3, suppress_ids=[2])
        tt.remask(
            *(logits, tokens),
            mask_token_id=1,
            policy=policy,
            **{name: ints for name in ("step", "num_steps", "top_k", "seed", "offset", "initial_num_masked")},
            **{name: torch.rand(2) for name in ("temperature", "top_p", "gate_bound")},
            **{"suppress_ids": torch.tensor([3]), "confidence_suppress_ids": torch.tensor([4])},
            **{"editable": tokens > 0, "valid_lens": ints, "candidates": tokens - 2, "rank_noise": torch.rand(2, 3)},
            **{"shift": 1, "shift_logits": torch.randn(2, 6)},
        )


def recorded() -> dict[str, list[Call]]:
    """Calls that fit, of every operator."""
    with _Recorder() as recorder:
        _attention_calls(), _router_calls(), _quantized_calls(), _other_calls()
    found: dict[str, list[Call]] = {}
    for call in recorder.calls:
        found.setdefault(call[0]._schema.name.split("::")[1], []).append(call)
    return found


# --- damage -----------------------------------------------------------------------------------------------------------


def _other_size(rng: random.Random, x: Tensor) -> Tensor:
    shape = list(x.shape) or [1]
    axis = rng.randrange(len(shape))
    shape[axis] = rng.choice([0, 1, 2, shape[axis] + 1, max(shape[axis] - 1, 0), 2 * shape[axis], 400])
    return _filled(rng, shape, x)


def _other_rank(rng: random.Random, x: Tensor) -> Tensor:
    shape = list(x.shape)
    if shape and rng.random() < 0.5:
        del shape[rng.randrange(len(shape))]
    else:
        shape.insert(rng.randint(0, len(shape)), rng.choice([1, 2]))
    return _filled(rng, shape, x)


def _filled(rng: random.Random, shape: list[int], like: Tensor) -> Tensor:
    """Values of `like` in another shape."""
    if like.numel() == 0 or like.is_meta:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    count = max(1, torch.Size(shape).numel())
    values = like.reshape(-1).repeat(-(-count // like.numel()))
    return values[: torch.Size(shape).numel()].reshape(shape)


def _other_layout(rng: random.Random, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    kind, axis = rng.randrange(5), rng.randrange(x.ndim)
    if kind == 0:
        return x.transpose(axis, -1).contiguous().transpose(axis, -1)
    if kind == 1 and x.shape[axis]:
        return x.narrow(axis, 0, 1).expand(x.shape)
    if kind == 2:
        return x.new_zeros([2 * n for n in x.shape])[tuple(slice(None, None, 2) for _ in x.shape)]
    if kind == 3:
        return x.new_zeros(sum(x.shape) + 1).as_strided(x.shape, [1] * x.ndim)
    return x.transpose(axis, 0)


def _other_values(rng: random.Random, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.numel() == 0 or x.is_meta:
        return x.clone()
    x = x.detach().contiguous().clone()
    info = torch.iinfo(x.dtype)
    x.view(-1)[rng.randrange(x.numel())] = rng.choice([n for n in NUMBERS if info.min <= n <= info.max])
    return x


def _tensor(rng: random.Random, x: Tensor, arguments: list[Any]) -> Any:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    damage: list[Callable[[], Any]] = [
        *[lambda: _other_size(rng, x)] * 3,
        *[lambda: _other_layout(rng, x)] * 2,
        *[lambda: _other_values(rng, x)] * 2,
        lambda: _other_rank(rng, x),
        lambda: x.to(rng.choice(DTYPES)),
        lambda: rng.choice(tensors),
        lambda: x.to("meta"),
        lambda: x.to(torch.float32).requires_grad_(),
        lambda: None,
    ]
    return rng.choice(damage)()


def _one(rng: random.Random, name: str, value: Any, arguments: list[Any]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(rng, value, arguments)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(NUMBERS)
    if isinstance(value, float):
        return rng.choice(REALS)
    if isinstance(value, str):
        return rng.choice(["relu2", "silu", "gelu", "silu_gated", "clamped_gated", "", "swish"])
    if isinstance(value, list | tuple) and value:
        value = list(value)
        at = rng.randrange(len(value))
        kind = rng.randrange(4)
        # A schedule that lists the shares of all its steps takes as long as they are many.
        some = [n for n in NUMBERS if n <= 400] if name == "whole" and at == 1 else NUMBERS
        value[at] = rng.choice(some) if isinstance(value[at], int) else rng.choice(REALS)
        return value[:-1] if kind == 0 else [*value, value[0]] if kind == 1 else value
    if value is None:  # something where nothing was
        return rng.choice([a for a in arguments if isinstance(a, Tensor)] + [torch.tensor([0, 1]), 3, 0.5])
    return [rng.choice(NUMBERS)]


def damaged(rng: random.Random, call: Call) -> Call:
    op, arguments = call[0], [a.clone() if isinstance(a, Tensor) else a for a in call[1]]
    names = [argument.name for argument in op._schema.arguments]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(arguments))
        arguments[at] = _one(rng, names[at], arguments[at], arguments)
    return op, arguments


def attempt(call: Call) -> bool:
    """Whether the call was accepted.

    Raises:
        AssertionError: it was refused by an error of another kind than the operators promise.
    """
    op, arguments = call
    try:
        results = op(*arguments)
    except REFUSED:
        return False
    except RuntimeError as error:
        if any(text in str(error) for text in OF_PYTORCH):
            return False
        raise AssertionError(f"{op}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{op}: {type(error).__name__}: {error}") from error
    for result in results if isinstance(results, tuple) else (results,):
        if isinstance(result, Tensor) and not result.is_meta:
            result.clone()
    return True


def main(seed: int, count: int) -> None:
    calls = recorded()
    missing = operators() - set(calls)
    assert not missing, f"no call of {sorted(missing)} is recorded"
    rng = random.Random(seed)
    for name in sorted(calls):
        accepted = 0
        for number in range(count):
            call = damaged(rng, rng.choice(calls[name]))
            print(name, number, file=sys.stderr)
            accepted += attempt(call)
        print(name, accepted, count - accepted, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: SIM115
        limit = pages * resource.getpagesize() + int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Arguments for every op of the dispatcher, in its schema's order: for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt

OPS = sorted(
    full.removeprefix("twotower::")
    for full in torch._C._dispatch_get_all_op_names()
    if full.startswith("twotower::") and "." not in full
)


def overload(name: str) -> torch._ops.OpOverload:
    op: torch._ops.OpOverload = getattr(torch.ops.twotower, name).default
    return op


def arguments(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
    """Small, valid arguments; the same shapes and options for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return ARGUMENTS[name](normal, torch.float64 if dtype == torch.float64 else torch.float32)


def floating(name: str, given: list[Any]) -> dict[str, int]:
    """The places of the floating tensors among the arguments, by their names in the schema."""
    names = [argument.name for argument in overload(name)._schema.arguments]
    return {
        argument: n
        for n, (argument, x) in enumerate(zip(names, given, strict=True))
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def written(name: str) -> list[int]:
    """The places of the arguments that the op writes to."""
    schema = overload(name)._schema.arguments
    return [n for n, argument in enumerate(schema) if argument.alias_info and argument.alias_info.is_write]


Normal = Callable[..., Tensor]


def _context(normal: Normal, wide: torch.dtype) -> list[Tensor | None]:
    """Keys and values of a context, where it ends and starts, no index and no table, the block's lengths, sinks."""
    lens, starts, block_lens = torch.tensor([5, 2]), torch.tensor([1, 0]), torch.tensor([3, 2])
    return [normal(2, 5, 1, 4), normal(2, 5, 1, 4), lens, starts, None, None, block_lens, normal(2, dtype=wide)]


def _block(normal: Normal, wide: torch.dtype) -> list[Any]:
    return [normal(2, 3, 2, 4), normal(2, 3, 1, 4), normal(2, 3, 1, 4), *_context(normal, wide), 1, None, None, 0.0]


def _past(normal: Normal, wide: torch.dtype) -> list[Any]:
    return [normal(2, 3, 2, 4), *_context(normal, wide), 1, 2, None, 0.0]


def _results(normal: Normal, wide: torch.dtype) -> list[Tensor]:
    return [normal(2, 3, 2, 4), normal(2, 3, 2, dtype=wide)]


def _experts() -> Tensor:
    return torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32)


def _moe(normal: Normal, wide: torch.dtype) -> list[Any]:
    matrices = normal(3, 5, 4), normal(3, 4, 5)
    shared = normal(2, 4), normal(4, 2)
    return [
        normal(3, 4),
        *matrices,
        normal(3, 2, dtype=wide),
        _experts(),
        *tt.moe_plan(_experts(), 3),
        *shared,
        *(normal(3, 5), normal(3, 4)),
        *("relu2", 1.702, 7.0),
    ]


def _scan(normal: Normal, wide: torch.dtype) -> list[Any]:
    vectors = normal(2, dtype=wide), normal(2, dtype=wide), normal(2, dtype=wide)
    states = normal(2, 10, 3), normal(2, 2, 3, 2, dtype=wide)
    lens = torch.tensor([4, 3])
    return [
        normal(2, 4, 10), normal(2, 4, 2), normal(10, 4), normal(10), *vectors, 1, 3, *states, None, lens, 0.0, 9.0,
        True, 0,
    ]  # fmt: skip


def _remask(normal: Normal, wide: torch.dtype) -> list[Any]:
    options, bounds = tt.RemaskPolicy.twotower().encoded()
    tokens = torch.tensor([[3, 1, 3], [3, 3, 2]])
    return [
        normal(2, 3, 8), tokens, 3, options, bounds, [0, 3, 0, 7, 0, -1], [0.0, 1.0, 0.5], *[None] * 9,
        [4], None, [], None, None, None, None, None, 0, None, True,
    ]  # fmt: skip


_ROUTE = 2, False, 1, 1, True, 1.0, False

ARGUMENTS: dict[str, Callable[[Normal, torch.dtype], list[Any]]] = {
    "rms_norm": lambda normal, wide: [normal(2, 3, 4), normal(4), 1e-5, True],
    "adaln_norm": lambda normal, wide: [normal(2, 3, 4), normal(4), normal(2, 4), normal(2, 4), 1e-5, False],
    "append_kv": lambda normal, wide: [
        *(normal(2, 6, 1, 4) for _ in range(2)), *(normal(2, 3, 1, 4) for _ in range(2)), torch.tensor([3, 0]),
        None, None, None,
    ],
    "attention_backward": lambda normal, wide: [*_results(normal, wide), *_block(normal, wide)],
    "block_attention": _block,
    "block_attention_out": lambda normal, wide: [*_block(normal, wide), *_results(normal, wide)],
    "context_attention": _past,
    "context_attention_out": lambda normal, wide: [*_past(normal, wide), *_results(normal, wide)],
    "gated_residual": lambda normal, wide: [normal(2, 3, 4), normal(2, 3, 4), normal(2, 4)],
    "gated_residual_adaln_norm": lambda normal, wide: [
        normal(2, 3, 4), normal(2, 3, 4), normal(2, 4), normal(4), normal(2, 4), normal(2, 4), 1e-5, False,
    ],
    "gated_rms_norm": lambda normal, wide: [normal(2, 3, 4), normal(2, 3, 4), normal(4), 2, 1e-5],
    "linear": lambda normal, wide: [normal(3, 4), normal(5, 4), normal(5)],
    "mamba2_scan": _scan,
    "merge_attention": lambda normal, wide: [*_results(normal, wide), *_results(normal, wide)],
    "moe_experts": _moe,
    "moe_gate": lambda normal, wide: [normal(3, 4), normal(5, 4)],
    "moe_plan": lambda normal, wide: [_experts(), 3],
    "moe_route": lambda normal, wide: [normal(3, 5), normal(5, dtype=wide), normal(5), *_ROUTE],
    "moe_router": lambda normal, wide: [
        normal(3, 4), normal(5, 4), normal(5, dtype=wide), normal(5), *_ROUTE,
    ],
    "remask": _remask,
}  # fmt: skip

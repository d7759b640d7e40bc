"""Attention that the registered functions do not reach, whatever a model's `set_attn_implementation` is told."""

from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # by which transformers' layers ask for the implementation that is set


def is_unreached(module: nn.Module) -> bool:
    """Whether it is a layer of attention whose code does not ask for the implementation."""
    if not _is_attention(module) or any(_is_attention(part) for part in module.modules() if part is not module):
        return False
    return not any(_INTERFACE in names for names in _names(type(module)))


def why_unreached(module: nn.Module) -> str:
    kind = type(module)
    where = ", remote code," if kind.__module__.startswith("transformers_modules") else ""
    return f"{kind.__name__}{where} does not ask which attention is set: set_attn_implementation has no effect on it"


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and not name.endswith("Layer")


def _names(kind: type) -> Iterator[tuple[str, ...]]:
    """The names in the code of a class' methods, and in that of the functions beside it that they name."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for method in vars(base).values():
            function = getattr(method, "__wrapped__", method)
            if isinstance(function, FunctionType):
                yield from _of_code(function.__code__)
                for name in function.__code__.co_names:
                    if isinstance(other := function.__globals__.get(name), FunctionType):
                        yield from _of_code(other.__code__)


def _of_code(code: CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)

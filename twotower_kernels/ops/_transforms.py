"""How an operation meets PyTorch's transforms: reverse and forward derivatives, torch.func, torch.vmap, autocast.

Each is a kernel of the dispatcher above those of the devices, so it holds for whoever calls `torch.ops.twotower`, and
inside torch.compile. What users may rely on: docs/transforms.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from twotower_kernels.ops._refusal import refused

Rule = Callable[..., tuple[Any, ...]]  # from an op's arguments to those that it runs on

# The keys of a call on a CPU with nothing between the derivatives and the device: no mode, transform or fake tensor.
_PLAIN_CPU = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
).raw_repr()

_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}  # device to dispatch key


def _full(op: torch._ops.OpOverload) -> str:
    """Its name, and that of the overload if it is one."""
    return op._opname if op._overloadname == "default" else f"{op._opname}.{op._overloadname}"


# --- derivatives ----------------------------------------------------------------------------------------------------


def register_derivatives(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
    cpu: dict[str, Callable[..., Any]],
) -> None:
    """The op's autograd kernel. Where there is no derivative it raises, as PyTorch would hand out silent zeros.

    Where a CPU's kernel comes next it is taken from `cpu` and called, which saves a second way through the dispatcher.

    What `torch.library.register_autograd` makes cannot be used inside torch.func, lets tangents vanish, says nothing of
    an argument that requires grad and gets none, and leaves the versions of what is written as they were.
    """
    name, arguments = op._schema.name, op._schema.arguments
    written = [n for n, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]

    full = _full(op)

    def below(keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
        if keyset.raw_repr() == _PLAIN_CPU:
            return cpu[full](*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            given, keyset = inputs[:-1], inputs[-1]
            ctx.given = [(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in given]
            if torch._C._are_functorch_transforms_active():
                # Gradients are off inside an autograd.Function, but not for the transforms that lie below this one.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = below(keyset, given)
            else:
                output = below(keyset, given)
            if setup_context is not None:
                setup_context(ctx, given, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if backward is None:
                results, text = (None,) * len(arguments), f"{name} is not differentiable"
            else:
                results, text = backward(ctx, *grads), f"{name} is not differentiable in {{}}"
            asked = zip(arguments, ctx.given, ctx.needs_input_grad, results, strict=False)
            return *(
                refused(text.format(argument.name), grads, x) if needed and grad is None else grad
                for argument, x, needed, grad in asked
            ), None

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            refuse_tangents(name, inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if written:
                raise NotImplementedError(f"{name} is not differentiable, expected no tensor that requires grad")
            # The dispatcher is at one level of torch.func already, which is where this node belongs.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, Node).apply(*inputs, keyset)
        output = below(keyset, inputs)
        for n in written:
            if not inputs[n].is_inference():
                torch.autograd.graph.increment_version(inputs[n])  # a backward that has saved it must not use it
        return output

    library.impl(full, kernel, "Autograd", with_keyset=True)


def refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    """NotImplementedError if one of the inputs carries a tangent of forward-mode differentiation."""
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp), expected no tangent")


# --- torch.vmap -----------------------------------------------------------------------------------------------------


def register_batching(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """The op's batching rule: one call per index of the mapped dimension; what is written is written through views."""
    name, arguments, returns = op._schema.name, op._schema.arguments, op._schema.returns

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        mapped = [isinstance(dim, int) for dim in in_dims]
        for argument, is_mapped in zip(arguments, mapped, strict=True):
            if argument.alias_info and argument.alias_info.is_write and not is_mapped:
                raise ValueError(f"{argument.name}: {name} writes into it, expected it to be mapped by torch.vmap too")
        if returns and info.batch_size == 0:
            raise NotImplementedError(f"{name} has no batching rule for torch.vmap over a dimension of size 0")
        outputs = [
            op(*(x.select(dim, n) if m else x for x, dim, m in zip(inputs, in_dims, mapped, strict=True)))
            for n in range(info.batch_size)
        ]
        if not returns:
            return None, None
        if len(returns) == 1:
            return torch.stack(outputs), 0
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(returns)

    torch.library.register_vmap(f"{op.namespace}::{_full(op)}", rule, lib=library)


# --- autocast -------------------------------------------------------------------------------------------------------


def register_autocast(library: torch.library.Library, op: torch._ops.OpOverload, rule: Rule | None) -> None:
    """The op under autocast: on what `rule` makes of its arguments, and with autocast off inside its kernel."""

    def kernel(autocast: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        cast = inputs if rule is None else rule(*inputs)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*cast)

    for key in _AUTOCAST.values():
        autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl(_full(op), partial(kernel, autocast), key)


def lowered(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating tensors in its dtype, as the factors of `F.linear` are; otherwise as they come."""
    device = tensors[0].device.type
    return cast_to(torch.get_autocast_dtype(device), *tensors) if autocasts(tensors[0]) else tensors


def cast_to(dtype: torch.dtype, *tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating tensors in this dtype; like PyTorch's, it leaves float64 alone."""
    if not autocasts(tensors[0]):
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device = x.device.type
    return device in _AUTOCAST and torch.is_autocast_enabled(device)

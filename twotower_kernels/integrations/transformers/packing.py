"""Experts whose layout the kernel does not read, packed once and in place, and back."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.integrations.transformers.experts import experts as experts_of
from twotower_kernels.integrations.transformers.swap import NotServed
from twotower_kernels.ops.moe_packing import pack_experts

_LAYOUT = "_twotower_layout"  # of a packed module: what its flags said before, and the handles of its hooks


def has_layout(module: torch.nn.Module) -> bool:
    """Whether it is a mixture of experts that says in which layout its weights are."""
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def is_packed(module: torch.nn.Module) -> bool:
    return hasattr(module, _LAYOUT)


def pack(module: Any) -> str:
    """Rebinds the parameters to the packed matrices, so that weights are held once, and the forward to `moe_experts`.

    Returns:
        What the layout was.

    Raises:
        NotServed: there is nothing to pack.
    """
    if is_packed(module):
        raise NotServed("it is packed already")
    if not module.is_transposed and module.is_concatenated:
        raise NotServed("its layout is served as it is")
    transposed, interleaved = module.is_transposed, module.has_gate and not module.is_concatenated
    up, down = _matrices(module)
    gate, plain = (up.data, None) if module.has_gate else (None, up.data)
    up.data, down.data = pack_experts(gate, plain, down.data, interleaved=interleaved, transposed=transposed)
    if module.has_bias and interleaved:
        bias = module.gate_up_proj_bias
        bias.data = torch.cat([bias.data[:, ::2], bias.data[:, 1::2]], 1)
    hooks = module.register_state_dict_pre_hook(_refuse), module.register_load_state_dict_pre_hook(_refuse)
    setattr(module, _LAYOUT, (transposed, module.is_concatenated, hooks))
    module.is_transposed, module.is_concatenated = False, True
    module.forward = partial(experts_of, module)
    layout = [word for word, said in (("transposed", transposed), ("interleaved", interleaved)) if said]
    return f"its layout was {' and '.join(layout)}"


def unpack(module: Any) -> None:
    """Parameters have their layout again, to the bit, and the module runs what is set."""
    transposed, concatenated, hooks = getattr(module, _LAYOUT)
    tensors = list(_matrices(module))
    if module.has_gate and not concatenated:
        halves = [tensors[0], module.gate_up_proj_bias] if module.has_bias else tensors[:1]
        for x in halves:
            x.data = torch.stack(x.data.chunk(2, 1), 2).flatten(1, 2)
    if transposed:
        for x in tensors:
            x.data = x.data.transpose(1, 2).contiguous()
    for hook in hooks:
        hook.remove()
    module.is_transposed, module.is_concatenated = transposed, concatenated
    del module.forward
    delattr(module, _LAYOUT)


def _matrices(module: Any) -> tuple[Tensor, Tensor]:
    return module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj


def _refuse(module: torch.nn.Module, *_: Any) -> None:
    kind = type(module).__name__
    raise ValueError(f"twotower replace: the weights of {kind} are packed; restore(model) gives them their layout")

"""Experts whose layout the kernel does not read, packed once and in place, and back."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels.integrations.transformers.experts import experts as experts_of
from twotower_kernels.ops.moe_packing import pack_experts

_LAYOUT = "_twotower_layout"  # of a packed module: what its flags said before, and the handles of its hooks


class Swap(NamedTuple):
    """What `replace` made of a module: its name in the model, whether it was swapped, and why or why not."""

    name: str
    swapped: bool
    why: str


def replace(model: torch.nn.Module, *, experts: bool = True) -> list[Swap]:
    """Packs a model's experts where `moe_experts` does not read their layout, as that of gpt-oss.

    Their parameters are rebound to the packed matrices, so that weights are held once, and the modules run
    `moe_experts` whatever implementation is set, until `restore`. Until then their `state_dict`, which would hold the
    packed layout, is refused. Call it after the weights were loaded and moved.

    Args:
        experts: whether to.

    Returns:
        A `Swap` for each mixture of experts.
    """
    found = []
    for name, module in model.named_modules():
        if not experts or not hasattr(module, "is_transposed") or not hasattr(module, "is_concatenated"):
            continue
        if hasattr(module, _LAYOUT):
            found.append(Swap(name, False, "it is packed already"))
        elif module.is_transposed or not module.is_concatenated:
            found.append(Swap(name, True, _pack(module)))
        else:
            found.append(Swap(name, False, "its layout is served as it is"))
    return found


def restore(model: torch.nn.Module) -> None:
    """Undoes `replace`: parameters have their layout again, to the bit, and modules run what is set."""
    for module in model.modules():
        if hasattr(module, _LAYOUT):
            _unpack(module)


def _pack(module: Any) -> str:
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


def _unpack(module: Any) -> None:
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

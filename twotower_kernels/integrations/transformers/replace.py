"""What `register` does not reach in a model of transformers: its norms, routers, mixers, experts and sampler."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from twotower_kernels.integrations.transformers import mixers as of_mixers
from twotower_kernels.integrations.transformers import norms as of_norms
from twotower_kernels.integrations.transformers import packing
from twotower_kernels.integrations.transformers import routers as of_routers
from twotower_kernels.integrations.transformers.decoder_cache import has_append, restore_append, swap_append
from twotower_kernels.integrations.transformers.sampler import has_sampler, restore_sampler, swap_sampler
from twotower_kernels.integrations.transformers.stand_in import kind_of
from twotower_kernels.integrations.transformers.swap import (
    NotServed,
    Swap,
    is_swapped,
    refuse_own_forwards,
    swap_forward,
    unswap_forward,
)
from twotower_kernels.integrations.transformers.unreached import is_unreached, why_unreached


class _Part(NamedTuple):
    """A kind of module, how one is looked at, which says what its forward becomes or raises NotServed, and why."""

    is_one: Callable[[nn.Module], bool]
    look_at: Callable[[nn.Module], tuple[tuple[Any, ...], str]]


def _look_at_mixer(module: nn.Module) -> tuple[tuple[Any, ...], str]:
    form = of_mixers.mixer_of(module)
    return (of_mixers.mixer, form), form.why


def _look_at_norm(module: nn.Module) -> tuple[tuple[Any, ...], str]:
    form = of_norms.norm_of(module)
    return (of_norms.norm, form), form.why


def _look_at_router(module: nn.Module) -> tuple[tuple[Any, ...], str]:
    return (of_routers.router_of(module),), "moe_gate and moe_route"


_MIXERS = _Part(of_mixers.is_mixer, _look_at_mixer)
_NORMS = _Part(of_norms.is_norm, _look_at_norm)
_ROUTERS = _Part(of_routers.is_router, _look_at_router)


def replace(
    model: nn.Module,
    *,
    norms: bool = True,
    routers: bool = True,
    mixers: bool = True,
    experts: bool = True,
    sampler: bool = True,
) -> list[Swap]:
    """Has a model's norms, routers and Mamba-2 mixers run these kernels, and DiffusionGemma's `generate` this sampler;
    packs experts where `moe_experts` does not read their layout, as that of gpt-oss. DiffusionGemma's decoder writes
    its canvas into a `BlockCache` in place.

    A module is known by its class and then tried out: a copy of its sizes, with random weights, has to give what the
    kernels give. What is not known, or gives something else, is left as it is and named. Modules, hooks and the keys of
    `state_dict` stay; forwards are replaced, whose backward raises where an op has no gradient. Experts that were
    packed run `moe_experts` whatever implementation is set, and until `restore` their `state_dict`, which would hold
    the packed layout, is refused. Call it after the weights were loaded and moved.

    Args:
        norms: RMSNorms, and the gated ones of Mamba-2 outside of mixers that are swapped.
        routers: of mixtures of experts.
        mixers: Mamba-2 layers, from projection to projection.
        experts: whether to pack.
        sampler: of DiffusionGemma.

    Returns:
        A `Swap` for each module that was considered, and for each layer of attention that `set_attn_implementation`
        does not reach.
    """
    parts = [part for part, wanted in ((_MIXERS, mixers), (_ROUTERS, routers), (_NORMS, norms)) if wanted]
    swaps: list[Swap] = []
    proven: dict[str, Any] = {}
    inside: dict[nn.Module, str] = {}  # parts of mixers that are swapped
    for name, module in model.named_modules():
        for part in parts:
            if part.is_one(module):
                swap = _left(name, inside[module]) if module in inside else _swapped(name, module, part, proven)
                swaps.append(swap)
                if part is _MIXERS and is_swapped(module):
                    inside |= dict.fromkeys(list(module.modules())[1:], f"{name} computes it")
                break
        if experts and packing.has_layout(module):
            swaps.append(_packed(name, module))
        if sampler and has_sampler(module):
            swaps.append(_with_sampler(f"{name}.generate".lstrip("."), module))
        if has_append(module):
            swaps.append(Swap(f"{name}.append_to_cache", True, swap_append(module)))
        if is_unreached(module):
            swaps.append(_left(name, why_unreached(module)))
    return swaps


def restore(model: nn.Module) -> None:
    """Undoes `replace`: modules run their own forward, and parameters have their layout again, to the bit."""
    for module in model.modules():
        if packing.is_packed(module):
            packing.unpack(module)
        elif is_swapped(module):
            unswap_forward(module)
        restore_sampler(module)
        restore_append(module)


def _left(name: str, why: str) -> Swap:
    return Swap(name, False, why)


def _swapped(name: str, module: nn.Module, part: _Part, proven: dict[str, Any]) -> Swap:
    if is_swapped(module):
        return _left(name, "it is swapped already")
    try:
        refuse_own_forwards(module)
    except NotServed as error:
        return _left(name, str(error))
    forward, why = _looked_at(module, part, proven)
    if forward:
        swap_forward(module, *forward)
    return Swap(name, bool(forward), why)


def _looked_at(module: nn.Module, part: _Part, proven: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
    """What `look_at` says, once for all modules of a kind; no forward where it is left."""
    kind = kind_of(module)
    if kind not in proven:
        try:
            proven[kind] = part.look_at(module)
        except NotServed as error:
            proven[kind] = (), str(error)
    return proven[kind]


def _packed(name: str, module: nn.Module) -> Swap:
    try:
        return Swap(name, True, packing.pack(module))
    except NotServed as error:
        return _left(name, str(error))


def _with_sampler(name: str, module: nn.Module) -> Swap:
    try:
        return Swap(name, True, swap_sampler(module))
    except NotServed as error:
        return _left(name, str(error))

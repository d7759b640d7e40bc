"""RMSNorms of transformers as `rms_norm` and `gated_rms_norm`: which of their forms one has is found by computing."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower_kernels.integrations.transformers.stand_in import near, run, stand_in
from twotower_kernels.integrations.transformers.swap import NotServed
from twotower_kernels.ops.adaln import rms_norm
from twotower_kernels.ops.mamba2 import gated_rms_norm

_EPS = ("variance_epsilon", "eps", "norm_eps", "epsilon")  # names under which norms keep it
_ROUNDED_ALIKE = 0.02  # of the numbers in bfloat16; rounding once instead of twice changes about a quarter
_EXACT = 1e-5  # in float32


class Norm(NamedTuple):
    """The form of a norm.

    weight: "none", "plain", or "one_more" where 1 + weight multiplies, as in Gemma.
    round_first: what is normalised is rounded before the weight multiplies it, as in Llama.
    groups: of channels, 0 for a norm that takes no gate.
    mixed: whether it holds for a weight in float32 and activations in bfloat16 too.
    """

    eps: float
    weight: str
    round_first: bool
    groups: int = 0
    mixed: bool = True

    @property
    def why(self) -> str:
        name = "gated_rms_norm" if self.groups else "rms_norm"
        weight = {"none": " without a weight", "plain": "", "one_more": " of 1 + weight"}[self.weight]
        return f"{name}{weight}{', rounded first' if self.round_first else ''}"


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(module.children())


def norm_of(module: nn.Module) -> Norm:
    """The form that gives the numbers of the module's own forward, in float32 and in bfloat16.

    Raises:
        NotServed: no form does.
    """
    kind = type(module).__name__
    eps = next((x for name in _EPS if isinstance(x := getattr(module, name, None), float)), None)
    weights = dict(module.named_parameters())
    shape = getattr(module, "normalized_shape", (1,))  # of torch.nn.RMSNorm
    if eps is None or not set(weights) <= {"weight"} or any(x.ndim != 1 for x in weights.values()) or len(shape) != 1:
        raise NotServed(f"{kind} is not an RMSNorm with an eps and at most a weight [H]")
    copies = {dtype: stand_in(module, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for form in _forms(module, eps, bool(weights)):
        if all(_agrees(copy, form, dtype) for dtype, copy in copies.items()):
            return form._replace(mixed=_agrees(copies[torch.float32], form, torch.bfloat16))
    raise NotServed(f"{kind} computes something else than an RMSNorm")


def norm(module: nn.Module, form: Norm, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """The forward of a norm.

    Raises:
        NotImplementedError: a gate where there was none or none where there was one; a weight of another dtype than the
            activations', where the original mixes them otherwise.
    """
    weight: Tensor | None = getattr(module, "weight", None) if form.weight != "none" else None
    if (gate is None) != (form.groups == 0):
        raise NotImplementedError(f"twotower {type(module).__name__}: expected {'a' if form.groups else 'no'} gate")
    if weight is not None and weight.dtype != hidden_states.dtype and not form.mixed:
        dtypes = f"{weight.dtype} with activations in {hidden_states.dtype}"
        raise NotImplementedError(f"twotower {type(module).__name__}: a weight in {dtypes} is not served")
    if gate is not None:
        return _gated(hidden_states, gate, weight, form)
    if weight is None:
        return rms_norm(hidden_states, eps=form.eps)
    if form.weight == "one_more":
        return rms_norm(hidden_states, 1.0 + weight.float(), eps=form.eps)
    if form.round_first and weight.dtype != hidden_states.dtype:  # the product is as wide as the wider
        return weight * rms_norm(hidden_states, eps=form.eps)
    return rms_norm(hidden_states, weight, eps=form.eps, round_first=form.round_first)


def _gated(hidden_states: Tensor, gate: Tensor, weight: Tensor | None, form: Norm) -> Tensor:
    if weight is not None and not form.round_first:
        return gated_rms_norm(hidden_states, gate, weight, n_groups=form.groups, eps=form.eps)
    ones = hidden_states.new_ones(hidden_states.shape[-1:])
    normed = gated_rms_norm(hidden_states, gate, ones, n_groups=form.groups, eps=form.eps)
    return normed if weight is None else weight * normed


def _forms(module: nn.Module, eps: float, weighted: bool) -> list[Norm]:
    if "Gated" in type(module).__name__:
        size, groups = getattr(module, "group_size", None), getattr(module, "n_groups", 1)
        groups = groups if size is None else _channels(module) // size
        return [Norm(eps, "plain" if weighted else "none", round_first, groups) for round_first in (True, False)]
    if not weighted:
        return [Norm(eps, "none", False)]
    return [Norm(eps, *form) for form in (("plain", True), ("plain", False), ("one_more", False))]


def _channels(module: nn.Module) -> int:
    """Those of the weight, or of `torch.nn.RMSNorm`; else any number will do."""
    (channels,) = getattr(module, "normalized_shape", (48,))
    return next((x.shape[0] for x in module.parameters()), channels)


def _agrees(copy: nn.Module, form: Norm, dtype: torch.dtype) -> bool:
    """Rows of ordinary numbers, and of some as small as the eps."""
    generator = torch.Generator().manual_seed(1)
    shape = 2, 32, _channels(copy)
    size = torch.logspace(-3, 1, 32)[:, None]
    inputs = [(torch.randn(shape, generator=generator) * size).to(dtype)]
    if form.groups:
        inputs.append(torch.randn(shape, generator=generator).to(dtype))
    wanted, found = run(type(copy).__name__, copy.forward, *inputs), norm(copy, form, *inputs)
    if dtype == torch.float32:
        return isinstance(wanted, Tensor) and near(found, wanted, _EXACT)
    return found.dtype == wanted.dtype and bool((found != wanted).float().mean() < _ROUNDED_ALIKE)

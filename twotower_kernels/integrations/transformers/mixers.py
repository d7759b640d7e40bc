"""Mamba-2 mixers of transformers over `mamba2_scan` and `gated_rms_norm`, with the states in transformers' caches."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from twotower_kernels.integrations.transformers.norms import norm_of
from twotower_kernels.integrations.transformers.stand_in import near, run, stand_in
from twotower_kernels.integrations.transformers.swap import NotServed
from twotower_kernels.ops.linear import linear
from twotower_kernels.ops.mamba2 import gated_rms_norm, mamba2_scan

_KNOWN = {
    *("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer"),
    "Zamba2MambaMixer",
}
_HARMLESS = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
_FEW_ROWS = 32  # up to which `linear` was the faster product on a CPU
_EXACT = 1e-4  # of the largest number, in float32


class Mixer(NamedTuple):
    """norm: "gated", "none" where SiLU(gate) multiplies and that is all, or "own", the module's."""

    norm: str
    eps: float = 0.0

    @property
    def why(self) -> str:
        return f"mamba2_scan{' and gated_rms_norm' if self.norm == 'gated' else ''}"


def is_mixer(module: nn.Module) -> bool:
    return hasattr(module, "A_log") and hasattr(module, "conv1d")


def mixer_of(module: nn.Module) -> Mixer:
    """The form that gives the results and states of the module's own forward.

    Tried are a prompt padded on the left, a token after it, several tokens after that, and a call without a cache.

    Raises:
        NotServed: it is not a known Mamba-2 mixer, or computes something else here.
    """
    kind = type(module).__name__
    if kind not in _KNOWN:
        raise NotServed(f"{kind} is not a known Mamba-2 mixer")
    if module.activation not in ("silu", "swish"):
        raise NotServed(f"{kind}: activation {module.activation} is not served")
    form, copy = _form(module), stand_in(module, torch.float32)
    copy.layer_idx = 0
    wanted, found = (
        run(kind, _tried, forward, module.hidden_size) for forward in (copy.forward, partial(mixer, copy, form))
    )
    if not all(near(x, y, _EXACT) for x, y in zip(found, wanted, strict=True)):
        raise NotServed(f"{kind} computes something else than the mixer of that name")
    return form


def mixer(
    self: Any,
    form: Mixer,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """The forward of a mixer.

    Args:
        hidden_states: `[B, L, H]`.
        cache_params: of transformers; its layer holds the last W columns before the convolution, `[B, C, W]`, and the
            state `[B, heads, head_dim, state]`. Both are written in place.
        attention_mask: `[B, L]`, 0 for padding, at the ends of rows only; for one token over a state, None.
        others: known to change nothing, or None or False.

    Returns:
        `[B, L, H]`.

    Raises:
        NotImplementedError: holes in a row's mask, packed sequences, whatever else is not known.
    """
    for name, given in others.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise NotImplementedError(f"twotower mixer: {name} is not served, got {type(given).__name__}")
    states = _states(self, cache_params)
    gate, xbc, dt = _projected(self, hidden_states, attention_mask)
    limits = self.time_step_limit
    if states.ssm is not None and hidden_states.shape[1] == 1:
        limits = 0.0, math.inf  # the original's recurrent form does not clamp the step
    if attention_mask is None:
        y, ssm = _scan(self, xbc, dt, states, limits)
    else:
        y, ssm = _scan_padded(self, xbc, dt, states, limits, attention_mask)
    if cache_params is not None:
        cache_params.update_conv_state(xbc.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        cache_params.update_recurrent_state(ssm, layer_idx=self.layer_idx)
    if form.norm == "gated":
        y = gated_rms_norm(y, gate, self.norm.weight, n_groups=self.n_groups, eps=form.eps)
    else:
        y = self.norm(y, gate) if form.norm == "own" else y * nn.functional.silu(gate)
    return _linear(self.out_proj, y.to(hidden_states.dtype))


def _tried(forward: Callable[..., Tensor], hidden_size: int) -> list[Tensor]:
    """Results and last states of a forward."""
    x = torch.randn(2, 9, hidden_size, generator=torch.Generator().manual_seed(1))
    padding, cache = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]), Cache(layers=[LinearAttentionLayer()])
    results = [
        forward(x),
        forward(x[:, :5], cache_params=cache, attention_mask=padding),
        forward(x[:, 5:6], cache_params=cache),
        forward(x[:, 6:], cache_params=cache),
    ]
    states: list[Any] = [cache.get_conv_state(0), cache.get_recurrent_state(0)]
    return results + states


def _form(module: Any) -> Mixer:
    if isinstance(module.norm, nn.Identity):
        return Mixer("none")
    try:
        found = norm_of(module.norm)
    except NotServed:
        return Mixer("own")
    return Mixer("gated", found.eps) if found.groups == module.n_groups else Mixer("own")


def _projected(self: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
    """By one product: the gate `[B, L, I]`, what is convolved `[B, L, C]`, and the steps `[B, L, heads]`."""
    if attention_mask is not None:
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    if (multiplier := getattr(self, "ssm_in_multiplier", None)) is not None:  # Falcon-H1
        hidden_states = hidden_states * multiplier
    projected = _linear(self.in_proj, hidden_states)
    if (multipliers := getattr(self, "mup_vector", None)) is not None:
        projected = projected * multipliers
    return projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer itself, and its product by `linear` where rows are few and it is no more than a product."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if x.shape[:-1].numel() <= _FEW_ROWS and isinstance(layer, nn.Linear) and type(layer) is nn.Linear and not hooked:
        return linear(x, layer.weight, layer.bias)
    return layer(x)


class _States(NamedTuple):
    """What a block starts from, None at a text's beginning, and whether the states after it are wanted."""

    conv: Tensor | None  # [B, C, W-1]
    ssm: Tensor | None  # [B, heads, head_dim, state]
    keep: bool


def _states(self: Any, cache: Any) -> _States:
    if cache is None:
        return _States(None, None, False)
    conv = cache.get_conv_state(self.layer_idx)
    if conv is not None:  # W columns, or more where a cache records its past
        conv = conv[:, :, conv.shape[2] - self.conv_kernel_size + 1 :]
    return _States(conv, cache.get_recurrent_state(self.layer_idx), True)


def _scan(
    self: Any,
    xbc: Tensor,
    dt: Tensor,
    states: _States,
    limits: tuple[float, float],
    seq_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, where it is wanted, the state after the last token."""
    result = mamba2_scan(
        xbc,
        dt,
        self.conv1d.weight,
        self.conv1d.bias,
        self.A_log,
        self.D,
        self.dt_bias,
        n_groups=self.n_groups,
        head_dim=self.head_dim,
        conv_state=states.conv,
        ssm_state=states.ssm,
        seq_lens=seq_lens,
        time_step_limit=limits,
        return_states=states.keep,
    )
    return (result[0], result[2]) if isinstance(result, tuple) else (result, None)


def _scan_padded(
    self: Any, xbc: Tensor, dt: Tensor, states: _States, limits: tuple[float, float], attention_mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same of rows with padding at their ends: moved to the left, scanned, moved back; padding gets y = 0.

    As in the original, the convolution sees what was projected of the padding before a row's first token, which in a
    layer with a bias is not 0, and padding lets a state decay.
    """
    batch, tokens, channels = xbc.shape
    positions, rows = torch.arange(tokens, device=xbc.device), torch.arange(batch, device=xbc.device)[:, None]
    real = attention_mask.bool()
    lens = real.sum(1)
    starts = torch.where(lens == 0, tokens, real.int().argmax(1))[:, None]
    ends = starts + lens[:, None]
    _refuse_holes((((positions >= starts) & (positions < ends)) != real).any())
    past = self.conv_kernel_size - 1
    before = xbc.new_zeros(batch, past, channels) if states.conv is None else states.conv.transpose(1, 2)
    window = torch.arange(past, device=xbc.device) + starts
    conv = torch.cat([before.to(xbc.dtype), xbc], 1)[rows, window].transpose(1, 2)
    ssm = _decayed(self, states.ssm, dt, positions < starts, limits)
    moved = (positions + starts).clamp(max=tokens - 1)
    y, ssm = _scan(self, xbc[rows, moved], dt[rows, moved], _States(conv, ssm, states.keep), limits, lens)
    y = y[rows, (positions - starts).clamp(min=0)] * real[:, :, None].to(y.dtype)
    return y, _decayed(self, ssm, dt, positions >= ends, limits)


def _decayed(self: Any, ssm: Tensor | None, dt: Tensor, where: Tensor, limits: tuple[float, float]) -> Tensor | None:
    """A state after the steps of tokens `where` `[B, L]` that add nothing to it."""
    if ssm is None:
        return None
    steps = nn.functional.softplus(dt.float() + self.dt_bias.float()).clamp(*limits)  # [B, L, heads]
    passed = (steps * where[:, :, None]).sum(1)
    return ssm * torch.exp(-torch.exp(self.A_log.float()) * passed)[:, :, None, None]


def _refuse_holes(holes: Tensor) -> None:
    text = "twotower mixer: expected an attention_mask with padding at the ends of rows only, got one with holes"
    if torch.compiler.is_compiling() or (holes.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(~holes, text)
    elif holes:
        raise NotImplementedError(text)

"""Mamba-2: convolution, SiLU and selective scan; the gated norm. Formulas: `reference/mamba2.py`; kernels:
`csrc/cpu/mamba2.cpp`, `triton/mamba2.py`."""

import math

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import as_index, check_floats, check_index, define, same_device
from twotower_kernels.ops._traced import call
from twotower_kernels.options.arguments import real, whole


def mamba2_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    *,
    n_groups: int,
    head_dim: int,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    state_index: Tensor | None = None,
    seq_lens: Tensor | None = None,
    time_step_limit: tuple[float, float] = (0.0, math.inf),
    return_states: bool = False,
    states_every: int = 0,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Causal depthwise convolution, SiLU and selective scan of a block of tokens, seeded by a state.

    Source: Mamba-2 (arXiv 2405.21060, section 6: the chunk's closed form). The convolution's output and the SiLU's
    are each rounded to the dtype of `xbc`; steps, scan and states are float32 (float64 for float64).

    Args:
        xbc: `[B, L, C]`, C = heads·head_dim + 2·n_groups·state, laid out `[x | B | C]`; any L ≥ 0; float64, float32,
            bfloat16 or float16; any strides, such as a slice of a projection's output.
        dt: `[B, L, heads]`, before bias and softplus; any of these dtypes, as everything below that is not an index.
        conv_weight: `[C, W]`, or `[C, 1, W]` as in checkpoints; any W ≥ 1. conv_bias: `[C]` or None.
        a_log, d, dt_bias: `[heads]`.
        n_groups: of B and C; head j reads group ⌊j·n_groups/heads⌋.
        head_dim: channels of `x` per head.
        conv_state: `[Bc, C, W-1]`, the last W-1 columns of `xbc` before the block, newest last; zeros if None.
        ssm_state: `[Bc, heads, head_dim, state]`; zeros if None.
        state_index: `[B]` integers, the state row that each row starts from; None: the row itself (Bc = B).
        seq_lens: `[B]` integers in [0, L]. Tokens beyond are not read, y is 0 there, states are taken there.
        time_step_limit: what softplus(dt + dt_bias) is clamped to.
        return_states: also return the states after the last token. Without it, none is written. On a CPU, a row of at
            most 64 tokens then goes token by token: y and states are, to the bit, those of its tokens in calls of one.
        states_every: S > 0: return the states after every S tokens, and after the last, shorter block, instead.

    Returns:
        y `[B, L, heads·head_dim]` in the dtype of `xbc`. With states `(y, conv, ssm)`: conv `[B, C, W-1]` in the dtype
        of `xbc`, ssm `[B, heads, head_dim, state]` float32 (float64); with `states_every`, `[B, ⌈L/S⌉, ...]` of each.
        States are new tensors. Autocast changes nothing: a state keeps its digits. Not differentiable.

    Raises:
        ValueError: shapes that do not fit, another device, `seq_lens` outside [0, L], `state_index` outside the states
            (the last two before anything is computed). TypeError: wrong dtype.
    """
    if conv_weight.ndim == 3 and conv_weight.shape[1] == 1:
        conv_weight = conv_weight.squeeze(1)
    n_groups, head_dim = whole("n_groups", n_groups), whole("head_dim", head_dim)
    states_every = whole("states_every", states_every)
    low, high = (real("time_step_limit", limit) for limit in time_step_limit)
    y, conv, ssm = call("mamba2_scan", 
        xbc, dt, conv_weight, conv_bias, a_log, d, dt_bias, n_groups, head_dim, conv_state, ssm_state,
        as_index(state_index), as_index(seq_lens), low, high, return_states, states_every,
    )  # fmt: skip
    return (y, conv, ssm) if return_states or states_every else y


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    """RMSNorm of `y · SiLU(z)` within each of `n_groups` contiguous groups of channels, times weight.

    Source: Mamba-2 (arXiv 2405.21060), the norm before the output projection; the gate comes before the norm.

    Args:
        y: `[..., D]`, D divisible by `n_groups`; float64, float32, bfloat16 or float16; any strides.
        z: `[..., D]`, the gate before SiLU; any of these dtypes.
        weight: `[D]`, any of these dtypes.
        n_groups: groups of channels that are normed apart.
        eps: added to the mean square.

    Returns:
        `[..., D]` in the dtype of `y`, rounded once, under autocast too. Not differentiable.

    Raises:
        ValueError: shapes that do not fit, another device. TypeError: wrong dtype.
    """
    n_groups, eps = whole("n_groups", n_groups), real("eps", eps)
    if y.ndim == 3:
        return call("gated_rms_norm", y, z, weight, n_groups, eps)
    _check_channels(y, z, weight)  # here already, for their shapes as they were given
    rows = (1, y.shape[:-1].numel(), y.shape[-1])
    return call("gated_rms_norm", y.reshape(rows), z.reshape(rows), weight, n_groups, eps).reshape(y.shape)


# --- registration ---------------------------------------------------------------------------------------------------


def _check_scan(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    n_groups: int, head_dim: int, conv_state: Tensor | None, ssm_state: Tensor | None, state_index: Tensor | None,
    seq_lens: Tensor | None, dt_min: float, dt_max: float, return_states: bool, states_every: int,
) -> None:  # fmt: skip
    _check_sizes(xbc, dt, conv_weight, n_groups, head_dim)
    if states_every < 0:
        raise ValueError(f"states_every: expected 0 or more, got {states_every}")
    (batch, _, channels), heads = xbc.shape, dt.shape[2]
    state = (channels - heads * head_dim) // (2 * n_groups)
    vectors = {"conv_bias": conv_bias, "a_log": a_log, "d": d, "dt_bias": dt_bias}
    for name, vector in vectors.items():
        _check_shape(name, vector, [channels if name == "conv_bias" else heads])
    indices = {"state_index": state_index, "seq_lens": seq_lens}
    for name, index in indices.items():
        _check_shape(name, index, [batch])
    check_index(**indices)
    rows = None if state_index is not None else batch
    _check_shape("conv_state", conv_state, [rows, channels, conv_weight.shape[1] - 1])
    _check_shape("ssm_state", ssm_state, [rows, heads, head_dim, state])
    floats = {"xbc": xbc, "dt": dt, "conv_weight": conv_weight, "conv_state": conv_state, "ssm_state": ssm_state}
    floats |= vectors
    check_floats(xbc, **floats)
    same_device(xbc, **indices)


def _check_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> None:
    if y.ndim != 3:
        raise ValueError(f"y: expected [B, L, D], got {list(y.shape)}")
    _check_channels(y, z, weight)
    if n_groups < 1 or y.shape[-1] % n_groups:
        raise ValueError(f"n_groups: expected a divisor of {y.shape[-1]} channels, got {n_groups}")
    check_floats(y, y=y, z=z, weight=weight)


def _check_channels(y: Tensor, z: Tensor, weight: Tensor) -> None:
    if z.shape != y.shape:
        raise ValueError(f"z: expected the shape of y {list(y.shape)}, got {list(z.shape)}")
    if y.ndim == 0 or weight.shape != y.shape[-1:]:
        raise ValueError(f"weight: expected [D] for y [..., D], got {list(weight.shape)} for {list(y.shape)}")


def _check_sizes(xbc: Tensor, dt: Tensor, conv_weight: Tensor, n_groups: int, head_dim: int) -> None:
    if xbc.ndim != 3:
        raise ValueError(f"xbc: expected [B, L, C], got {list(xbc.shape)}")
    if dt.ndim != 3 or dt.shape[:2] != xbc.shape[:2]:
        raise ValueError(f"dt: expected [B, L, heads] for xbc {list(xbc.shape)}, got {list(dt.shape)}")
    channels, heads = xbc.shape[2], dt.shape[2]
    for name, size in (("n_groups", n_groups), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
    if heads % n_groups:
        raise ValueError(f"n_groups: expected a divisor of {heads} heads, got {n_groups}")
    states = channels - heads * head_dim  # of all groups, B and C
    if states % (2 * n_groups) or states < 2 * n_groups:
        raise ValueError(
            f"xbc: expected heads·head_dim + 2·n_groups·state channels, got {channels} "
            f"with heads {heads}, head_dim {head_dim}, n_groups {n_groups}"
        )
    if conv_weight.ndim != 2 or conv_weight.shape[0] != channels or conv_weight.shape[1] < 1:
        raise ValueError(f"conv_weight: expected [{channels}, W], got {list(conv_weight.shape)}")


def _check_shape(name: str, tensor: Tensor | None, shape: list[int | None]) -> None:
    """ValueError unless the tensor, if there is one, has this shape; None stands for any size."""
    if tensor is None:
        return
    got = tensor.shape
    fits = list(got) == shape or (
        len(got) == len(shape) and all(m is None or m == n for n, m in zip(got, shape, strict=True))
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")


def _outputs(
    xbc: Tensor, dt: Tensor, past: int, n_groups: int, head_dim: int, return_states: bool, states_every: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = xbc.shape
    heads = dt.shape[2]
    wide = torch.float64 if xbc.dtype == torch.float64 else torch.float32
    y = xbc.new_empty(batch, length, heads * head_dim)
    if not return_states and not states_every:
        return y, xbc.new_empty(0), xbc.new_empty(0, dtype=wide)
    rows = [batch, (length + states_every - 1) // states_every] if states_every else [batch]
    state = (channels - heads * head_dim) // (2 * n_groups)
    ssm = xbc.new_empty([*rows, heads, head_dim, state], dtype=wide)
    return y, xbc.new_empty([*rows, channels, past]), ssm


def _check_range(name: str, index: Tensor | None, low: int, high: int) -> None:
    if index is None or index.numel() == 0 or cpu.is_recording():
        return
    least, most = (int(value) for value in index.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: expected values in [{low}, {high}], got {least if least < low else most}")


def _mamba2_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    n_groups: int,
    head_dim: int,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    state_index: Tensor | None,
    seq_lens: Tensor | None,
    dt_min: float,
    dt_max: float,
    return_states: bool,
    states_every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_range("seq_lens", seq_lens, 0, xbc.shape[1])
    for seed in (conv_state, ssm_state):
        if seed is not None:
            _check_range("state_index", state_index, 0, seed.shape[0] - 1)
    past = conv_weight.shape[1] - 1
    outputs = _outputs(xbc, dt, past, n_groups, head_dim, return_states, states_every)
    y, conv, ssm = outputs
    # To the kernel, states are always one per block of tokens.
    blocks: list[Tensor | None] = [None, None]
    if states_every:
        blocks = [conv, ssm]
    elif return_states:
        blocks = [conv.unsqueeze(1), ssm.unsqueeze(1)]
    cpu.call(
        "mamba2_scan", xbc, dt, conv_weight, conv_bias, a_log, d, dt_bias, conv_state, ssm_state, state_index, seq_lens,
        y, *blocks, n_groups, head_dim, states_every, dt_min, dt_max,
    )  # fmt: skip
    return outputs


def _fake_mamba2_scan(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    n_groups: int, head_dim: int, conv_state: Tensor | None, ssm_state: Tensor | None, state_index: Tensor | None,
    seq_lens: Tensor | None, dt_min: float, dt_max: float, return_states: bool, states_every: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(xbc, dt, conv_weight.shape[1] - 1, n_groups, head_dim, return_states, states_every)


def _gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    cpu.call("gated_rms_norm", y, z, weight, out, n_groups, eps)
    return out


define(
    "mamba2_scan(Tensor xbc, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor a_log, Tensor d, Tensor dt_bias, "
    "SymInt n_groups, SymInt head_dim, Tensor? conv_state, Tensor? ssm_state, Tensor? state_index, Tensor? seq_lens, "
    "float dt_min, float dt_max, bool return_states, SymInt states_every) -> (Tensor, Tensor, Tensor)",
    check=_check_scan,
    cpu=_mamba2_scan,
    cuda="triton.mamba2:mamba2_scan",
    fake=_fake_mamba2_scan,
)
define(
    "gated_rms_norm(Tensor y, Tensor z, Tensor weight, SymInt n_groups, float eps) -> Tensor",
    check=_check_norm,
    cpu=_gated_rms_norm,
    cuda="triton.mamba2_norm:gated_rms_norm",
    fake=lambda y, *_: y.new_empty(y.shape),
)

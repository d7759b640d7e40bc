"""The Mamba-2 mixer's core: causal depthwise convolution, SiLU, selective state-space scan, gated RMSNorm.

With `xbc` the projected input and, per head, `A = -exp(a_log)` and `Δ = clamp(softplus(dt + dt_bias))`:

    u     = SiLU(conv(xbc) + conv_bias)            depthwise, causal, width W, seeded by the last W-1 inputs
    x,B,C = split(u)                               x [heads, head_dim]; B, C [groups, state]; head j: group ⌊j·G/heads⌋
    s_t   = exp(Δ_t·A)·s_{t-1} + Δ_t · x_t ⊗ B_t   s [head_dim, state]
    y_t   = s_t·C_t + D·x_t

Unrolled over a chunk that starts in state s₀, with a_t = Σ_{i≤t} Δ_i·A, this is the closed form

    y = exp(a)·(C·s₀) + tril((C Bᵀ) ∘ exp(a_t - a_u) ∘ Δ_u)·x + D·x         (Mamba-2 / SSD, arXiv 2405.21060, sec. 6)

so the scan is one pass of small matrix products per chunk and a short loop that hands the state from chunk to chunk.
Scan and state are float32 (float64 for float64 inputs) whatever the activations' dtype: states reach 1e3.
The convolution's output and the SiLU's are each rounded to the activations' dtype, as when the model was trained.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 16  # tokens per closed-form chunk; any value gives the same result up to rounding


def _segment_sums(a: Tensor) -> Tensor:
    """`[..., L] -> [..., L, L]` with entry (t, u) = Σ_{u<i≤t} a_i, and -∞ above the diagonal.

    Summed directly rather than as a difference of running sums, which would cancel when |a| is large.
    """
    length = a.shape[-1]
    after = torch.ones(length, length, dtype=torch.bool, device=a.device).tril(-1)
    rows = a[..., :, None].expand(*a.shape, length).masked_fill(~after, 0)  # (i, u): a_i where i > u
    return rows.cumsum(-2).masked_fill(
        ~after.logical_or(torch.eye(length, dtype=torch.bool, device=a.device)), -math.inf
    )


def _scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence `s ← exp(log_decay)·s + x ⊗ b`, `y = s·c`, in chunks.

    Args:
        x: `[B, N, L, h, p]`, N chunks of L tokens, already multiplied by Δ.
        log_decay: `[B, N, L, h]`, Δ·A.
        b, c: `[B, N, L, h, n]`.
        state: `[B, h, p, n]`, before the first chunk.

    Returns:
        y `[B, N, L, h, p]`, the states before every chunk `[B, N, h, p, n]`, and the state after the last.
    """
    log_decay = log_decay.transpose(-1, -2)  # [B, N, h, L]
    within = _segment_sums(log_decay).exp()  # [B, N, h, L, L]: decay from token u to token t
    total = log_decay.sum(-1).exp()  # [B, N, h]
    scores = torch.einsum("zklhn,zkmhn->zkhlm", c, b) * within
    y = torch.einsum("zkhlm,zkmhp->zklhp", scores, x)
    added = torch.einsum("zkhm,zkmhp,zkmhn->zkhpn", within[..., -1, :], x, b)  # what each chunk adds to the state
    before = []
    for chunk in range(x.shape[1]):
        before.append(state)
        state = total[:, chunk, :, None, None] * state + added[:, chunk]
    seeds = torch.stack(before, 1)  # [B, N, h, p, n]
    y = y + torch.einsum("zklhn,zkhpn,zkhl->zklhp", c, seeds, log_decay.cumsum(-1).exp())
    return y, seeds, state


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
    """Convolution, SiLU and selective scan of a token block, seeded by a state (arXiv 2405.21060).

    Args:
        xbc: `[B, L, C]`, C = heads·head_dim + 2·n_groups·state, laid out `[x | B | C]`; any L ≥ 0.
        dt: `[B, L, heads]`, before bias and softplus.
        conv_weight: `[C, W]` (or `[C, 1, W]`, as in checkpoints). conv_bias: `[C]` or None.
        a_log, d, dt_bias: `[heads]`.
        conv_state: `[Bc, C, W-1]`, the last W-1 columns of `xbc` before the block, newest last; zeros if None.
        ssm_state: `[Bc, heads, head_dim, state]`, zeros if None.
        state_index: `[B]` integers, the state row that each batch row starts from; the row itself if None.
        seq_lens: `[B]` integers in [0, L]: tokens beyond touch nothing, states are taken there, y is 0 there.
        time_step_limit: clamp of Δ.
        return_states: also return the states after the last token.
        states_every: if S > 0, return the states after every S tokens (and after the last, shorter block) instead.

    Returns:
        y `[B, L, heads·head_dim]` in the dtype of `xbc`; with states, also conv `[B, C, W-1]` (dtype of `xbc`) and
        ssm `[B, heads, head_dim, state]` (float32, or float64), with `states_every` `[B, ⌈L/S⌉, ...]` of each.

    Raises:
        ValueError: shapes that do not fit, `seq_lens` outside [0, L], `state_index` outside the states, negative
            `states_every`.
    """
    if xbc.dim() != 3 or dt.dim() != 3 or xbc.shape[:2] != dt.shape[:2]:
        raise ValueError(f"xbc, dt: expected [B, L, C] and [B, L, heads], got {tuple(xbc.shape)} and {tuple(dt.shape)}")
    batch, length, channels = xbc.shape
    heads = dt.shape[-1]
    inner = heads * head_dim
    if n_groups < 1:
        raise ValueError(f"n_groups: expected 1 or more, got {n_groups}")
    state_size, odd = divmod(channels - inner, 2 * n_groups)
    if odd or state_size < 1 or heads % n_groups:
        raise ValueError(
            f"xbc: {channels} channels are not heads·head_dim + 2·n_groups·state "
            f"with heads {heads}, head_dim {head_dim}, n_groups {n_groups}"
        )
    if states_every < 0:
        raise ValueError(f"states_every: expected 0 or more, got {states_every}")
    width = conv_weight.shape[-1]
    acc_dtype = torch.float64 if xbc.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (
        ("conv_weight", conv_weight.reshape(conv_weight.shape[0], -1), (channels, width)),
        ("conv_bias", conv_bias, (channels,)),
        ("a_log", a_log, (heads,)),
        ("d", d, (heads,)),
        ("dt_bias", dt_bias, (heads,)),
        ("conv_state", None if conv_state is None else conv_state[:0], (0, channels, width - 1)),
        ("ssm_state", None if ssm_state is None else ssm_state[:0], (0, heads, head_dim, state_size)),
        ("state_index", state_index, (batch,)),
        ("seq_lens", seq_lens, (batch,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if seq_lens is not None and batch and (int(seq_lens.min()) < 0 or int(seq_lens.max()) > length):
        raise ValueError(f"seq_lens: expected values in [0, {length}], got {seq_lens.tolist()}")

    def seed(name: str, state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if state is None:
            return torch.zeros(batch, *shape, dtype=dtype, device=xbc.device)
        if state_index is None:
            if len(state) != batch:
                raise ValueError(f"{name}: expected {batch} rows (or state_index), got {len(state)}")
            return state.to(dtype)
        if batch and (int(state_index.min()) < 0 or int(state_index.max()) >= len(state)):
            raise ValueError(f"state_index: expected rows of {name} in [0, {len(state)}), got {state_index.tolist()}")
        return state[state_index.long()].to(dtype)

    first_conv = seed("conv_state", conv_state, (channels, width - 1), xbc.dtype)
    state = seed("ssm_state", ssm_state, (heads, head_dim, state_size), acc_dtype)

    def zero_outside(m: Tensor) -> Tensor:  # [B, L, ...]: tokens beyond a row's length
        if seq_lens is None:
            return m
        inside = torch.arange(length, device=xbc.device) < seq_lens[:, None]  # [B, L]
        return torch.where(inside.reshape(batch, length, *[1] * (m.dim() - 2)), m, 0)

    # With x, B, C and Δ zero, a token adds nothing to the state and does not decay it. (dt too, for its gradient.)
    xbc, dt = zero_outside(xbc), zero_outside(dt)
    columns = torch.cat([first_conv, xbc.transpose(1, 2)], -1)  # [B, C, W-1 + L]

    kernel = conv_weight.reshape(channels, width).to(acc_dtype)
    u = sum(
        (kernel[:, w, None] * columns[..., w : w + length] for w in range(width)), xbc.new_zeros((), dtype=acc_dtype)
    )
    u = u if conv_bias is None else u + conv_bias.to(acc_dtype)[:, None]
    u = F.silu(u.to(xbc.dtype)).to(acc_dtype).transpose(1, 2)  # [B, L, C]
    x, b, c = u.split([inner, n_groups * state_size, n_groups * state_size], -1)
    x = x.reshape(batch, length, heads, head_dim)
    b, c = (
        m.reshape(batch, length, n_groups, state_size).repeat_interleave(heads // n_groups, 2) for m in (b, c)
    )  # [B, L, heads, state]
    delta = F.softplus(dt.to(acc_dtype) + dt_bias.to(acc_dtype)).clamp(*time_step_limit)
    delta = zero_outside(delta)
    log_decay = -a_log.to(acc_dtype).exp() * delta  # [B, L, heads]

    chunk = states_every or _CHUNK
    chunks = -(-length // chunk)

    def split(
        m: Tensor,
    ) -> Tensor:  # [B, L, heads, ...] -> [B, chunks, chunk, heads, ...], the last chunk filled with zeros
        return F.pad(m, [0, 0] * (m.dim() - 2) + [0, chunks * chunk - length]).unflatten(1, (chunks, chunk))

    if chunks:
        y, seeds, last = _scan(split(x * delta[..., None]), split(log_decay), split(b), split(c), state)
        y = y.flatten(1, 2)[:, :length] + d.to(acc_dtype)[:, None] * x
        after = torch.cat([seeds[:, 1:], last[:, None]], 1)  # [B, chunks, heads, head_dim, state]
    else:
        y, last, after = x, state, state.new_zeros(batch, 0, heads, head_dim, state_size)
    y = zero_outside(y).flatten(2).to(xbc.dtype)  # [B, L, heads·head_dim]
    if not return_states and not states_every:
        return y

    lens = torch.full((batch,), length, device=xbc.device) if seq_lens is None else seq_lens.long()
    ends = torch.arange(1, chunks + 1, device=xbc.device) * chunk if states_every else lens.new_full((1,), length)
    newest = torch.minimum(ends, lens[:, None])[..., None] + torch.arange(width - 1, device=xbc.device)  # [B, N, W-1]
    conv = columns.gather(2, newest.flatten(1)[:, None].expand(-1, channels, -1))
    conv = conv.unflatten(2, (len(ends), width - 1)).transpose(1, 2)  # [B, N, C, W-1]
    return (y, conv, after) if states_every else (y, conv[:, 0], last)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    """`rms(y · SiLU(z))` within each of `n_groups` contiguous groups of channels, times weight: the gate comes first.

    Args:
        y, z: `[..., D]`, D divisible by `n_groups`.
        weight: `[D]`.

    Returns:
        `[..., D]` in the dtype of `y`; float32 inside (float64 for float64).
    """
    if z.shape != y.shape:
        raise ValueError(f"z: expected the shape of y {tuple(y.shape)}, got {tuple(z.shape)}")
    if weight.shape != y.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(y.shape[-1:])}, got {tuple(weight.shape)}")
    if n_groups < 1 or y.shape[-1] % n_groups:
        raise ValueError(f"n_groups: {n_groups} does not divide {y.shape[-1]} channels")
    acc_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    gated = (y.to(acc_dtype) * F.silu(z.to(acc_dtype))).unflatten(-1, (n_groups, -1))  # [..., groups, D/groups]
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(acc_dtype)).to(y.dtype)


_SCAN: dict[str, dict] = {
    "one": dict(b=1, l=1, heads=1, head_dim=1, state=1, groups=1),
    "empty_batch": dict(b=0, l=4, heads=2, head_dim=4, state=4, groups=1),
    "empty_block": dict(b=2, l=0, heads=2, head_dim=4, state=4, groups=1, seeded=True),
    "unseeded": dict(b=2, l=7, heads=4, head_dim=8, state=8, groups=2),
    "seeded": dict(b=2, l=16, heads=4, head_dim=8, state=16, groups=2, seeded=True),
    "shorter_than_conv": dict(b=3, l=2, heads=3, head_dim=5, state=7, groups=3, seeded=True),
    "long": dict(b=1, l=67, heads=4, head_dim=8, state=8, groups=1, seeded=True),
    "ragged": dict(b=4, l=21, heads=2, head_dim=4, state=4, groups=1, seeded=True, lens=[0, 1, 21, 17]),
    "shared_state": dict(b=5, l=16, heads=2, head_dim=4, state=4, groups=2, seeded=True, index=[1, 0, 1, 1, 0]),
    "limited_step": dict(b=2, l=9, heads=2, head_dim=4, state=4, groups=1, limit=(0.01, 0.5)),
    "released": dict(b=1, l=16, heads=64, head_dim=64, state=128, groups=8, seeded=True),
}
CASES: dict[str, dict[str, dict]] = {
    "mamba2_scan": _SCAN,
    "gated_rms_norm": {
        "one": dict(b=1, l=1, width=1, groups=1),
        "empty": dict(b=2, l=0, width=8, groups=2),
        "odd": dict(b=3, l=5, width=21, groups=3),
        "released": dict(b=1, l=16, width=4096, groups=8),
    },
}


def make_inputs(
    op: str, case: str | dict, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments for `op`; `case` is a name in `CASES[op]` or a dict of the same keys."""
    sizes = CASES[op][case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, float32: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device, (torch.float64 if dtype == torch.float64 else torch.float32) if float32 else dtype)

    b, length, groups = sizes["b"], sizes["l"], sizes["groups"]
    if op == "gated_rms_norm":
        y, z = normal(b, length, sizes["width"]), normal(b, length, sizes["width"])
        return dict(y=y, z=z, weight=normal(sizes["width"]), n_groups=groups, eps=1e-5)
    heads, head_dim, state = sizes["heads"], sizes["head_dim"], sizes["state"]
    channels, width = heads * head_dim + 2 * groups * state, sizes.get("width", 4)
    index, lens = sizes.get("index"), sizes.get("lens")
    rows = max(index) + 1 if index else b
    return dict(
        xbc=normal(b, length, channels),
        dt=normal(b, length, heads),
        conv_weight=normal(channels, width) * 0.5,
        conv_bias=normal(channels) * 0.1,
        a_log=normal(heads, float32=True).abs().add(0.5).log(),
        d=normal(heads, float32=True),
        dt_bias=normal(heads, float32=True) - 2,
        n_groups=groups,
        head_dim=head_dim,
        conv_state=normal(rows, channels, width - 1) if sizes.get("seeded") else None,
        ssm_state=normal(rows, heads, head_dim, state, float32=True) if sizes.get("seeded") else None,
        state_index=torch.tensor(index, device=device) if index else None,
        seq_lens=torch.tensor(lens, device=device) if lens else None,
        time_step_limit=sizes.get("limit", (0.0, math.inf)),
    )

"""Mamba-2's scan and gated norm against PyTorch, at the released model's sizes: `python -m bench.bench_mamba2`.

The rivals of the scan are the recurrence token by token, which is what one writes without a kernel, and the closed
form over whole chunks as matrix products, the best that PyTorch's operations allow.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from bench.timing import Report
from reference import mamba2

RELEASED = dict(heads=64, head_dim=64, state=128, groups=8, seeded=True)


def assert_agree(got: Tensor, expected: Tensor) -> None:
    """Up to the rounding of bfloat16 activations; single entries are sums that cancel, so the whole is measured."""
    error, size = torch.linalg.vector_norm((got - expected).float()), torch.linalg.vector_norm(expected.float())
    assert error <= 1e-2 * size, f"{error:.3e} against {size:.3e}"


def convolved(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x `[B, L, h, p]`, B and C `[B, L, h, n]` after convolution and SiLU, steps and their log decays `[B, L, h]`."""
    xbc, heads, groups = inputs["xbc"], inputs["dt"].shape[2], inputs["n_groups"]
    (batch, length, channels), inner = xbc.shape, heads * inputs["head_dim"]
    columns = torch.cat([inputs["conv_state"], xbc.transpose(1, 2)], -1)
    # In float32, as products of shifted columns: PyTorch's bfloat16 convolution takes 50 ms here.
    columns, taps = columns.float(), inputs["conv_weight"].float()
    u = sum((taps[:, w, None] * columns[..., w : w + length] for w in range(taps.shape[1])), torch.zeros(()))
    u = F.silu((u + inputs["conv_bias"].float()[:, None]).to(xbc.dtype)).transpose(1, 2)
    x, b, c = u.float().split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    b, c = (m.reshape(batch, length, groups, -1).repeat_interleave(heads // groups, 2) for m in (b, c))
    steps = F.softplus(inputs["dt"].float() + inputs["dt_bias"])
    return x.reshape(batch, length, heads, -1), b, c, steps, -inputs["a_log"].exp() * steps


def recurrence(**inputs: Any) -> tuple[Tensor, Tensor]:
    """y and the last state, one token at a time."""
    x, b, c, steps, log_decay = convolved(inputs)
    state, out = inputs["ssm_state"], []
    for t in range(x.shape[1]):
        update = (steps[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = log_decay[:, t].exp()[..., None, None] * state + update
        out.append((state @ c[:, t, :, :, None])[..., 0] + inputs["d"][:, None] * x[:, t])
    return torch.stack(out, 1).flatten(2).to(inputs["xbc"].dtype), state


def closed_form(*, states: bool, chunk: int = 64, **inputs: Any) -> tuple[Tensor, Tensor]:
    """y and, if asked for, the last state, by batched matrix products over chunks of tokens."""
    x, b, c, steps, log_decay = (m.transpose(1, 2) for m in convolved(inputs))  # heads before tokens
    state, out = inputs["ssm_state"], []
    for t in range(0, x.shape[2], chunk):
        part = slice(t, t + chunk)
        a = log_decay[:, :, part].cumsum(-1)
        within = (a[..., :, None] - a[..., None, :]).tril().exp().tril() * steps[:, :, None, part]
        y = (c[:, :, part] @ b[:, :, part].mT * within) @ x[:, :, part]
        y = y + a.exp()[..., None] * (c[:, :, part] @ state.mT)
        out.append(y + inputs["d"][:, None, None] * x[:, :, part])
        if states or t + chunk < x.shape[2]:
            added = (x[:, :, part] * within[..., -1, :, None]).mT @ b[:, :, part]
            state = a[..., -1, None, None].exp() * state + added
    return torch.cat(out, 2).transpose(1, 2).flatten(2).to(inputs["xbc"].dtype), state


def eager_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    """The gated norm by PyTorch's own norm."""
    u = (y.float() * F.silu(z.float())).unflatten(-1, (n_groups, -1))
    return (F.rms_norm(u, u.shape[-1:], None, eps).flatten(-2) * weight.float()).to(y.dtype)


def scan() -> None:
    report = Report("mamba2_scan")
    shapes = ((1, 1, True), (1, 16, False), (1, 16, True), (16, 16, False), (1, 512, True))
    for dtype in (torch.bfloat16, torch.float32):
        for batch, length, states in shapes if dtype == torch.bfloat16 else shapes[1:2]:
            inputs = mamba2.make_inputs("mamba2_scan", dict(b=batch, l=length, **RELEASED), dtype=dtype)
            call = {k: v for k, v in inputs.items() if k not in ("time_step_limit", "state_index", "seq_lens")}

            def ours(call: dict[str, Any] = call, states: bool = states) -> Any:
                return tt.mamba2_scan(**call, return_states=states)

            def eager(call: dict[str, Any] = call) -> Any:
                return recurrence(**call)

            def matrices(call: dict[str, Any] = call, states: bool = states) -> Any:
                return closed_form(states=states, **call)

            for rival in (eager, matrices):
                got, (y, state) = ours(), rival()
                assert_agree(got[0] if states else got, y)
                if states:
                    assert_agree(got[2], state)
            size = inputs["ssm_state"].numel()  # per token and entry, one product for y and, with states, one more
            report.add(
                f"[{batch}, {length}] {dtype}{', states' if states else ''}",
                {"twotower_kernels": ours, "PyTorch, token by token": eager, "PyTorch, closed form": matrices},
                bytes=(1 + states) * size * 4 + 2 * inputs["xbc"].numel() * inputs["xbc"].element_size(),
                flops=2 * (1 + (states or length > 16)) * size * length,
            )
    report.show()


def norm() -> None:
    report = Report("gated_rms_norm")
    for dtype in (torch.bfloat16, torch.float32):
        for batch in (1, 16):
            inputs = mamba2.make_inputs("gated_rms_norm", dict(b=batch, l=16, width=4096, groups=8), dtype=dtype)
            assert_agree(tt.gated_rms_norm(**inputs), eager_norm(**inputs))
            report.add(
                f"[{batch}, 16, 4096] {dtype}",
                {
                    "twotower_kernels": lambda i=inputs: tt.gated_rms_norm(**i),
                    "PyTorch eager": lambda i=inputs: eager_norm(**i),
                },
                bytes=3 * inputs["y"].numel() * inputs["y"].element_size(),
            )
    report.show()


if __name__ == "__main__":
    scan()
    norm()

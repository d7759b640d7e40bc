"""The definition of reference/mamba2.py, one token of one row and one head at a time."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def recurrence(inputs: dict, every: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """One token of one row at a time: y, and the states at the end or after every `every` tokens.

    In float64 this is the oracle; in a narrower dtype a naive program: convolution and SiLU in it, the rest in float32.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    xbc, dt, weight, bias = (inputs[name].to(dtype) for name in ("xbc", "dt", "conv_weight", "conv_bias"))
    a = -inputs["a_log"].to(wide).exp()
    d, dt_bias = inputs["d"].to(wide), inputs["dt_bias"].to(wide)
    (batch, length, channels), heads = xbc.shape, dt.shape[-1]
    groups, head_dim, width = inputs["n_groups"], inputs["head_dim"], weight.shape[-1]
    inner = heads * head_dim
    state_size = (channels - inner) // (2 * groups)
    low, high = inputs["time_step_limit"]
    lens = [length] * batch if inputs["seq_lens"] is None else inputs["seq_lens"].tolist()
    index = list(range(batch)) if inputs["state_index"] is None else inputs["state_index"].tolist()

    y = torch.zeros(batch, length, inner, dtype=wide)
    ends = [min(length, (n + 1) * every) for n in range(math.ceil(length / every))] if every else [length]
    conv_out = torch.zeros(batch, len(ends), channels, width - 1, dtype=dtype)
    ssm_out = torch.zeros(batch, len(ends), heads, head_dim, state_size, dtype=wide)
    for row in range(batch):
        columns = torch.zeros(width - 1, channels, dtype=dtype)
        state = torch.zeros(heads, head_dim, state_size, dtype=wide)
        if inputs["conv_state"] is not None:
            columns = inputs["conv_state"][index[row]].T.to(dtype)
            state = inputs["ssm_state"][index[row]].to(wide)
        done = 0
        for n, end in enumerate(ends):
            for t in range(done, min(end, lens[row])):
                columns = torch.cat([columns, xbc[row, t : t + 1]])[-width:]
                u = F.silu((columns * weight.T).sum(0) + bias).to(wide)
                columns = columns[1:]
                for head in range(heads):
                    group = head * groups // heads
                    x = u[head * head_dim : (head + 1) * head_dim]
                    b = u[inner + group * state_size :][:state_size]
                    c = u[inner + (groups + group) * state_size :][:state_size]
                    delta = F.softplus(dt[row, t, head].to(wide) + dt_bias[head]).clamp(low, high)
                    state = state.clone()
                    state[head] = (delta * a[head]).exp() * state[head] + delta * torch.outer(x, b)
                    y[row, t, head * head_dim : (head + 1) * head_dim] = state[head] @ c + d[head] * x
            done = end
            conv_out[row, n], ssm_out[row, n] = columns.T, state
    return (y.to(dtype), conv_out, ssm_out) if every else (y.to(dtype), conv_out[:, 0], ssm_out[:, 0])

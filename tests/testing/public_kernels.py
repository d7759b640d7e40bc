"""Kernels that others publish, as they are, under `check`: python -m tests.testing.public_kernels

A function takes the op's arguments as far as the program behind it has them, and says NotImplementedError to the rest.
What each check found is printed as a table; docs/testing_your_kernel.md says what it means. Programs that are not
installed are left out. `--examples 400` looks longer, `--only PART` at those whose name holds the part, and `--reports`
prints the whole reports.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower_kernels.bench.baselines.foreign import mamba_ssm, nemotron_h
from twotower_kernels.testing import check
from twotower_kernels.testing.report import Report

Kernel = Callable[..., Any]


def parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# --- attention --------------------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        return sdpa(q, k, v, causal, scale)


def sdpa_masked(q: Tensor, k_context: Tensor, v_context: Tensor, context_lens: Any = None) -> Tensor:
    """A boolean mask hides what lies beyond a length."""
    room = k_context.shape[1]
    lens = torch.as_tensor(room if context_lens is None else context_lens).reshape(-1, 1)
    seen = (torch.arange(room) < lens).expand(len(q), room)[:, None, None]
    heads = (x.transpose(1, 2) for x in (q, k_context.expand(len(q), -1, -1, -1), v_context.expand(len(q), -1, -1, -1)))
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def flex(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def score(x: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = softcap * torch.tanh(x / softcap) if softcap else x
        return torch.where(query >= key, x, -torch.inf) if causal else x

    heads = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(*heads, score_mod=score, scale=scale, enable_gqa=True).transpose(1, 2)


def transformers_eager(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    from transformers.models.nemotron_h.modeling_nemotron_h import eager_attention_forward

    length = q.shape[1]
    layer = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], training=False)
    mask = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[None, None] if causal else None
    heads = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return eager_attention_forward(layer, *heads, mask, scaling=scale, dropout=0.0)[0]


# --- norms and linear -------------------------------------------------------------------------------------------------


def torch_rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def llama_rms_norm(x: Tensor, weight: Tensor, *, eps: float, round_first: bool) -> Tensor:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if not round_first:
        raise NotImplementedError("LlamaRMSNorm rounds first")
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight = parameter(weight)
    return norm(x)


def nemotron_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    norm = nemotron_h.Norm(len(weight), eps)
    norm.weight = parameter(weight)
    return norm(x)


def nemotron_gated_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    norm = nemotron_h.GatedNorm(len(weight), len(weight) // n_groups, eps=eps)
    norm.weight = parameter(weight)
    return norm(y, z)


def mamba_ssm_gated_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    return mamba_ssm.rms_norm(y, weight, None, z, eps, len(weight) // n_groups, norm_before_gate=False)


# --- mixture of experts -----------------------------------------------------------------------------------------------


def nemotron_router(
    logits: Tensor,
    correction_bias: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
    dropped: str = "zero",
) -> tuple[Tensor, Tensor]:
    """Its experts come in no order: they are sorted as ours are."""
    count = logits.shape[1]
    if (n_group > 1 and dropped == "zero") or count // n_group < 2:
        raise NotImplementedError("dropped groups are -inf there, and groups have two experts")
    sizes = dict(num_experts_per_tok=top_k, n_routed_experts=count, hidden_size=count, n_group=n_group)
    options = dict(topk_group=topk_group, norm_topk_prob=renormalize, routed_scaling_factor=scaling)
    router = nemotron_h.Router(SimpleNamespace(**sizes, num_local_experts=count, **options))
    router.weight = parameter(torch.eye(count))
    router.e_score_correction_bias = torch.zeros(count) if correction_bias is None else correction_bias.float()
    _, weights, experts = router(logits)
    choice = logits.float().sigmoid() + router.e_score_correction_bias
    ranks = choice.argsort(dim=1, descending=True, stable=True).argsort(1).gather(1, experts).argsort(1)
    return weights.gather(1, ranks), experts.gather(1, ranks).int()


def nemotron_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    activation: str = "relu2",
    implementation: str,
) -> Tensor:
    """Widths are filled with zeros up to a multiple of 8: grouped_mm wants strides of whole 16 bytes, and says so."""
    if activation != "relu2":
        raise NotImplementedError(f"activation {activation}")
    if bool(((experts < 0) | (experts >= len(w_up))).any()):
        raise NotImplementedError("an expert of another device")
    width, more, inner = x.shape[1], -x.shape[1] % 8, -w_up.shape[1] % 8
    x, w_up, w_down = F.pad(x, (0, more)), F.pad(w_up, (0, more, 0, inner)), F.pad(w_down, (0, inner, 0, more))
    sizes = dict(hidden_size=x.shape[1], n_routed_experts=len(w_up), moe_intermediate_size=w_up.shape[1])
    with torch.device("meta"):
        config = nemotron_h.Config(**sizes, mlp_hidden_act="relu2", experts_implementation=implementation)
        module = nemotron_h.Experts(config)
    module.up_proj, module.down_proj = parameter(w_up), parameter(w_down)
    return module(x, experts.long(), weights)[:, :width]


# --- Mamba-2 ----------------------------------------------------------------------------------------------------------


def split(u: Tensor, heads: int, head_dim: int, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., heads, head_dim], B and C [..., groups, state]."""
    state = (u.shape[-1] - heads * head_dim) // 2
    x, b, c = u.split([heads * head_dim, state, state], -1)
    return x.unflatten(-1, (heads, head_dim)), b.unflatten(-1, (n_groups, -1)), c.unflatten(-1, (n_groups, -1))


def convolved(xbc: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """transformers' convolution and SiLU, [B, L, C]."""
    return nemotron_h.conv(xbc.transpose(1, 2), weight, bias, "silu").transpose(1, 2)


def nemotron_prefill(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    *, n_groups: int, head_dim: int, time_step_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:  # fmt: skip
    x, b, c = split(convolved(xbc, conv_weight, conv_bias), dt.shape[2], head_dim, n_groups)
    options = dict(chunk_size=16, D=d, dt_bias=dt_bias, dt_softplus=True, dt_limit=time_step_limit)
    y = model_functions().mamba2_chunk_scan(x, dt, -a_log.float().exp(), b, c, **options)
    return y.flatten(2).to(xbc.dtype)


def nemotron_decoding(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    *, n_groups: int, head_dim: int, conv_state: Tensor, ssm_state: Tensor, return_states: bool = False,
) -> Any:  # fmt: skip
    """Token by token, as the mixer does with a cache."""
    conv, state, heads, ys = conv_state.clone(), ssm_state.clone(), dt.shape[2], []
    a = -a_log.float().exp()[:, None, None].expand(state.shape[1:])
    skip, bias = (m[:, None].expand(heads, head_dim) for m in (d, dt_bias))
    for t in range(xbc.shape[1]):
        u = nemotron_h.conv_update(xbc[:, t, :, None], conv, conv_weight, conv_bias, "silu")[..., 0]
        x, b, c = split(u, heads, head_dim, n_groups)
        step = dt[:, t, :, None].expand(-1, -1, head_dim)
        update = model_functions().mamba2_selective_state_update
        ys.append(update(state, x, step, a, b, c, skip, z=None, dt_bias=bias, dt_softplus=True).flatten(1))
    y = torch.stack(ys, 1) if ys else torch.zeros(len(xbc), 0, heads * head_dim, dtype=xbc.dtype)
    return (y, conv, state) if return_states else y


def model_functions() -> Any:
    return importlib.import_module(nemotron_h.Mixer.__module__)


def mamba_ssm_chunked(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    *, n_groups: int, head_dim: int,
) -> Tensor:  # fmt: skip
    x, b, c = split(convolved(xbc, conv_weight, conv_bias), dt.shape[2], head_dim, n_groups)
    chunk = xbc.shape[1] if xbc.shape[1] % 16 else 16  # it takes whole chunks
    y = mamba_ssm.chunk_scan(x, dt, -a_log.exp(), b, c, chunk, D=d, dt_bias=dt_bias, dt_softplus=True)
    return y.flatten(2).to(xbc.dtype)


def mamba_ssm_update(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    *, n_groups: int, head_dim: int, ssm_state: Tensor,
) -> Tensor:  # fmt: skip
    x, b, c = split(convolved(xbc, conv_weight, conv_bias), dt.shape[2], head_dim, n_groups)
    state, ys = ssm_state.clone(), []
    a = -a_log.exp()[:, None, None].expand(state.shape[1:])
    skip, bias = (m[:, None].expand(x.shape[2:]) for m in (d, dt_bias))
    for t in range(xbc.shape[1]):
        step = dt[:, t, :, None].expand(x[:, t].shape)
        given = state, x[:, t], step, a, b[:, t], c[:, t], skip
        ys.append(mamba_ssm.selective_state_update(*given, dt_bias=bias, dt_softplus=True).flatten(1))
    return torch.stack(ys, 1) if ys else torch.zeros(len(xbc), 0, d.numel() * head_dim, dtype=xbc.dtype)


def fla_recurrent(
    xbc: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    *, n_groups: int, head_dim: int,
) -> Tensor:  # fmt: skip
    """Linear attention with one decay per head: C are the queries, Δ·B the keys, x the values."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla
    from triton.runtime.autotuner import Autotuner

    x, b, c = split(convolved(xbc, conv_weight, conv_bias), dt.shape[2], head_dim, n_groups)
    delta = F.softplus(dt.float() + dt_bias)
    b, c = (m.repeat_interleave(dt.shape[2] // n_groups, 2).float().contiguous() for m in (b, c))
    values = (x.float() * delta[..., None]).contiguous()
    with patch.object(Autotuner, "_bench", lambda *_, **__: [1.0, 1.0, 1.0]):  # without a GPU nothing is timed
        y, _ = fused_recurrent_simple_gla(c, b, values, g=-a_log.exp() * delta, scale=1.0)
    return (y + d[:, None] * x).flatten(2).to(xbc.dtype)


# --- the table --------------------------------------------------------------------------------------------------------

FLOAT, HALF = (torch.float32,), (torch.bfloat16, torch.float16)
PUBLIC: list[tuple[str, str, str, Kernel]] = [
    ("torch", "F.scaled_dot_product_attention", "block_attention", sdpa),
    ("torch", "F.scaled_dot_product_attention, MATH", "block_attention", sdpa_math),
    ("torch", "F.scaled_dot_product_attention, a mask", "context_attention", sdpa_masked),
    ("torch", "flex_attention, not compiled", "block_attention", flex),
    ("transformers", "eager_attention_forward", "block_attention", transformers_eager),
    ("torch", "F.linear", "linear", torch_linear),
    ("torch", "F.rms_norm", "rms_norm", torch_rms_norm),
    ("transformers", "LlamaRMSNorm", "rms_norm", llama_rms_norm),
    ("transformers", "NemotronHRMSNorm", "rms_norm", nemotron_rms_norm),
    ("transformers", "NemotronHRMSNormGated", "gated_rms_norm", nemotron_gated_norm),
    ("mamba_ssm", "rms_norm_ref", "gated_rms_norm", mamba_ssm_gated_norm),
    ("transformers", "NemotronHTopkRouter", "moe_route", nemotron_router),
    *(
        ("transformers", f"NemotronHExperts, {kind}", "moe_experts", partial(nemotron_experts, implementation=kind))
        for kind in ("eager", "batched_mm", "grouped_mm")
    ),
    ("transformers", "mamba2_chunk_scan", "mamba2_scan", nemotron_prefill),
    ("transformers", "mamba2_selective_state_update", "mamba2_scan", nemotron_decoding),
    ("mamba_ssm", "ssd_chunk_scan_combined_ref", "mamba2_scan", mamba_ssm_chunked),
    ("mamba_ssm", "selective_state_update_ref", "mamba2_scan", mamba_ssm_update),
    ("fla-core", "fused_recurrent_simple_gla", "mamba2_scan", fla_recurrent),
]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(report: Report) -> str:
    if not report.failures:
        return "held" if report else "nothing was tried"
    return ", ".join(failure.promise for failure in report.failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--reports", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    print(f"{'program':<56}{'op':<20}{'float32':<24}bfloat16, float16")
    for package, name, op, kernel in PUBLIC:
        number = version(package)
        if number is None or arguments.only not in name:
            continue
        reports = [check(op, kernel, dtypes=dtypes, examples=arguments.examples) for dtypes in (FLOAT, HALF)]
        said = [summary(report) for report in reports]
        print(f"{f'{package} {number}: {name}':<56}{op:<20}{said[0]:<24}{said[1]}", flush=True)
        if arguments.reports:
            print(*reports, sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()

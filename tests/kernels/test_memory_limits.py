"""Scratch memory that does not fit: a MemoryError, after which the process goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import twotower_kernels as tt
from tests.paths import ROOT

# Each makes `call`, and says how much room in MiB is left for its results and scratch: enough for the results alone.
CALLS: dict[str, tuple[int, str]] = {
    "adaln_norm": (40, "x = torch.ones(1, 1, M); call = lambda: tt.adaln_norm(x, x[0, 0], eps=1e-5)"),
    "gated_residual": (40, "x = torch.ones(1, 1, M); call = lambda: tt.gated_residual(x, x)"),
    "gated_rms_norm": (
        40,
        "x = torch.ones(1, 1, M); call = lambda: tt.gated_rms_norm(x, x, x[0, 0], n_groups=1, eps=1e-5)",
    ),
    "linear": (40, "x, w = torch.ones(64, M // 16), torch.ones(1, M // 16); call = lambda: OPS.linear(x, w, None)"),
    "moe_gate": (60, "x, w = torch.ones(64, M // 16), torch.ones(1, M // 16); call = lambda: tt.moe_gate(x, w)"),
    "moe_route": (40, "x = torch.ones(1, M); call = lambda: tt.moe_route(x, top_k=1)"),
    "moe_plan": (80, "x = torch.zeros(1, 1, dtype=torch.int32); call = lambda: tt.moe_plan(x, M)"),
    "moe_experts": (
        24,
        """
x, up, experts = torch.ones(16, M // 16), torch.ones(1, 1, M // 16), torch.zeros(16, 1, dtype=torch.int32)
call = lambda: tt.moe_experts(x, up, up.view(1, M // 16, 1), torch.ones(16, 1), experts)
""",
    ),
    "mamba2_scan of a wide head": (
        80,
        """
x, one, step = torch.ones(1, 1, M // 2 + 2), torch.ones(1), torch.ones(1, 1, 1)
call = lambda: tt.mamba2_scan(x, step, x.view(-1, 1), None, one, one, one, n_groups=1, head_dim=M // 2)
""",
    ),
    "mamba2_scan of a large state": (
        80,
        """
x, one, step = torch.ones(1, 1, M + 1), torch.ones(1), torch.ones(1, 1, 1)
call = lambda: tt.mamba2_scan(x, step, x.view(-1, 1), None, one, one, one, n_groups=1, head_dim=1)
""",
    ),
    "mamba2_scan of no tokens": (
        80,
        """
x, one, w, step = torch.ones(1, 0, M + 1), torch.ones(1), torch.ones(M + 1, 1), torch.ones(1, 0, 1)
call = lambda: tt.mamba2_scan(x, step, w, None, one, one, one, n_groups=1, head_dim=1, return_states=True)[2]
""",
    ),
    "block_attention": (80, "q = torch.ones(1, 1, 1, M // 8); call = lambda: tt.block_attention(q, q, q)"),
    "block_attention in parts": (
        300,
        """
q = torch.ones(1, 1, 1, M // 8)
past = q.expand(1, 200, 1, M // 8)
call = lambda: tt.block_attention(q, q, q, past, past)
""",
    ),
    "context_attention": (80, "q = torch.ones(1, 1, 1, M // 8); call = lambda: tt.context_attention(q, q, q)"),
    "context_attention into out": (
        80,
        "q = torch.ones(1, 1, 1, M // 8); out = q + 0; call = lambda: tt.context_attention(q, q, q, out=out)",
    ),
    "remask": (
        40,
        """
x, t = torch.ones(1, 1, M), torch.zeros(1, 1, dtype=torch.int64)
call = lambda: tt.remask(x, t, mask_token_id=0, temperature=1.0, top_k=5).confidence
""",
    ),
}
PROGRAM = f"""
import resource
import torch
import twotower_kernels as tt

OPS, M, UNLIMITED = torch.ops.twotower, 1 << 22, resource.RLIM_INFINITY
torch.set_num_threads(2)
a, b = torch.randn(300, 8), torch.randn(300, 8)

def works():
    torch.testing.assert_close(tt.moe_gate(a, b), a.double() @ b.double().T)  # on both threads

works()
for name, (room, make) in {CALLS!r}.items():
    exec(make)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), UNLIMITED))
    try:
        call()
    except MemoryError:
        print(name, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (UNLIMITED, UNLIMITED))
    works()
    first = call()
    assert (first if isinstance(first, torch.Tensor) else first[0]).isfinite().all(), name
"""


@pytest.mark.skipif("KERNEL_LIBRARY" in os.environ, reason="a sanitizer reserves address space of its own")
def test_scratch_that_does_not_fit_is_a_memory_error_and_the_next_call_is_right() -> None:
    # What is freed goes back to the system, and no thread has address space in reserve, 64 MiB as glibc has it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == list(CALLS)


def test_sizes_beyond_all_memory_that_need_none() -> None:
    """Of no tokens, there is nothing to compute, however large their channels."""
    one, huge = torch.ones(1), 2**61
    y = torch.ops.twotower.mamba2_scan(
        *(torch.ones(1, 0, huge + 1), torch.ones(1, 0, 1), torch.ones(1, 1).expand(huge + 1, 1), None, one, one, one),
        *(1, 1, None, None, None, None, 0.0, 1.0, False, 0),
    )[0]
    assert y.shape == (1, 0, 1)
    q = torch.ones(0, 1, 1, huge)
    assert tt.block_attention(q, q, q).shape == q.shape

"""Recorded attention patterns, recovered from `block_attention` itself.

    python -m tests.replay_masks FOLDER [--impl reference|package]

FOLDER holds cases.json and one safetensors file per case (the README in tests/data/golden/masks says what is in them).
Every pattern is said with the op's arguments (mask_patterns.py). The values are one-hot, so the output is the row
of attention weights: its positive entries are the mask, its numbers must be those of a masked softmax in float64, and
the log-sum-exp must be that softmax's. Keys and values that nobody may see are NaN.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.specification.mask_patterns import PATTERNS, Block, Call

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
TOLERANCE = 1e-12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay_masks", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder with cases.json and its safetensors files")
    parser.add_argument("--impl", choices=["reference", "package"], default="reference")
    arguments = parser.parse_args()
    try:
        attention = implementation(arguments.impl)
        cases = json.loads((arguments.folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    faults = {case["name"]: replay(case, arguments.folder, attention) for case in cases}
    for name, fault in faults.items():
        if fault:
            print(f"{name}: {fault}")
    agree = sum(not fault for fault in faults.values())
    print(f"{agree} of {len(cases)} agree")
    return 0 if agree == len(cases) > 0 else 1


def implementation(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`block_attention` of the specification or of the package."""
    module = "twotower_kernels.reference.attention" if name == "reference" else "twotower_kernels"
    return importlib.import_module(module).block_attention


def replay(case: dict[str, Any], folder: Path, attention: Callable[..., tuple[Tensor, Tensor]]) -> str | None:
    """None if the op reproduces the recorded mask, else what is wrong."""
    pattern = f"{case['system']}.{case['pattern']}"
    if pattern not in PATTERNS:
        return f"not expressed: no builder for the pattern {pattern}"
    recorded = load_file(folder / case["file"])
    mask = recorded["mask"].reshape(-1, case["q_len"], case["k_len"])  # batch and broadcast head axis -> [B,Q,K]
    allowed = torch.block_diag(*mask.to(torch.uint8)).bool()  # [B*Q, B*K]: batch rows see nothing of each other
    calls = PATTERNS[pattern](case)
    if fault := check_cover(calls, allowed):
        return fault
    if "position_ids" in recorded and (fault := check_positions(calls, recorded["position_ids"].flatten())):
        return fault

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(allowed.shape[0], HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    k = torch.randn(allowed.shape[1], KV_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    weights, lse = weights_of(calls, q, k, attention)
    logits = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) / HEAD_DIM**0.5
    logits = logits.masked_fill(~allowed[:, None], -torch.inf)
    if (wrong := (weights > 0) != allowed[:, None]).any():
        query, _, key = torch.nonzero(wrong)[0].tolist()
        seen = "seen but not allowed" if not allowed[query, key] else "allowed but not seen"
        return f"{int(wrong.any(1).sum())} entries differ, first: query {query}, key {key} {seen}"
    if not torch.allclose(weights, logits.softmax(-1).nan_to_num(0), rtol=TOLERANCE, atol=TOLERANCE):
        return "the weights are not those of the masked softmax"
    if not torch.allclose(lse, logits.logsumexp(-1), rtol=TOLERANCE, atol=TOLERANCE):
        return "the log-sum-exp is not that of the masked softmax"
    return None


def check_cover(calls: list[Call], allowed: Tensor) -> str | None:
    """Every query row is asked for exactly once."""
    asked = [row for call in calls for block in call.blocks for row in (*block.queries, *block.padding)]
    if sorted(asked) != list(range(allowed.shape[0])):
        return f"the calls ask for {len(asked)} rows ({len(set(asked))} different) of {allowed.shape[0]}"
    return None


def check_positions(calls: list[Call], position_ids: Tensor) -> str | None:
    """A token's position is the length of its context plus its place in the block."""
    for call in calls:
        for block in call.blocks if call.positions else ():
            expected = [block.context_len + place for place in range(len(block.queries))]
            if position_ids[list(block.queries)].tolist() != expected:
                return (
                    f"position ids of rows {list(block.queries)}: recorded {position_ids[list(block.queries)].tolist()}"
                )
    return None


def weights_of(
    calls: list[Call], q: Tensor, k: Tensor, attention: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(attention weights [Q,Hq,K], lse [Q,Hq]) of all calls, HEAD_DIM columns of one-hot values at a time."""
    rows, columns = len(q), len(k)
    weights = torch.full((rows, HEADS, columns), torch.nan, dtype=q.dtype)
    lse = torch.full((rows, HEADS), torch.nan, dtype=q.dtype)
    one_hot = torch.eye(columns, dtype=q.dtype)[:, None].expand(-1, KV_HEADS, -1)  # [K,Hkv,K]
    for call in calls:
        for first in range(0, columns, HEAD_DIM):
            v = torch.zeros(columns, KV_HEADS, HEAD_DIM, dtype=q.dtype)
            part = one_hot[..., first : first + HEAD_DIM]
            v[..., : part.shape[-1]] = part
            out, out_lse = attention(**arguments_of(call, q, k, v), return_lse=True)
            for block, values, value_lse in zip(call.blocks, out, out_lse, strict=True):
                asked = [*block.queries, *block.padding]
                weights[asked, :, first : first + HEAD_DIM] = values[: len(asked), :, : part.shape[-1]]
                lse[asked] = value_lse[: len(asked)]
    return weights, lse


def arguments_of(call: Call, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The keyword arguments of one call: q [Q,Hq,D] and k, v [K,Hkv,D] laid out in blocks and context rows."""

    def rows_of(source: Tensor, rows: list[list[int | None]], width: int) -> Tensor:
        laid = torch.full((len(rows), width, *source.shape[1:]), torch.nan, dtype=source.dtype)
        for target, row in zip(laid, rows, strict=True):
            for place, number in enumerate(row):
                if number is not None:
                    target[place] = source[number]
        return laid

    def size(block: Block) -> int:
        return len(block.queries) + len(block.padding)

    blocks, width = call.blocks, max(size(block) for block in call.blocks)
    keys: list[list[int | None]] = [[*block.keys] for block in blocks]
    depth = max(len(row) for row in call.contexts)
    return {
        "q": rows_of(q, [[*block.queries] for block in blocks], width),
        "k": rows_of(k, keys, width),
        "v": rows_of(v, keys, width),
        "k_context": rows_of(k, call.contexts, depth),
        "v_context": rows_of(v, call.contexts, depth),
        "context_index": torch.tensor([block.context for block in blocks]),
        "context_lens": torch.tensor([block.context_len for block in blocks]),
        "block_lens": torch.tensor([len(block.queries) for block in blocks]),
        "causal": call.causal,
        "window": call.window,
    }


if __name__ == "__main__":
    sys.exit(main())

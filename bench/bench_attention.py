"""Block attention against PyTorch's scaled dot-product attention: `python -m bench.bench_attention`."""

import torch
from torch.nn import functional as F

import twotower_kernels as tt
from bench.timing import Report
from reference import attention


def concatenated(q, k, v, k_context, v_context, causal=False):  # type: ignore[no-untyped-def]
    """What one writes today: keys and values concatenated and expanded to the query heads on every step and layer."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)
    keys, values = keys.repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)


def in_place(q, k, v, k_context, v_context):  # type: ignore[no-untyped-def]
    """The best one can write: the block already stands behind its context in preallocated storage, heads are grouped.

    k_context and v_context hold the block's keys and values too.
    """
    args = (x.transpose(1, 2) for x in (q, k_context, v_context))
    return F.scaled_dot_product_attention(*args, enable_gqa=True).transpose(1, 2)


def packed(q, k, v, k_context, v_context):  # type: ignore[no-untyped-def]
    """As `in_place`, with the query heads of a key head as further query rows, so that keys are read once for all."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    rows = q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)  # [B,Hkv,S*R,D]
    out = F.scaled_dot_product_attention(rows, k_context.transpose(1, 2), v_context.transpose(1, 2))
    return out.unflatten(2, (length, -1)).transpose(1, 2).reshape(batch, length, heads, dim)


def main() -> None:
    report = Report("block_attention, 32 query heads, 2 key heads, head_dim 128")
    for dtype in (torch.bfloat16, torch.float32):
        for batch, block, context in ((1, 16, 512), (1, 16, 4096), (4, 16, 1024)):
            sizes = dict(batch=batch, block=block, heads=32, kv_heads=2, head_dim=128, context=context)
            inputs = attention.make_inputs("block_attention", sizes, dtype=dtype)
            whole = dict(inputs)
            for name in ("k", "v"):
                whole[f"{name}_context"] = torch.cat([inputs[f"{name}_context"], inputs[name]], 1)
            ours = tt.block_attention(**inputs)
            for theirs in (concatenated(**inputs), in_place(**whole), packed(**whole)):
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3)
            storage = 2 * inputs["k_context"].numel() * inputs["k_context"].element_size()
            report.add(
                f"[{batch}, {block}] over {context} {dtype}",
                {
                    "twotower_kernels": lambda i=inputs: tt.block_attention(**i),
                    "PyTorch, concatenated": lambda i=inputs: concatenated(**i),
                    "PyTorch, in place": lambda i=whole: in_place(**i),
                    "PyTorch, in place and packed": lambda i=whole: packed(**i),
                },
                bytes=storage,
                flops=4 * batch * block * 32 * 128 * (context + block),
            )
    prefill = dict(batch=1, block=1024, heads=32, kv_heads=2, head_dim=128, causal=True)
    inputs = attention.make_inputs("block_attention", prefill, dtype=torch.bfloat16)

    def causal(q, k, v, causal):  # type: ignore[no-untyped-def]
        args = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=True).transpose(1, 2)

    torch.testing.assert_close(tt.block_attention(**inputs), causal(**inputs), rtol=1e-2, atol=5e-3)
    report.add(
        "[1, 1024] causal torch.bfloat16",
        {"twotower_kernels": lambda: tt.block_attention(**inputs), "PyTorch": lambda: causal(**inputs)},
        flops=2 * 1024 * 1024 * 32 * 128,
    )
    report.show()


if __name__ == "__main__":
    main()

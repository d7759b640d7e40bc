"""The specification of attention against itself: sequences of blocks, contexts that hold the block, sinks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specification.attention_oracle import oracle
from tests.specification.test_attention import attend, close, problems, randn
from twotower_kernels.reference.attention import (
    append_kv,
    block_attention,
    block_causal_attention,
    make_inputs,
    merge_attention,
)


@settings(max_examples=40)
@given(
    sizes=problems(), block_size=st.integers(1, 6), lens=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_sequence_of_blocks_equals_the_definition(sizes, block_size, lens, seed):
    """And one block after the other, over the context that they have left."""
    sizes = {n: x for n, x in sizes.items() if not n.startswith(("context", "page", "window"))}
    sizes |= {"block": 9, "batch": 3, "block_lens": lens}
    inputs = make_inputs("block_causal_attention", sizes, dtype=torch.float64, seed=seed)
    got = block_causal_attention(**inputs, block_size=block_size, return_lse=True)
    for x, expected in zip(got, oracle(inputs | {"block_size": block_size}), strict=True):
        close(x, expected)
    q, k, v = (inputs[name] for name in "qkv")
    options = {name: inputs[name] for name in ("softcap", "sinks") if name in inputs}
    for start in range(0, 9, block_size):
        block = slice(start, start + block_size)
        counts = (inputs["seq_lens"] - start).clamp(0, q[:, block].shape[1])
        one = block_attention(
            q[:, block], k[:, block], v[:, block], k, v, context_lens=inputs["seq_lens"].clamp(max=start),
            block_lens=counts, return_lse=True, **options,
        )  # fmt: skip
        for x, expected in zip(one, got, strict=True):
            close(x, expected[:, block])


@settings(max_examples=40)
@given(sizes=problems(), window=st.sampled_from([None, 1, 2, 5, 100]), seed=st.integers(0, 2**31))
def test_a_causal_context_holds_the_block(sizes, window, seed):
    """Appended first or given beside the context, the block sees the same; a window slides with the queries."""
    batch = sizes["batch"]
    lens, counts = sizes["context_lens"] or [0] * batch, sizes["block_lens"] or [sizes["block"]] * batch
    page = sizes["page"] or 1
    sizes |= {"context_lens": lens, "context": -(-(sizes["context"] + sizes["block"]) // page) * page}
    sizes |= {"context_rows": batch, "context_index": list(range(batch))[::-1], "context_starts": None}
    drop = ("window", "softcap", "sinks")
    stored = make_inputs("append_kv", {n: x for n, x in sizes.items() if n not in drop}, dtype=torch.float64, seed=seed)
    q = randn(batch, sizes["block"], sizes["heads"], sizes["head_dim"])
    beside = attend(q=q, **stored, causal=True)
    append_kv(**stored)
    del stored["k"], stored["v"]
    stored["context_lens"] += torch.tensor(counts, dtype=torch.int64)
    for got, expected in zip(attend(q=q, **stored, causal=True), beside, strict=True):
        close(got, expected)
    if window is None:
        return
    got = attend(q=q, **stored, causal=True, window=window)
    for i in range(sizes["block"]):
        later = [max(n - i - 1, 0) for n in counts]  # tokens of the block behind the query
        alone = {
            "block_lens": torch.tensor([i < n for n in counts]).long(),
            "context_lens": stored["context_lens"] - torch.tensor(later, dtype=torch.int64),
        }
        one = attend(q=q[:, i : i + 1], **stored | alone, window=window)
        for x, expected in zip(got, one, strict=True):
            close(x[:, i : i + 1], expected)


def test_a_sink_is_a_key_whose_value_is_zero():
    inputs = make_inputs("block_attention", {"context": 4, "sinks": True, "block_lens": [5, 2]}, dtype=torch.float64)
    sinks = inputs.pop("sinks")
    out, lse = attend(**inputs)
    nothing = torch.zeros_like(out), sinks.expand_as(lse).masked_fill(lse.isneginf(), -torch.inf)
    for got, expected in zip(attend(**inputs, sinks=sinks), merge_attention(out, lse, *nothing), strict=True):
        close(got, expected)

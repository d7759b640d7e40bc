"""reference/attention.py against its definition, against PyTorch's own attention, and against itself."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.specification.attention_oracle import naive, oracle
from twotower_kernels.reference.attention import (
    CASES,
    COMPOSED,
    append_kv,
    block_attention,
    block_causal_attention,
    context_attention,
    make_inputs,
    merge_attention,
)
from twotower_kernels.testing.budget import assert_within_budget

OPS = {
    "block_attention": block_attention,
    "context_attention": context_attention,
    "block_causal_attention": block_causal_attention,
}
SMALL = [(op, case) for op in OPS for case in (CASES | COMPOSED)[op] if not case.startswith("released")]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def close(got, expected):
    """Equal to the last digits of float64."""
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attend(**inputs):
    """block_attention or context_attention with lse, whichever the inputs are for."""
    return OPS["block_attention" if "k" in inputs else "context_attention"](**inputs, return_lse=True)


# --- against the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_equals_the_definition(op, case):
    inputs = make_inputs(op, case, dtype=torch.float64)
    out, lse = OPS[op](**inputs, return_lse=True)
    expected_out, expected_lse = oracle(inputs)
    close(out, expected_out)
    close(lse, expected_lse)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_low_precision_stays_within_the_budget(op, case, dtype):
    inputs = make_inputs(op, case, dtype=dtype, seed=1)
    got, plain, exact = OPS[op](**inputs, return_lse=True), naive(inputs), oracle(inputs)
    for name, *results in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_within_budget(*results, what=f"{op}/{case} {name}")


@st.composite
def problems(draw):
    """Sizes for make_inputs: any block and context, any lengths, any sharing of context rows, dense or paged."""
    batch, block, context = draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(st.integers(0, 9))
    kv_heads, page = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 2, 3]))
    context = context if page is None else context // page * page
    lengths = lambda top: st.one_of(st.none(), st.lists(st.integers(0, top), min_size=batch, max_size=batch))  # noqa: E731
    rows = draw(st.integers(1, 3))
    shared = draw(st.booleans())
    one = rows == 1 and draw(st.booleans())  # without an index
    return {
        "batch": batch,
        "block": block,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": draw(st.integers(1, 6)),
        "context": context,
        "context_rows": rows if shared or one else batch,
        "context_index": [draw(st.integers(0, rows - 1)) for _ in range(batch)] if shared and not one else None,
        "context_lens": draw(lengths(context)),
        "context_starts": draw(lengths(context)),
        "block_lens": draw(lengths(block)),
        "page": page,
        "transposed": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 0, 1, 3, 100])),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "value_dim": draw(st.sampled_from([None, 1, 7])),
        "sinks": draw(st.booleans()),
    }


@settings(max_examples=60)
@given(sizes=problems(), causal=st.booleans(), seed=st.integers(0, 2**31))
def test_any_block_equals_the_definition(sizes, causal, seed):
    for op in ("block_attention", "context_attention"):
        inputs = make_inputs(op, sizes | {"causal": causal}, dtype=torch.float64, seed=seed)
        out, lse = OPS[op](**inputs, return_lse=True)
        expected_out, expected_lse = oracle(inputs)
        close(out, expected_out)
        close(lse, expected_lse)


@settings(max_examples=25)
@given(sizes=problems(), dtype=st.sampled_from(LOW), seed=st.integers(0, 2**31))
def test_low_precision_rounds_only_the_result(sizes, dtype, seed):
    """Float32 and below equal the float64 result of the same inputs, up to float32 sums and one rounding."""
    inputs = make_inputs("block_attention", sizes, dtype=dtype, seed=seed)
    doubles = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    (out, lse), (exact_out, exact_lse) = attend(**inputs), attend(**doubles)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact_out, rtol=torch.finfo(dtype).eps, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=2e-6)


# --- against PyTorch's attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_block_alone_is_scaled_dot_product_attention(heads, kv_heads, causal):
    q, k, v = randn(2, 7, heads, 8), randn(2, 7, kv_heads, 8, seed=1), randn(2, 7, kv_heads, 8, seed=2)
    args = (x.transpose(1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=True).transpose(1, 2)
    close(block_attention(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_context_and_block_are_scaled_dot_product_attention_over_their_concatenation(scale):
    q, k, v = randn(3, 4, 6, 8), randn(3, 4, 2, 8, seed=1), randn(3, 4, 2, 8, seed=2)
    k_context, v_context = randn(3, 9, 2, 8, seed=3), randn(3, 9, 2, 8, seed=4)
    lens = torch.tensor([9, 0, 5])
    mask = torch.cat([torch.arange(9) < lens[:, None], torch.ones(3, 4, dtype=torch.bool)], dim=1)[:, None, None]
    keys, values = torch.cat([k_context, k], dim=1), torch.cat([v_context, v], dim=1)
    args = (x.transpose(1, 2) for x in (q, keys, values))
    expected = scaled_dot_product_attention(*args, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    close(block_attention(q, k, v, k_context, v_context, context_lens=lens, scale=scale), expected)


@pytest.mark.parametrize(("blocks", "size"), [(3, 4), (1, 8), (6, 1)])
def test_blocks_folded_into_the_batch_are_flex_attention_under_the_training_mask(blocks, size):
    """All denoiser blocks of a sequence at once: [noisy | clean] queries and keys of BD3-LM (Arriola et al. 2025)."""
    batch, length, heads, kv_heads, dim = 2, blocks * size, 4, 2, 16
    noisy, clean = slice(0, length), slice(length, 2 * length)

    def training_mask(b, h, q, k):
        q_clean, k_clean = q >= length, k >= length
        q_block, k_block = q % length // size, k % length // size
        own = (q_clean == k_clean) & (q_block == k_block)
        return own | (k_clean & ((q_block > k_block) | (q_clean & (q_block >= k_block))))

    q, k, v = (
        randn(batch, 2 * length, n, dim, seed=s, dtype=torch.float32)
        for n, s in ((heads, 0), (kv_heads, 1), (kv_heads, 2))
    )
    mask = create_block_mask(training_mask, None, None, 2 * length, 2 * length, device="cpu")
    with warnings.catch_warnings():  # that it runs uncompiled
        warnings.simplefilter("ignore")
        peer = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)

    got = torch.empty_like(q)
    for half in (noisy, clean):  # block i of sequence b is batch row b * blocks + i and reads context row b
        q_blocks, k_blocks, v_blocks = (x[:, half].reshape(batch * blocks, size, -1, dim) for x in (q, k, v))
        folded = block_attention(
            q_blocks,
            k_blocks,
            v_blocks,
            k[:, clean],
            v[:, clean],
            context_index=torch.arange(batch).repeat_interleave(blocks),
            context_lens=torch.arange(blocks).mul(size).repeat(batch),
        )
        got[:, half] = folded.reshape(batch, length, heads, dim)
    torch.testing.assert_close(got, peer, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_scaled_dot_product_attention():
    q, k, v = (randn(2, 4, n, 8, seed=s).requires_grad_() for n, s in ((6, 0), (2, 1), (2, 2)))
    k_context, v_context, weight = randn(2, 5, 2, 8, seed=3), randn(2, 5, 2, 8, seed=4), randn(2, 4, 6, 8, seed=5)
    keys, values = torch.cat([k_context, k], dim=1), torch.cat([v_context, v], dim=1)
    peer = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)), enable_gqa=True)
    expected = torch.autograd.grad((peer.transpose(1, 2) * weight).sum(), (q, k, v))
    got = torch.autograd.grad((block_attention(q, k, v, k_context, v_context) * weight).sum(), (q, k, v))
    for one, other in zip(got, expected, strict=True):
        close(one, other)


# --- against itself: the laws ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(sizes=problems(), causal=st.booleans(), seed=st.integers(0, 2**31))
def test_block_attention_is_the_merge_of_its_halves(sizes, causal, seed):
    inputs = make_inputs("block_attention", sizes | {"causal": causal}, dtype=torch.float64, seed=seed)
    options = {"block_lens", "softcap"} & inputs.keys()
    own = attend(**{name: inputs[name] for name in {"q", "k", "v", "causal"} | options})
    past = attend(**{name: x for name, x in inputs.items() if name not in ("k", "v", "causal")})  # with the sinks
    for got, expected in zip(merge_attention(*past, *own), attend(**inputs), strict=True):
        close(got, expected)


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    lens=st.lists(st.integers(0, 12), min_size=2, max_size=2),
    paged=st.booleans(),
)
def test_a_context_read_in_pieces_and_merged_is_the_context(cuts, lens, paged):
    sizes = {"context": 12, "context_lens": lens, "page": 1 if paged else None}
    inputs = make_inputs("context_attention", sizes, dtype=torch.float64)
    k_context, v_context, table = inputs["k_context"], inputs["v_context"], inputs.get("block_table")
    total = None
    for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
        piece = {"context_lens": (inputs["context_lens"] - start).clamp(0, stop - start)}
        if table is not None:
            piece |= {"k_context": k_context, "v_context": v_context, "block_table": table[:, start:stop]}
        else:  # a view of the storage, not a copy
            piece |= {"k_context": k_context[:, start:stop], "v_context": v_context[:, start:stop]}
        part = attend(q=inputs["q"], **piece)
        total = part if total is None else merge_attention(*total, *part)
    for got, expected in zip(total, attend(**inputs), strict=True):
        close(got, expected)


@settings(max_examples=40)
@given(
    empty=st.lists(st.sampled_from([0.0, -torch.inf, torch.inf]), min_size=3, max_size=3),
    spread=st.sampled_from([1.0, 50.0, 1e4]),
)
def test_merge_is_commutative_and_associative(empty, spread):
    sides = []
    for i, nothing in enumerate(empty):
        out, lse = randn(2, 3, 4, 5, seed=i), randn(2, 3, 4, seed=10 + i) * spread
        if nothing:
            out[0], lse[0] = torch.nan, nothing
        sides.append((out, lse))
    a, b, c = sides
    for got, expected in (
        (merge_attention(*a, *b), merge_attention(*b, *a)),
        (merge_attention(*merge_attention(*a, *b), *c), merge_attention(*a, *merge_attention(*b, *c))),
    ):
        close(got[0], expected[0])
        close(got[1], expected[1])
    assert not merge_attention(*a, *b)[0].isnan().any()


@pytest.mark.parametrize("mark_a", [-torch.inf, torch.inf])
@pytest.mark.parametrize("mark_b", [-torch.inf, torch.inf])
def test_an_empty_side_changes_nothing_and_two_give_nothing(mark_a, mark_b):
    inputs = make_inputs("merge_attention", "empty_sides", dtype=torch.float64)  # rows: a empty, both empty, b empty
    for name, mark in (("lse_a", mark_a), ("lse_b", mark_b)):
        inputs[name][inputs[name].isneginf()] = mark
    out, lse = merge_attention(**inputs)
    assert torch.equal(out[0], inputs["out_b"][0]) and torch.equal(lse[0], inputs["lse_b"][0])
    assert torch.equal(out[2], inputs["out_a"][2]) and torch.equal(lse[2], inputs["lse_a"][2])
    assert torch.equal(out[1], torch.zeros_like(out[1])) and bool(lse[1].isneginf().all())


@pytest.mark.parametrize("dtype", LOW)
def test_merge_stays_within_the_budget(dtype):
    inputs = make_inputs("merge_attention", "tiny", dtype=dtype)
    a, b = inputs["lse_a"].double(), inputs["lse_b"].double()
    weight = torch.sigmoid(a - b)[..., None]
    exact = weight * inputs["out_a"].double() + (1 - weight) * inputs["out_b"].double()
    low = torch.sigmoid(inputs["lse_a"] - inputs["lse_b"])[..., None].to(dtype)
    out, lse = merge_attention(**inputs)
    assert_within_budget(out, low * inputs["out_a"] + (1 - low) * inputs["out_b"], exact)
    assert_within_budget(lse, (inputs["lse_a"].exp() + inputs["lse_b"].exp()).log(), torch.logaddexp(a, b))


@settings(max_examples=40)
@given(sizes=problems(), seed=st.integers(0, 2**31))
def test_layout_of_the_storage_does_not_matter(sizes, seed):
    """Paged, dense, indexed or copied per row, contiguous or transposed: the same numbers."""
    inputs = make_inputs("block_attention", sizes, dtype=torch.float64, seed=seed)
    expected = attend(**inputs)
    k_context, v_context, table = inputs["k_context"], inputs["v_context"], inputs.pop("block_table", None)
    if table is not None:
        rows, tokens = len(table), table.shape[1] * k_context.shape[1]
        k_context, v_context = (
            x[table.long()].reshape(rows, tokens, *x.shape[2:])
            for x in (k_context, v_context)  # -1 reads NaN
        )
    index = inputs.pop("context_index", None)
    if index is not None:
        k_context, v_context = k_context[index], v_context[index]
    inputs |= {"k_context": k_context, "v_context": v_context}
    for name in ("q", "k", "v", "k_context", "v_context"):
        inputs[name] = inputs[name].contiguous()
    for got, one in zip(attend(**inputs), expected, strict=True):
        close(got, one)


@settings(max_examples=40)
@given(sizes=problems(), seed=st.integers(0, 2**31))
def test_append_then_attend_is_attention_over_the_concatenation(sizes, seed):
    """Row after row, the block is written behind its context; then another block sees both."""
    batch, block = sizes["batch"], sizes["block"]
    lens, counts = sizes["context_lens"] or [0] * batch, sizes["block_lens"] or [block] * batch
    page = sizes["page"] or 1
    roomy = sizes | {"context_lens": lens, "context": -(-(sizes["context"] + block) // page) * page}
    roomy |= {"context_rows": batch, "context_index": list(range(batch))[::-1]}
    roomy = {name: x for name, x in roomy.items() if name not in ("window", "softcap", "context_starts", "sinks")}
    inputs = make_inputs("append_kv", roomy, dtype=torch.float64, seed=seed)
    before = {name: x.clone() for name, x in inputs.items()}
    assert append_kv(**inputs) is None

    q = randn(batch, 2, sizes["heads"], sizes["head_dim"])
    grown = {
        name: inputs[name] for name in ("k_context", "v_context", "context_index", "block_table") if name in inputs
    }
    got = attend(
        q=q, **grown, context_lens=torch.tensor(lens, dtype=torch.int64) + torch.tensor(counts, dtype=torch.int64)
    )
    storage = {name: before[name] for name in (*grown, "context_lens")}
    old = attend(q=q, **storage)
    new = attend(
        q=q, k_context=before["k"], v_context=before["v"], context_lens=torch.tensor(counts, dtype=torch.int64)
    )
    for one, other in zip(got, merge_attention(*old, *new), strict=True):
        close(one, other)
    for name in (
        "k_context",
        "v_context",
    ):  # a written place held NaN before and holds a number now; others are as before
        changed = ~((inputs[name] == before[name]) | (inputs[name].isnan() & before[name].isnan()))
        assert int(changed.any(-1).any(-1).sum()) == sum(counts)
        assert bool(before[name][changed].isnan().all())


def test_the_window_is_the_same_for_every_query_of_the_block():
    """DiffusionGemma's sliding layers keep the last sliding_window - 1 tokens before the block."""
    q, k, v = randn(1, 3, 2, 4), randn(1, 3, 1, 4, seed=1), randn(1, 3, 1, 4, seed=2)
    k_context, v_context = randn(1, 9, 1, 4, seed=3), randn(1, 9, 1, 4, seed=4)
    for causal in (False, True):
        got = block_attention(q, k, v, k_context, v_context, context_lens=7, window=4, causal=causal)
        close(got, block_attention(q, k, v, k_context[:, 3:7], v_context[:, 3:7], causal=causal))
        close(
            block_attention(q, k, v, k_context, v_context, window=0, causal=causal),
            block_attention(q, k, v, causal=causal),
        )


def test_lengths_may_be_scalars_or_tensors_of_either_integer_type():
    inputs = make_inputs("block_attention", {"context": 6, "block": 4}, dtype=torch.float64)
    expected = block_attention(**inputs, context_lens=torch.tensor([5, 5]), block_lens=torch.tensor([3, 3]))
    for context, block in ((5, 3), (torch.tensor(5), torch.tensor(3, dtype=torch.int32))):
        assert torch.equal(block_attention(**inputs, context_lens=context, block_lens=block), expected)
    five = torch.tensor([5, 5], dtype=torch.int32)
    assert torch.equal(block_attention(**inputs, context_lens=five, block_lens=3), expected)


# --- edges ----------------------------------------------------------------------------------------------------------


def test_no_key_gives_zero_and_minus_infinity_never_nan():
    inputs = make_inputs("block_attention", {"context": 4, "context_lens": [0, 4], "block_lens": [0, 2]})
    out, lse = attend(**inputs)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and bool(lse[0].isneginf().all())
    assert torch.equal(out[1, 2:], torch.zeros_like(out[1, 2:])) and bool(lse[1, 2:].isneginf().all())
    assert bool(lse[1, :2].isfinite().all())
    out, lse = attend(q=inputs["q"], k_context=inputs["k_context"], v_context=inputs["v_context"], context_lens=0)
    assert torch.equal(out, torch.zeros_like(out)) and bool(lse.isneginf().all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_beyond_a_length_is_looked_at_forward_or_backward(poison):
    sizes = {"batch": 3, "context": 6, "context_lens": [6, 0, 2], "block_lens": [5, 2, 0], "window": 3}
    clean = make_inputs("block_attention", sizes, dtype=torch.float64)
    dirty = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    for inputs, value in ((clean, 0.0), (dirty, poison)):
        for name in ("q", "k", "v", "k_context", "v_context"):
            inputs[name] = (
                inputs[name].nan_to_num(value) if value == 0 else torch.where(inputs[name].isnan(), value, inputs[name])
            )
            if name in "qkv":
                inputs[name].requires_grad_()
    results = []
    for inputs in (clean, dirty):
        out, lse = attend(**inputs)
        loss = (out * out).sum() + lse[lse.isfinite()].sum()
        results.append((out, lse, *torch.autograd.grad(loss, [inputs[name] for name in "qkv"])))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)
    for gradient in results[1][2:]:
        assert bool((gradient[1, 2:] == 0).all()) and bool((gradient[2] == 0).all())


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_extreme_logits_do_not_overflow(size):
    q, k, v = (randn(1, 4, 2, 8, seed=s, dtype=torch.float32) for s in range(3))
    out, lse = block_attention(q * size, k, v, k, v, return_lse=True)
    exact, exact_lse = oracle({"q": q * size, "k": k, "v": v, "k_context": k, "v_context": v})
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)
    plain, plain_lse = naive({"q": q * size, "k": k, "v": v, "k_context": k, "v_context": v})
    assert_within_budget(out, plain, exact)
    assert_within_budget(lse, plain_lse, exact_lse)


def test_out_is_written_in_place_whatever_its_strides():
    for op in ("block_attention", "context_attention"):
        inputs = make_inputs(op, "transposed")
        expected, lse = OPS[op](**inputs, return_lse=True)
        storage = torch.full((2, 4, 5, 16), 7.0)
        out = storage.transpose(1, 2)[..., :8]  # [B,S,Hq,D]
        result, result_lse = OPS[op](**inputs, return_lse=True, out=out)
        assert result is out and torch.equal(out, expected) and torch.equal(result_lse, lse)
        assert bool((storage[..., 8:] == 7).all())
        assert OPS[op](**inputs, out=out) is out


# --- gradients ------------------------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "grouped": {"context": 4, "context_lens": [4, 2]},
    "causal": {"causal": True, "context": 3},
    "softcap": {"softcap": 1.5, "scale": 0.8, "context": 3},
    "ragged": {"context": 3, "context_lens": [0, 3], "block_lens": [2, 0]},
    "window": {"context": 5, "context_lens": [5, 1], "window": 2},
    "paged": {"context": 4, "page": 2, "context_lens": [1, 4]},
    "folded": {"batch": 3, "context": 4, "context_rows": 1, "context_index": [0, 0, 0], "context_lens": [0, 2, 4]},
    "sinks": {"context": 3, "context_lens": [0, 3], "block_lens": [2, 0], "sinks": True, "value_dim": 2},
}


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients(case):
    sizes = {"block": 3, "heads": 2, "kv_heads": 1, "head_dim": 3} | DIFFERENTIABLE[case]
    inputs = make_inputs("block_attention", sizes, dtype=torch.float64)
    names = [n for n, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point() and n[2:] != "context"]
    leaves = tuple(inputs.pop(name).nan_to_num(0.5).requires_grad_() for name in names)

    def function(*tensors):
        out, lse = block_attention(**dict(zip(names, tensors, strict=True)), **inputs, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_of_the_halves_and_of_their_merge():
    q, k, v = (randn(2, 3, n, 3, seed=s).requires_grad_() for n, s in ((2, 0), (1, 1), (1, 2)))
    k_context, v_context = randn(2, 4, 1, 3, seed=3), randn(2, 4, 1, 3, seed=4)

    def function(q, k, v):
        past = context_attention(q, k_context, v_context, context_lens=torch.tensor([0, 3]), return_lse=True)
        own = block_attention(q, k, v, return_lse=True, block_lens=torch.tensor([2, 0]))
        out, lse = merge_attention(*past, *own)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(function, (q, k, v))

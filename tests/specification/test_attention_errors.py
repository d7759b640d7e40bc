"""Arguments that do not fit: the attention ops say what was expected and what came, before they write anything."""

import math

import pytest
import torch

from twotower_kernels.reference.attention import (
    append_kv,
    block_attention,
    block_causal_attention,
    context_attention,
    make_inputs,
    merge_attention,
)

SIZES = {"context": 8, "context_lens": [8, 3], "block_lens": [5, 2]}
BAD_BLOCK = {
    "q of rank 3": (lambda a: a.update(q=a["q"][0]), ValueError, "q: expected 4 axes"),
    "k of another length": (lambda a: a.update(k=a["k"][:, :4], v=a["v"][:, :4]), ValueError, r"k, v: expected \[2, 5"),
    "v unlike k": (lambda a: a.update(v=a["v"][:, :, :1]), ValueError, "k, v: expected"),
    "k of another dtype": (lambda a: a.update(k=a["k"].half()), TypeError, "k: expected torch.float32"),
    "integers": (lambda a: a.update(q=a["q"].nan_to_num().int()), TypeError, "q: expected float64"),
    "heads not a multiple": (
        lambda a: a.update(q=a["q"][:, :, :3]),
        ValueError,
        "q: expected a multiple of the 2 heads",
    ),
    "context of other heads": (
        lambda a: a.update(k_context=a["k_context"][:, :, :1], v_context=a["v_context"][:, :, :1]),
        ValueError,
        "k_context: expected 2 key heads",
    ),
    "context of other head_dim": (
        lambda a: a.update(k_context=a["k_context"][..., :4], v_context=a["v_context"][..., :4]),
        ValueError,
        "head_dim 8",
    ),
    "context of other rows": (
        lambda a: a.update(k_context=a["k_context"][:0], v_context=a["v_context"][:0]),
        ValueError,
        "context: expected 2 rows",
    ),
    "context values of other head_dim": (
        lambda a: a.update(v_context=a["v_context"][..., :4]),
        ValueError,
        "v_context: expected head_dim 8 as in v, got 4",
    ),
    "starts beyond the storage": (
        lambda a: a.update(context_starts=torch.tensor([0, 9])),
        ValueError,
        r"context_starts: expected values in \[0, 8\], got \[0, 9\]",
    ),
    "sinks of other heads": (lambda a: a.update(sinks=torch.zeros(3)), ValueError, r"sinks: expected \[4\]"),
    "sinks that are integers": (lambda a: a.update(sinks=torch.arange(4)), TypeError, "sinks: expected .*float"),
    "keys without values": (lambda a: a.pop("v_context"), ValueError, "both or neither"),
    "lengths without a context": (
        lambda a: (a.pop("k_context"), a.pop("v_context")),
        ValueError,
        r"context_lens: expected values in \[0, 0\], got \[8, 3\]",
    ),
    "an index without a context": (
        lambda a: (a.pop("k_context"), a.pop("v_context"), a.update(context_index=torch.tensor([0, 1]))),
        ValueError,
        "expected none without a context",
    ),
    "negative length": (
        lambda a: a.update(context_lens=torch.tensor([3, -1])),
        ValueError,
        r"context_lens: .*got \[3, -1\]",
    ),
    "length beyond storage": (
        lambda a: a.update(context_lens=9),
        ValueError,
        r"context_lens: expected values in \[0, 8\]",
    ),
    "lengths of another batch": (
        lambda a: a.update(context_lens=torch.tensor([3])),
        ValueError,
        "context_lens: expected",
    ),
    "lengths that are floats": (lambda a: a.update(context_lens=torch.tensor([3.0, 1])), TypeError, "int32 or int64"),
    "lengths that are a list": (lambda a: a.update(context_lens=[3, 1]), TypeError, "context_lens: .* got list"),
    "block length beyond the block": (lambda a: a.update(block_lens=6), ValueError, r"block_lens: expected .*\[0, 5\]"),
    "index beyond the rows": (
        lambda a: a.update(context_index=torch.tensor([0, 2])),
        ValueError,
        r"context_index: expected rows in \[0, 2\), got \[0, 2\]",
    ),
    "index of another batch": (
        lambda a: a.update(context_index=torch.tensor([0])),
        ValueError,
        r"context_index: .*\[2\]",
    ),
    "block table of rank 1": (lambda a: a.update(block_table=torch.tensor([0])), ValueError, "block_table: expected"),
    "page that does not exist": (
        lambda a: a.update(block_table=torch.tensor([[0], [2]])),
        ValueError,
        r"block_table: expected pages in \[0, 2\)",
    ),
    "negative page in use": (lambda a: a.update(block_table=torch.tensor([[0], [-1]])), ValueError, "block_table"),
    "negative window": (lambda a: a.update(window=-1), ValueError, "window: expected"),
    "window that is no integer": (lambda a: a.update(window=1.5), ValueError, "window: expected"),
    "negative softcap": (lambda a: a.update(softcap=-1.0), ValueError, "softcap: expected"),
    "scale that is no number": (lambda a: a.update(scale=math.nan), ValueError, "scale: expected"),
    "out of another shape": (lambda a: a.update(out=torch.empty(2, 5, 4, 7)), ValueError, "out: expected"),
    "out of another dtype": (lambda a: a.update(out=a["q"].double()), ValueError, "out: expected"),
    "out with gradients": (
        lambda a: (a["q"].requires_grad_(), a.update(out=torch.empty(2, 5, 4, 8))),
        ValueError,
        "carry no gradient",
    ),
}


@pytest.mark.parametrize("fault", BAD_BLOCK)
def test_block_attention_says_what_is_wrong(fault):
    spoil, error, message = BAD_BLOCK[fault]
    inputs = make_inputs("block_attention", SIZES)
    block_attention(**inputs)
    spoil(inputs)
    out = inputs.setdefault("out", torch.full(inputs["q"].shape, 7.0))
    before = out.clone()
    with pytest.raises(error, match=message):
        block_attention(**inputs)
    assert torch.equal(out.nan_to_num(), before.nan_to_num()), "written before the checks passed"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(lse_b=a["lse_b"][:1]), ValueError, "lse_b: expected"),
        (lambda a: a.update(out_b=a["out_b"].half()), ValueError, "out_b: expected"),
        (lambda a: a.update(lse_a=a["lse_a"][..., :1], lse_b=a["lse_b"][..., :1]), ValueError, "lse_a: expected"),
        (
            lambda a: a.update(lse_a=a["lse_a"].half(), lse_b=a["lse_b"].half()),
            TypeError,
            "lse_a: expected torch.float32",
        ),
    ],
)
def test_merge_attention_says_what_is_wrong(change, error, message):
    inputs = make_inputs("merge_attention", "tiny")
    change(inputs)
    with pytest.raises(error, match=message):
        merge_attention(**inputs)


BAD_APPEND = {
    "beyond the storage": (lambda a: a.update(context_lens=torch.tensor([8, 0])), ValueError, "expected at most 12"),
    "no lengths": (lambda a: a.update(context_lens="8"), TypeError, "context_lens: expected an integer"),
    "two rows to one place": (
        lambda a: a.update(context_index=torch.tensor([1, 1]), context_lens=3),
        ValueError,
        "same",
    ),
    "a block of other heads": (
        lambda a: a.update(k=a["k"][:, :, :1], v=a["v"][:, :, :1]),
        ValueError,
        "as in the context",
    ),
    "values of another dtype": (lambda a: a.update(v=a["v"].half()), TypeError, "v: expected torch.float32"),
    "a block that requires grad": (lambda a: a["k"].requires_grad_(), ValueError, "not differentiable"),
    "storage that requires grad": (lambda a: a["k_context"].requires_grad_(), ValueError, "expected no requires_grad"),
    "a page that is not reserved": (
        lambda a: a.update(block_table=torch.tensor([[0, -1], [1, -1]]), context_lens=10),
        ValueError,
        "block_table: expected pages",
    ),
}


@pytest.mark.parametrize("fault", BAD_APPEND)
def test_append_kv_says_what_is_wrong_and_writes_nothing(fault):
    spoil, error, message = BAD_APPEND[fault]
    inputs = make_inputs("append_kv", {"context": 12, "context_lens": [7, 0]})
    spoil(inputs)
    before = {name: inputs[name].detach().clone() for name in ("k_context", "v_context")}
    with pytest.raises(error, match=message):
        append_kv(**inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name].detach().nan_to_num(9), x.nan_to_num(9))


def test_context_attention_checks_the_same():
    inputs = make_inputs("context_attention", "tiny")
    for change, error, message in (
        ({"context_lens": 8}, ValueError, r"context_lens: expected values in \[0, 7\]"),
        ({"q": inputs["q"][:, :, :3]}, ValueError, "q: expected a multiple of the 2 heads of k_context"),
        ({"k_context": inputs["k_context"].half()}, TypeError, "k_context: expected torch.float32"),
        ({"v_context": inputs["v_context"][:, :4]}, ValueError, "k_context, v_context: expected equal shapes"),
    ):
        with pytest.raises(error, match=message):
            context_attention(**inputs | change)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_a_block_size_is_an_integer_above_zero(size, error):
    inputs = make_inputs("block_causal_attention", "tiny") | {"block_size": size}
    with pytest.raises(error, match="block_size: expected"):
        block_causal_attention(**inputs)

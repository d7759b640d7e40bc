"""Arguments that do not fit the attention ops: the faults that the specification refuses, and some of the kernels'."""

import pytest
import torch

import twotower_kernels as tt
from tests.specification.test_attention_errors import BAD_APPEND, BAD_BLOCK, SIZES
from twotower_kernels.reference.attention import make_inputs


@pytest.mark.parametrize("fault", BAD_BLOCK)
def test_block_attention_says_what_is_wrong(fault: str) -> None:
    spoil, error, message = BAD_BLOCK[fault]
    inputs = make_inputs("block_attention", SIZES)
    tt.block_attention(**inputs)
    spoil(inputs)
    out = inputs.setdefault("out", torch.full(inputs["q"].shape, 7.0))
    before = out.clone()
    with pytest.raises(error, match=message):
        tt.block_attention(**inputs)
    assert torch.equal(out.nan_to_num(), before.nan_to_num()), "written before the checks passed"


@pytest.mark.parametrize("fault", BAD_APPEND)
def test_append_kv_says_what_is_wrong_and_writes_nothing(fault: str) -> None:
    spoil, error, message = BAD_APPEND[fault]
    inputs = make_inputs("append_kv", {"context": 12, "context_lens": [7, 0]})
    spoil(inputs)
    before = {name: inputs[name].detach().clone() for name in ("k_context", "v_context")}
    with pytest.raises(error, match=message):
        tt.append_kv(**inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name].detach().nan_to_num(9), x.nan_to_num(9))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"lse_b": a["lse_b"][:1]}, ValueError, "lse_b: expected"),
        (lambda a: {"out_b": a["out_b"].half()}, ValueError, "out_b: expected"),
        (lambda a: {n: a[n][..., :1] for n in ("lse_a", "lse_b")}, ValueError, r"lse_a: expected \[2, 5, 4\]"),
        (lambda a: {n: a[n].half() for n in ("lse_a", "lse_b")}, TypeError, "lse_a: expected torch.float32"),
        (lambda a: {n: a[n].int() for n in ("out_a", "out_b")}, TypeError, "out_a: expected float64"),
        (lambda a: {"out_b": a["out_b"].to("meta")}, ValueError, "out_b: expected device cpu, got meta"),
    ],
)
def test_merge_attention_says_what_is_wrong(change, error, message):  # type: ignore[no-untyped-def]
    inputs = make_inputs("merge_attention", "tiny")
    with pytest.raises(error, match=message):
        tt.merge_attention(**inputs | change(inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context_lens": 8}, ValueError, r"context_lens: expected values in \[0, 7\]"),
        ({"block_lens": torch.tensor([0, 6])}, ValueError, r"block_lens: expected values in \[0, 5\], got \[0, 6\]"),
        ({"q": torch.zeros(2, 5, 3, 8)}, ValueError, "q: expected a multiple of the 2 heads of k_context"),
        ({"q": torch.zeros(2, 5, 4, 0)}, ValueError, "k_context, v_context: expected equal shapes with head_dim 0"),
        ({"k_context": torch.zeros(2, 7, 2, 8).half()}, TypeError, "k_context: expected torch.float32"),
        ({"k_context": torch.zeros(2, 7, 2, 8, device="meta")}, ValueError, "k_context: expected device cpu"),
        ({"causal": 2}, TypeError, "causal: expected True or False, got 2"),
        ({"context_starts": torch.tensor([0, 8])}, ValueError, r"context_starts: expected values in \[0, 7\]"),
        ({"context_starts": -1}, ValueError, r"context_starts: expected values in \[0, 7\], got -1"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks: expected device cpu, got meta"),
        ({"context_index": torch.tensor([0.0, 1])}, TypeError, "context_index: expected int32 or int64"),
    ],
)
def test_context_attention_says_what_is_wrong(change, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        tt.context_attention(**make_inputs("context_attention", "tiny") | change)


def test_a_head_dimension_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="q: expected head_dim of at least 1"):
        tt.block_attention(*[torch.zeros(1, 2, 2, 0)] * 3)


@pytest.mark.parametrize("name", ["k_context", "v_context"])
def test_storage_that_cannot_be_written_in_place_is_refused(name: str) -> None:
    inputs = make_inputs("append_kv", "tiny")
    inputs[name] = inputs[name].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=f"{name}: expected a contiguous last dimension to write to, got stride 2"):
        tt.append_kv(**inputs)


def test_append_kv_refuses_two_sequences_on_one_page_unless_they_write_apart() -> None:
    inputs = make_inputs("append_kv", {"context": 12, "context_lens": [0, 4], "block": 4})
    inputs |= {"k_context": torch.zeros(1, 12, 2, 8), "v_context": torch.zeros(1, 12, 2, 8)}
    inputs["context_index"] = torch.tensor([0, 0])
    tt.append_kv(**inputs)
    assert torch.equal(inputs["k_context"][0, :8], inputs["k"].flatten(0, 1))
    with pytest.raises(ValueError, match="two on the same place"):
        tt.append_kv(**inputs | {"context_lens": torch.tensor([0, 3])})


def test_second_derivatives_are_refused() -> None:
    q = torch.randn(1, 2, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(tt.block_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward is not differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
        ({"block_size": 2.5}, TypeError, "block_size: expected an integer"),
        ({"seq_lens": 8}, ValueError, r"seq_lens: expected values in \[0, 7\], got 8"),
        ({"seq_lens": torch.tensor([7, 8])}, ValueError, r"seq_lens: expected values in \[0, 7\], got \[7, 8\]"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected \[4\], one per head of q, got \[2\]"),
    ],
)
def test_block_causal_attention_says_what_is_wrong(change, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        tt.block_causal_attention(**make_inputs("block_causal_attention", "tiny") | change)

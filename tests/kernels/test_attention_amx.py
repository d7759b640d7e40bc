"""Attention by AMX's tiles, in bfloat16 (csrc/cpu/attention_amx.h); emulated where the machine has none. The tests of
every instruction set draw it too, among the others."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import instruction_set
from tests.kernels.test_attention_kernel import assert_agrees, threads
from twotower_kernels.reference import attention
from twotower_kernels.testing.cases import attention as cases


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=25)
@given(
    sizes=cases.sizes(),
    head_dim=st.sampled_from([1, 17, 32, 33, 64, 128, 160]),
    op=st.sampled_from(["block_attention", "context_attention"]),
    causal=st.booleans(),
    layout=st.integers(0, 3),
    count=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([1.0, 1e-3, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, head_dim, op, causal, layout, count, size, seed):  # type: ignore[no-untyped-def]
    sizes |= {"head_dim": head_dim, "causal": causal}
    inputs = attention.make_inputs(op, sizes, dtype=torch.bfloat16, seed=seed)
    inputs["q"] = inputs["q"] * size
    with instruction_set("amx"), threads(count):
        assert_agrees(op, inputs, layout)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-60, 40.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_any_scale(scale: float, softcap: float) -> None:
    """The largest logit is not that of the largest product where the scale is not positive."""
    inputs = attention.make_inputs("block_attention", {"context": 130, "block": 40}, dtype=torch.bfloat16)
    with instruction_set("amx"):
        assert_agrees("block_attention", inputs | {"scale": scale, "softcap": softcap})


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (5, 1), (32, 2)]),
    dim=st.sampled_from([8, 40, 128]),
    keys=st.one_of(st.integers(1, 200), st.integers(380, 800)),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
@example(rows=17, heads=(32, 2), dim=128, keys=777, counts=(2, 1), softcap=0.0, seed=0)  # every width of a panel
def test_a_query_is_the_same_alone(
    rows: int, heads: tuple[int, int], dim: int, keys: int, counts: tuple[int, int], softcap: float, seed: int
) -> None:
    """Whatever shares its strip of 32 rows, and however many strips there are."""
    q = drawn(seed, 1, rows, heads[0], dim)
    k, v = (drawn(seed + i, 1, keys, heads[1], dim) for i in (1, 2))
    with instruction_set("amx"):
        with threads(counts[0]):
            together = tt.context_attention(q, k, v, softcap=softcap, return_lse=True)
        with threads(counts[1]):
            for t in range(0, rows, 3):
                alone = tt.context_attention(q[:, t : t + 1], k, v, softcap=softcap, return_lse=True)
                for one, all_ in zip(alone, together, strict=True):
                    assert torch.equal(one[:, 0], all_[:, t]), t


@pytest.mark.parametrize("context", [0, 90, 385])
def test_subnormal_sums_are_the_same_one_by_one(context: int) -> None:
    """A product of tiles flushes them, also where it adds hidden keys alone; values of 2^-120 make some."""
    tokens, dim = 24, 8
    q = drawn(0, 1, tokens, 4, dim) * 4
    k, v = (drawn(i, 1, context + tokens, 2, dim) for i in (1, 2))
    v *= 2.0**-120

    def run(first: int, count: int) -> Tensor:
        seen, block = context + first, slice(context + first, context + first + count)
        return tt.block_attention(
            q[:, first : first + count], k[:, block], v[:, block], k_context=k, v_context=v, context_lens=seen,
            causal=True,
        )  # fmt: skip

    with instruction_set("amx"):
        together = run(0, tokens)
        assert (together != 0).any()
        for t in range(tokens):
            assert torch.equal(run(t, 1)[:, 0], together[:, t]), t

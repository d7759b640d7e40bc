"""Attention's Triton kernels in the interpreter: the CPU kernels' demands, without float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.gpu.triton_checks import DTYPES, triton_kernels
from tests.kernels.test_attention_kernel import ATTENDING, EVERY, assert_agrees, assert_same_storage, small
from twotower_kernels.reference import attention
from twotower_kernels.testing.cases.attention import appends, sides, sizes
from twotower_kernels.testing.layouts import awkward
from twotower_kernels.triton import attention as kernels
from twotower_kernels.triton.attention_tuning import Tuning, splits_for


def cases() -> list[tuple[str, str]]:
    ops = (*EVERY, "merge_attention", "append_kv")
    return [(op, case) for op in ops for case in small(op)]


@contextmanager
def pinned(splits: int, tuning: Tuning) -> Iterator[None]:
    with (
        mock.patch.object(kernels, "splits_for", lambda *_: splits),
        mock.patch.object(kernels, "tuning", lambda *_: tuning),
        triton_kernels(),
    ):
        yield


# --- against the specification --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), cases())
def test_every_case(op: str, case: str) -> None:
    with triton_kernels():
        for dtype in DTYPES:
            inputs = attention.make_inputs(op, case, dtype=dtype)
            assert_same_storage(inputs) if op == "append_kv" else assert_agrees(op, inputs)


@settings(max_examples=8)
@given(
    sizes=sizes(),
    causal=st.booleans(),
    op=st.sampled_from(ATTENDING),
    dtype=st.sampled_from(DTYPES),
    layout=st.integers(0, 3),
    size=st.sampled_from([1.0, 1.0, 1e-3, 30.0]),
    tiles=st.sampled_from([(16, 16), (32, 16), (64, 64)]),
    columns=st.sampled_from([256, 16]),
    splits=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, causal, op, dtype, layout, size, tiles, columns, splits, seed):  # type: ignore[no-untyped-def]
    sizes |= {"causal": causal, "block": min(sizes["block"], 19)}
    sizes |= {"block_lens": None if sizes["block_lens"] is None else [min(n, 19) for n in sizes["block_lens"]]}
    inputs = attention.make_inputs(op, sizes, dtype=dtype, seed=seed)
    inputs["q"] = inputs["q"] * size
    with pinned(splits, Tuning(*tiles, 4, 2, columns)):
        assert_agrees(op, inputs, layout)


@settings(max_examples=6)
@given(
    sizes=sizes(),
    block_size=st.sampled_from([1, 2, 7, 32]),
    dtype=st.sampled_from(DTYPES),
    tiles=st.sampled_from([(16, 16), (64, 32)]),
    splits=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_any_sequence_of_blocks(sizes, block_size, dtype, tiles, splits, seed):  # type: ignore[no-untyped-def]
    sizes = {n: x for n, x in sizes.items() if not n.startswith(("context", "page", "window"))}
    sizes |= {"block": min(sizes["block"], 40), "block_size": block_size}
    sizes |= {"block_lens": None if sizes["block_lens"] is None else [min(n, 40) for n in sizes["block_lens"]]}
    inputs = attention.make_inputs("block_causal_attention", sizes, dtype=dtype, seed=seed)
    with pinned(splits, Tuning(*tiles, 4, 2)):
        assert_agrees("block_causal_attention", inputs)


@settings(max_examples=6)
@given(sizes=appends(), dtype=st.sampled_from(DTYPES), layout=st.integers(0, 2))
def test_any_append(sizes, dtype, layout):  # type: ignore[no-untyped-def]
    with triton_kernels():
        assert_same_storage(attention.make_inputs("append_kv", sizes, dtype=dtype), layout)


@settings(max_examples=25)
@given(inputs=st.sampled_from(DTYPES).flatmap(sides), layout=st.integers(0, 3))
def test_any_merge(inputs, layout):  # type: ignore[no-untyped-def]
    with triton_kernels():
        assert_agrees("merge_attention", inputs, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 96])
def test_head_dims_between_the_powers_of_two(dim: int, dtype: torch.dtype) -> None:
    sizes = {"head_dim": dim, "context": 150, "context_lens": [150, 71], "causal": True, "heads": 2, "kv_heads": 1}
    with triton_kernels():
        assert_agrees("block_attention", attention.make_inputs("block_attention", sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [257, 320])
def test_heads_wider_than_a_program_sums(dim: int, dtype: torch.dtype) -> None:
    sizes = {"head_dim": dim, "block": 2, "context": 40, "context_lens": [40, 7], "causal": True, "kv_heads": 1}
    with triton_kernels():
        assert_agrees("block_attention", attention.make_inputs("block_attention", sizes, dtype=dtype))


@pytest.mark.parametrize("splits", [1, 3])
def test_programs_that_share_a_tile_of_rows_give_the_same_result(splits: int) -> None:
    """Whatever the columns of each, the logits are those of the whole head."""
    inputs = attention.make_inputs("block_attention", {"head_dim": 40, "context": 70, "block_lens": [5, 2]})
    results = []
    for columns in (64, 16):
        with pinned(splits, Tuning(16, 16, 4, 2, columns)):
            results.append(tt.block_attention(**inputs, return_lse=True))
    (whole, lse), (shared, shared_lse) = results
    torch.testing.assert_close(shared, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(shared_lse, lse)


@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_pages_of_a_tile_and_more(page: int, window: int | None) -> None:
    """A tile of keys within one page looks up its page once."""
    sizes = {"context": 256, "page": page, "context_lens": [256, 90], "window": window}
    with pinned(2, Tuning(16, 32, 4, 2)):
        assert_agrees("block_attention", attention.make_inputs("block_attention", sizes))


# --- splits and tiles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 3, 15])
@pytest.mark.parametrize("tiles", [(16, 16), (64, 32)])
def test_splits_and_tiles_change_rounding_alone(splits: int, tiles: tuple[int, int]) -> None:
    """Also more splits than there are tiles, and rows that are shorter than others."""
    sizes = {"batch": 3, "kv_heads": 1, "context": 150, "context_lens": [150, 0, 31], "block_lens": [5, 2, 0]}
    inputs = attention.make_inputs("block_attention", sizes | {"causal": True})
    with pinned(splits, Tuning(*tiles, 4, 2)):
        got = tt.block_attention(**inputs, return_lse=True)
        again = tt.block_attention(**inputs, return_lse=True)
        assert_agrees("block_attention", inputs)
    with pinned(1, Tuning(32, 64, 4, 2)):
        whole = tt.block_attention(**inputs, return_lse=True)
    for x, y, z in zip(got, again, whole, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    """Bit for bit, as long as the keys are cut into as many splits."""
    inputs = attention.make_inputs("block_attention", {"batch": 3, "context": 100, "context_lens": [100, 40, 0]})
    with pinned(3, Tuning(16, 16, 4, 2)):
        together = tt.block_attention(**inputs)
        for b in range(3):
            alone = tt.block_attention(**{name: x[b : b + 1] for name, x in inputs.items()})
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize(
    "sizes", [{}, {"window": 70}, {"page": 16}, {"causal": True, "block": 40}, {"context_starts": [37, 0, 0]}]
)
@pytest.mark.parametrize("splits", [1, 4])
def test_masks_change_nothing_in_tiles_that_cross_no_bound(op: str, sizes: dict[str, Any], splits: int) -> None:
    """With masks on all tiles as with masks on those alone that need them. Only a first tile that the beginning of what
    is seen crosses comes later."""
    sizes = {"batch": 3, "heads": 4, "context": 160, "context_lens": [155, 64, 7]} | sizes
    inputs = attention.make_inputs(op, sizes)
    results = []
    for peeling in ((), (90,)):
        with pinned(splits, Tuning(16, 16, 4, 2)), mock.patch.object(kernels, "PEELING", peeling):
            results.append(getattr(tt, op)(**inputs, return_lse=True))
    for masked, peeled in zip(*results, strict=True):
        if sizes.keys() & {"window", "context_starts"}:
            torch.testing.assert_close(peeled, masked, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(peeled, masked)


def test_keys_may_lie_further_apart_than_32_bits_reach(tmp_path: Path) -> None:
    """Within a row of the context, beyond 2**31 numbers. (Of this file only what is written exists.)"""
    tokens, step, dim = 20, 2**27, 16
    file = str(tmp_path / "sparse")
    storage = torch.from_file(file, shared=True, size=tokens * step, dtype=torch.bfloat16)
    inputs = attention.make_inputs("context_attention", {"batch": 1, "kv_heads": 1, "context": tokens, "head_dim": dim})
    inputs = {name: x.bfloat16() for name, x in inputs.items() if name in ("q", "k_context", "v_context")}
    far = {name: storage[i * dim :].as_strided((1, tokens, 1, dim), (0, step, 0, 1)) for i, name in enumerate(inputs)}
    for name in ("k_context", "v_context"):
        far[name].copy_(inputs[name])
    with pinned(1, Tuning(16, 16, 4, 2)):
        expected = tt.context_attention(**inputs)
        assert torch.equal(tt.context_attention(**far | {"q": inputs["q"]}), expected)


@pytest.mark.parametrize(
    ("items", "tiles", "expected"),
    [(4, 2049, 33), (4, 66, 33), (4, 2, 1), (256, 66, 1), (1, 2049, 129), (2000, 4000, 1), (132, 66, 1)],
)
def test_keys_are_split_as_long_as_processors_would_idle(items: int, tiles: int, expected: int) -> None:
    assert splits_for(items, tiles, 132) == expected


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_extreme_logits_do_not_overflow(size: float) -> None:
    inputs = attention.make_inputs("block_attention", {"context": 70, "block": 9})
    inputs["q"] = inputs["q"] * size
    with triton_kernels():
        assert_agrees("block_attention", inputs)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_any_scale(scale: float, softcap: float) -> None:
    inputs = attention.make_inputs("block_attention", {"context": 70, "scale": scale, "softcap": softcap})
    with triton_kernels():
        assert_agrees("block_attention", inputs)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_beyond_a_length_is_looked_at(poison: float, splits: int) -> None:
    sizes = {"batch": 3, "context": 66, "page": 6, "context_lens": [66, 0, 13], "block_lens": [5, 2, 0], "window": 60}
    inputs = attention.make_inputs("block_attention", sizes)
    inputs |= {k: v.nan_to_num(poison) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    table = inputs["block_table"]
    inputs["block_table"] = torch.where(table < 0, torch.iinfo(table.dtype).max, table)
    with pinned(splits, Tuning(16, 16, 4, 2)):
        out, lse = tt.block_attention(**inputs, return_lse=True)
    clean = attention.make_inputs("block_attention", sizes)
    expected, expected_lse = attention.block_attention(**clean, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_query_stays_in_its_row_and_in_a_key_in_its_head(splits: int) -> None:
    inputs = attention.make_inputs("block_attention", {"context": 70, "causal": True})
    with pinned(splits, Tuning(16, 16, 4, 2)):
        clean = tt.block_attention(**inputs)
        inputs["q"][1, 3, 2, 0] = torch.nan
        got = tt.block_attention(**inputs)
        assert got[1, 3, 2].isnan().all()
        got[1, 3, 2] = clean[1, 3, 2]
        assert torch.equal(got, clean)
        inputs["k_context"][0, 5, 1, 0] = torch.nan
        got = tt.block_attention(**inputs)
        assert got[0, :, 2:].isnan().all() and torch.equal(got[0, :, :2], clean[0, :, :2])


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_out_is_written_in_place_whatever_its_strides(op: str, layout: int) -> None:
    inputs = attention.make_inputs(op, "ragged")
    with triton_kernels():
        expected, expected_lse = getattr(tt, op)(**inputs, return_lse=True)
        out = awkward(torch.full_like(expected, 7.0), layout)
        result, lse = getattr(tt, op)(**inputs, return_lse=True, out=out)
    assert result is out and torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_lengths_may_be_scalars_or_tensors_of_either_integer_type() -> None:
    inputs = attention.make_inputs("block_attention", {"context": 6, "block": 4})
    with triton_kernels():
        expected = tt.block_attention(**inputs, context_lens=torch.tensor([5, 5]), block_lens=torch.tensor([3, 3]))
        for context, block in ((5, 3), (torch.tensor(5), torch.tensor(3, dtype=torch.int32))):
            assert torch.equal(tt.block_attention(**inputs, context_lens=context, block_lens=block), expected)


# --- values that a CPU kernel refuses: no host looks at them here, and nothing beyond storage is touched ----------


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ({"context_lens": [900, -3]}, {"context_lens": [12, 0]}),
        ({"block_lens": [6, -1]}, {"block_lens": [5, 0]}),
        ({"context_index": [7, -7]}, {"context_index": [1, 0]}),
        ({"block_table": [[1, 90, 2], [0, -5, 3]]}, {"block_table": [[1, 6, 2], [0, 0, 3]]}),
    ],
)
def test_what_is_out_of_range_is_brought_into_it(change: dict[str, Any], meant: dict[str, Any]) -> None:
    inputs = attention.make_inputs("block_attention", {"context": 12, "page": 4, "context_index": [0, 1]})
    inputs = {k: v.nan_to_num() if v.is_floating_point() else v for k, v in inputs.items()}
    results = []
    for values in (change, meant):
        tensors = {name: torch.tensor(x) for name, x in values.items()}
        with triton_kernels():
            results.append(tt.block_attention(**inputs | tensors))
    assert results[0].isfinite().all() and torch.equal(*results)


@pytest.mark.parametrize(
    "change",
    [
        {"context_lens": [12, -6]},
        {"context_index": [2, -1]},
        {"block_table": [[1, 9, 0], [-2, 0, 0]]},
        {"block_lens": [0, -1]},
    ],
)
def test_what_has_no_place_is_not_appended(change: dict[str, Any]) -> None:
    sizes = {"context": 12, "page": 4, "context_index": [0, 1], "context_lens": [4, 0], "block": 4}
    inputs = attention.make_inputs("append_kv", sizes)
    inputs |= {name: torch.tensor(x) for name, x in change.items()}
    before = {name: inputs[name].clone() for name in ("k_context", "v_context")}
    with triton_kernels():
        tt.append_kv(**inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name].nan_to_num(9), x.nan_to_num(9))


def test_what_has_no_kernel_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    lse = torch.zeros(1, 1, 1, dtype=torch.float64)
    wide = torch.zeros(1, 1, 1, 513)
    with triton_kernels():
        for call in (
            lambda: tt.block_attention(x, x, x),
            lambda: tt.merge_attention(x, lse, x, lse),
            lambda: tt.append_kv(x, x.clone(), x, x, 0),
        ):
            with pytest.raises(NotImplementedError, match="is float64"):
                call()
        with pytest.raises(NotImplementedError, match="expected head_dim up to 512, got 513"):
            tt.block_attention(wide, wide, wide)

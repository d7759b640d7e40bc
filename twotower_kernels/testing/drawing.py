"""What the inputs of several ops are drawn from."""

from __future__ import annotations

import torch

from twotower_kernels.testing.needs import strategies as st

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The floating dtypes of the ops."""
    return st.sampled_from(DTYPES)


def layouts() -> st.SearchStrategy[int]:
    """Of `layouts.awkward`."""
    return st.integers(0, 3)


def seeds() -> st.SearchStrategy[int]:
    """Of PyTorch's generators."""
    return st.integers(0, 2**31)


def sizes(most: int, *beside: int) -> st.SearchStrategy[int]:
    """From 0 to `most`, or one of those beside a tile's edge."""
    few = st.integers(0, most)
    return few | st.sampled_from(beside) if beside else few


def lengths(rows: int, most: int) -> st.SearchStrategy[list[int] | None]:
    """Of so many rows, each from 0 to `most`; or None, all whole."""
    return st.none() | st.lists(st.integers(0, most), min_size=rows, max_size=rows)


def pages() -> st.SearchStrategy[int | None]:
    """Tokens of a page; None: no pages."""
    return st.sampled_from([None, 1, 3, 16])


def magnitudes() -> st.SearchStrategy[float]:
    """What numbers of about 1 are multiplied by: mostly 1."""
    return st.sampled_from([1.0, 1.0, 1e-3, 30.0])

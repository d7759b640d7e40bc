"""Hypothesis strategies: sizes with 0 and 1 and those beside a kernel's tiles, layouts, dtypes, lengths, pages,
magnitudes; and, made of them, the inputs of every op."""

from __future__ import annotations

from typing import Any

import torch

from twotower_kernels.testing.cases import OPS
from twotower_kernels.testing.cases.op import Arguments
from twotower_kernels.testing.drawing import DTYPES, dtypes, layouts, lengths, magnitudes, pages, seeds, sizes
from twotower_kernels.testing.needs import strategies as st

__all__ = ["DTYPES", "dtypes", "inputs", "layouts", "lengths", "magnitudes", "pages", "seeds", "sizes"]


def inputs(op: str, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[dict[str, Any]]:
    """The arguments of a public op, by name, of all its forms; NaN in what is not to be looked at.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    known = OPS[op]
    return known.draw(Arguments(frozenset(known.parameters), required=known.required), dtype)

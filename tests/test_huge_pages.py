"""Advice about pages: it is given for large tensors, changes no value, and asks nothing of small ones."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from twotower_kernels import huge_pages
from twotower_kernels.huge_pages import SIZE, on_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes on large pages in the mapping that a tensor's middle lies in."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(encoding="utf-8"), reason="the system has no large pages"
)
def test_a_large_tensor_lies_on_large_pages() -> None:
    tensor = on_huge_pages(torch.empty(64 * SIZE, dtype=torch.uint8)).fill_(7)
    assert huge_bytes(tensor) >= 32 * SIZE  # memory may be too scattered for all of them
    assert int(tensor.min()) == int(tensor.max()) == 7


@pytest.mark.skipif(not hasattr(huge_pages.mmap, "MADV_HUGEPAGE"), reason="only Linux has such advice")
@pytest.mark.parametrize("pages, asked", [(0, False), (1, False), (2, False), (3, True), (8, True)])
def test_advice_covers_whole_pages_of_the_tensor_alone(pages: int, asked: bool) -> None:
    given: list[tuple[int, int]] = []
    # Half a page more than that, so that so many whole ones less one are in it, wherever it begins.
    tensor = torch.zeros(pages * SIZE + SIZE // 2, dtype=torch.uint8)
    with mock.patch.object(huge_pages, "_madvise", lambda: lambda start, size, _: given.append((start, size))):
        assert on_huge_pages(tensor) is tensor
    assert bool(given) == asked or pages == 2
    for start, size in given:
        assert start % SIZE == size % SIZE == 0
        assert tensor.data_ptr() <= start and start + size <= tensor.data_ptr() + tensor.nbytes
        assert size >= (pages - 1) * SIZE


def test_other_devices_are_left_alone() -> None:
    tensor = torch.empty(8 * SIZE, dtype=torch.uint8, device="meta")
    assert on_huge_pages(tensor) is tensor

"""`generate_blocks` on a second device: everything happens there, and the host reads one small tensor per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import twotower_kernels as tt
from tests.generation.toy_model import MASK, VOCAB
from tests.model.second_device import DEVICE, second_device

OPTIONS: dict[str, Any] = {"policy": tt.RemaskPolicy.sdar(0.4), "block_size": 4, "mask_token_id": MASK}
ROWS = [[5], [6, 7, 8, 9, MASK, 3, MASK], [1, 2, 3, 4]]


def step_on(device: torch.device) -> Any:
    """A model without context: a token's logits are a row of a table, on this device."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device) * 3

    def step(tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
        assert {tokens.device, start.device, rows.device} == {device}
        positions = start[:, None] + torch.arange(tokens.shape[1], device=device)
        return None if commit else table[tokens] + table[(positions + rows[:, None]) % VOCAB]

    return step


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": [3, 4, 5]}], ids=["greedy", "sampled"])
def test_all_of_it_lies_on_the_device(sampling: dict[str, Any]) -> None:
    options = {**OPTIONS, "max_new_tokens": 9, "eos_token_id": 2, "logprobs": True, **sampling}
    want = tt.generate_blocks(step_on(torch.device("cpu")), ROWS, **options)
    with second_device() as device:
        for prompts, where in ((ROWS, DEVICE), ([torch.tensor(row).to(DEVICE) for row in ROWS], None)):
            stream = tt.stream_blocks(step_on(DEVICE), prompts, device=where, **options)
            before, steps = len(device.copied), 0
            for event in stream:
                assert event.after.device == DEVICE
                steps += not event.committed
            copied = device.copied[before:]
            read = [tensor for tensor in copied if tensor.device == DEVICE]
            assert len(read) == steps and all(tensor.shape[1:] == (2,) for tensor in read)
            assert all(tensor.numel() <= 3 for tensor in copied if tensor.device != DEVICE), "indices of rows"
            got = stream.result()
            assert {tensor.device for tensor in (*got.sequences, *got.new_tokens, *got.logprobs)} == {DEVICE}
            assert [t.tolist() for t in got.sequences] == [t.tolist() for t in want.sequences]
            assert (got.nfe, got.finish_reason) == (want.nfe, want.finish_reason)


def test_prompts_of_two_devices_need_one() -> None:
    with second_device():
        prompts = [torch.tensor([5]), torch.tensor([6]).to(DEVICE)]
        with pytest.raises(ValueError, match="prompts: expected one device, got cpu, meta"):
            tt.generate_blocks(step_on(DEVICE), prompts, max_new_tokens=4, **OPTIONS)
        result = tt.generate_blocks(step_on(DEVICE), prompts, max_new_tokens=4, device="meta", **OPTIONS)
        assert {sequence.device for sequence in result.sequences} == {DEVICE}
        with pytest.raises(ValueError, match=r"step: .* on cpu, got .* on meta"):
            tt.generate_blocks(
                lambda *given: step_on(DEVICE)(*(x.to(DEVICE) for x in given[:3]), given[3]),
                ROWS,
                max_new_tokens=4,
                **OPTIONS,
            )

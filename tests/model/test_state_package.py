"""The package's context state: rows apart are rows together, storage grows and is shared, and commits consume."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower_kernels import ContextState, TwoTowerModel
from twotower_kernels.bench.checks.random_models import Models, models, random_ids
from twotower_kernels.model import layers


@cache
def exact() -> Models:
    return models("M*E-M*", torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def same_rows(a: Any, rows: list[int], b: Any) -> None:
    """State `b` holds the given rows of `a`, as far as their lengths reach. Either program's states."""
    a, b = (s.room_for(0) if isinstance(s, ContextState) else s for s in (a, b))
    assert a.lengths[rows].tolist() == b.lengths.tolist()
    for i in a.conv:
        close(a.conv[i][rows], b.conv[i])
        close(a.ssm[i][rows], b.ssm[i])
    for i in a.k:
        for n, (row, length) in enumerate(zip(rows, b.lengths.tolist(), strict=True)):
            close(a.k[i][row, :length], b.k[i][n, :length])
            close(a.v[i][row, :length], b.v[i][n, :length])
    close(a.last_hidden[rows], b.last_hidden)


# --- lengths ---------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 11), min_size=1, max_size=4), more=st.integers(0, 7), seed=st.integers(0, 99))
def test_a_ragged_batch_is_each_row_alone(lengths: list[int], more: int, seed: int) -> None:
    """Prefill, commit and denoise, whatever stands in the padding; and the specification's rows too."""
    model, naive, _ = exact()
    batch = len(lengths)
    ids, block = random_ids(batch, max(lengths), seed=seed), random_ids(batch, 7, seed=seed + 1)
    second = [(more + b) % 8 for b in range(batch)]
    state = model.commit(block, model.prefill(ids, lengths), second)
    t = torch.linspace(0, 1, batch, dtype=torch.float64)
    logits = model.denoise(block, state, t)
    theirs = naive.commit(block, naive.prefill(ids, torch.tensor(lengths)), torch.tensor(second))
    same_rows(theirs, list(range(batch)), state)
    close(naive.denoise(block, theirs, t), logits)
    for b in range(batch):
        alone = model.commit(block[b : b + 1, : second[b]], model.prefill(ids[b : b + 1, : lengths[b]]))
        same_rows(state, [b], alone)
        close(logits[b : b + 1], model.denoise(block[b : b + 1], alone, t[b : b + 1]))


@settings(max_examples=6)
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_prefill_in_pieces_is_prefill_in_one(pieces: list[int], seed: int) -> None:
    model, ids = exact().ours, random_ids(2, sum(pieces), seed=seed)
    state, start = model.empty_state(2), 0
    for piece in pieces:
        state = model.commit(ids[:, start : start + piece], state)
        start += piece
    same_rows(model.prefill(ids), [0, 1], state)
    if start:
        close(model.forward_ar(ids)[:, -1], state.logits)


def test_an_empty_state_is_legal_everywhere() -> None:
    model, naive, _ = exact()
    block = random_ids(2, 4)
    for t in (None, 0.5):
        close(model.denoise(block, model.empty_state(2), t), naive.denoise(block, naive.empty_state(2), t))
    state = model.prefill(block[:, :0])
    assert state.lengths.tolist() == [0, 0]
    same_rows(model.prefill(block), [0, 1], model.commit(block, state.fork(1)))
    assert model.forward_ar(block[:, :0]).shape == (2, 0, 61)


def test_no_rows_are_legal_everywhere() -> None:
    model, none = exact().ours, random_ids(0, 4)
    state = model.commit(none, model.commit(none, model.empty_state(0), []))
    assert state.batch_size == 0 and state.logits.shape == (0, 61)
    assert model.denoise(none, state, 0.5).shape == (0, 4, 61)
    assert model.denoise(none, model.prefill(random_ids(2, 3)).select([]), 0.5).shape == (0, 4, 61)


# --- consuming, forking, selecting -----------------------------------------------------------------------------------


def test_commit_consumes_its_argument() -> None:
    model, ids = exact().ours, random_ids(2, 5)
    for size in (0, 1, 5):
        state = model.prefill(ids)
        model.commit(ids[:, :size], state)
        uses = [
            lambda s: model.commit(ids, s),
            lambda s: model.denoise(ids, s),
            lambda s: s.logits,
            lambda s: s.lengths,
            lambda s: s.batch_size,
            lambda s: s.fork(2),
            lambda s: s.select([0]),
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match="this state was consumed by commit, expected the state that commit"):
                use(state)


def test_fork_and_select_are_rows_of_the_original() -> None:
    model = exact().ours
    state = model.prefill(random_ids(3, 6), [6, 2, 4])
    same_rows(state, [0, 0, 1, 1, 2, 2], state.fork(2))
    same_rows(state, [2, 0], state.select([2, 0]))
    same_rows(state, [2, 2], state.select([-1, 2]))
    same_rows(state, [1], state.select(torch.tensor([False, True, False])))
    same_rows(state, [1, 0], state.select([2, 0, 1]).fork(2).select([4, 2]))
    assert state.select([]).batch_size == 0
    close(state.select([2, 0]).logits, state.logits[[2, 0]])


def test_continuations_do_not_meet() -> None:
    """Of one context: a fork, two selections and the original itself, committed to in turns."""
    model, ids = exact().ours, random_ids(2, 6)
    blocks = random_ids(6, 4, seed=1)
    state = model.prefill(ids, [6, 3])
    fork, late = state.fork(2), state.select([1, 0])
    first = model.commit(blocks[:4], fork)
    state = model.commit(blocks[:2], state)
    of_late = model.commit(blocks[4:], late.select([0, 1]))
    state = model.commit(blocks[2:4], state)

    def alone(row: int, *blocks: Tensor) -> ContextState:
        result = model.prefill(ids[row : row + 1, : [6, 3][row]])
        for block in blocks:
            result = model.commit(block[None], result)
        return result

    for n, row in enumerate([0, 0, 1, 1]):
        same_rows(first, [n], alone(row, blocks[n]))
    for n, row in enumerate([1, 0]):
        same_rows(of_late, [n], alone(row, blocks[4 + n]))
        same_rows(late, [n], alone(row))
    for n in range(2):
        same_rows(state, [n], alone(n, blocks[n], blocks[2 + n]))


# --- storage ---------------------------------------------------------------------------------------------------------


def test_storage_grows_geometrically_and_is_appended_to_in_place() -> None:
    model = models("*", torch.float32).ours
    ids = random_ids(1, 1200)
    state, moves, place = model.empty_state(1), 0, None
    for start in range(0, 1200, 8):
        state = model.commit(ids[:, start : start + 8], state)
        moves += state.k[0].data_ptr() != place
        place = state.k[0].data_ptr()
        assert state.k[0].shape[1] <= 2 * int(state.lengths) + 128
    assert moves <= 8
    torch.testing.assert_close(state.logits, model.prefill(ids).logits, rtol=1e-5, atol=1e-5)


def test_short_rows_of_a_ragged_batch_do_not_inflate_the_storage() -> None:
    """Blocks of which little counts: the storage follows the lengths, not the blocks."""
    model = models("*", torch.float32).ours
    state = model.empty_state(2)
    for start in range(40):
        state = model.commit(random_ids(2, 16, seed=start), state, [1, 0])
    assert state.lengths.tolist() == [40, 0]
    assert state.k[0].shape[1] < 200


def test_nothing_beyond_the_lengths_is_read() -> None:
    model = exact().ours
    ids, block = random_ids(2, 6), random_ids(2, 4, seed=1)
    clean, poisoned = (model.prefill(ids, [6, 2]) for _ in range(2))
    with torch.inference_mode():
        for storage in (*poisoned.k.values(), *poisoned.v.values()):
            storage[0, 6:] = torch.nan
            storage[1, 2:] = torch.nan
    close(model.denoise(block, poisoned, 0.5), model.denoise(block, clean, 0.5))
    close(model.denoise(block, poisoned.fork(1)), model.denoise(block, clean))
    same_rows(model.commit(block, clean), [0, 1], model.commit(block, poisoned))


@pytest.mark.parametrize("selected", [False, True])
def test_the_denoiser_reads_the_context_where_it_lies(selected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations get the very storage of the state, whatever rows were selected: no layer copies any of it."""
    model = models("M*M*", torch.float32).ours
    state = model.prefill(random_ids(3, 30))
    storage = {t.data_ptr() for part in (state.k, state.v, state.conv, state.ssm) for t in part.values()}
    read: set[int] = set()

    def watched(name: str, *names: str) -> None:
        op = getattr(layers, name)

        def call(*arguments: Any, **options: Any) -> Any:
            read.update(t.data_ptr() for t in (*arguments[3:5], *map(options.get, names)) if isinstance(t, Tensor))
            return op(*arguments, **options)

        monkeypatch.setattr(layers, name, call)

    watched("block_attention")  # its context's k and v are the fourth and fifth argument
    watched("mamba2_scan", "conv_state", "ssm_state")
    view = state.select([2, 0, 0]) if selected else state
    model.denoise(random_ids(3, 4), view, 0.5)
    assert storage <= read


def test_states_work_inside_and_outside_inference_mode() -> None:
    model: TwoTowerModel = models("M*E-", torch.float32).ours
    ids = random_ids(2, 5)
    with torch.inference_mode():
        inside = model.prefill(ids)
    with torch.no_grad():
        outside = model.commit(ids, inside)
    assert torch.equal(outside.logits, model.commit(ids, model.prefill(ids)).logits)

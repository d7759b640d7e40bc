"""Philox against Random123's known answers and a literal version; the noise against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower_kernels.reference import philox

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(-(2**63), 2**63 - 1)


def literal(counter, key):
    """Philox-4x32-10 as its paper writes it, one Python integer at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 % 2**32, product0 >> 32 ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def literal_word(seed, offset, step, position, token):
    return literal((token >> 2, position, step, offset), (seed % 2**32, seed % 2**64 >> 32))[token & 3]


def tensors(*numbers):
    return tuple(torch.tensor(number) for number in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert " ".join(f"{int(w):08x}" for w in philox.philox(tensors(*counter), tensors(*key))) == words
    assert " ".join(f"{w:08x}" for w in literal(counter, key)) == words


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_agrees_with_the_literal_version(counter, key):
    assert [int(w) for w in philox.philox(tensors(*counter), tensors(*key))] == literal(counter, key)


@given(SEED, WORD, WORD, st.integers(1, 5), st.integers(1, 11))
def test_words_are_laid_out_by_token_position_step_and_row(seed, offset, step, positions, vocabulary):
    row = [torch.tensor([number]) for number in (seed, offset, step)]
    want = [[literal_word(seed, offset, step, s, v) for v in range(vocabulary)] for s in range(positions)]
    assert philox.vocabulary_words(*row, positions, vocabulary)[0].tolist() == want
    assert philox.words(*row, torch.tensor(positions - 1), torch.arange(vocabulary)).tolist() == want[-1]
    for number in (philox.RANKING, philox.POSTERIOR, philox.RENOISE):
        got = philox.position_words(*row, positions, number)[0].tolist()
        assert got == [literal_word(seed, offset, step, s, number) for s in range(positions)]


def test_rows_of_a_batch_do_not_see_each_other():
    seed, offset, step = torch.tensor([5, -7, 5]), torch.tensor([0, 3, 0]), torch.tensor([1, 1, 2])
    batch = philox.vocabulary_words(seed, offset, step, 3, 10)
    for b in range(3):
        assert batch[b].equal(philox.vocabulary_words(seed[b : b + 1], offset[b : b + 1], step[b : b + 1], 3, 10)[0])
    assert not batch[0].equal(batch[2])


@given(WORD)
def test_noise_is_its_definition(word):
    x = torch.tensor([word])
    assert philox.uniform(x).item() == (word + 0.5) / 2**32
    w = (word + 0.5) / 2**32
    exact = -math.log(-math.log1p(-w))
    assert philox.gumbel(x, torch.float64).item() == pytest.approx(exact, rel=1e-14, abs=1e-14)
    if w < 0.999:  # above, float32 loses 1 - w; such noise is below -1.9 and decides nothing
        assert abs(philox.gumbel(x).item() - exact) < 5e-5


def test_extreme_words():
    ends = torch.tensor([0, 2**32 - 1])
    assert philox.gumbel(ends).tolist() == [pytest.approx(33 * math.log(2)), -math.inf]
    assert philox.gumbel(ends, torch.float64).isfinite().all()
    assert (philox.uniform(ends) > 0).all() and (philox.uniform(ends) < 1).all()


def test_noise_has_the_moments_of_a_gumbel():
    row = [torch.tensor([number]) for number in (2024, 0, 0)]
    noise = philox.gumbel(philox.vocabulary_words(*row, 16, 16384)).double()
    error = math.pi / math.sqrt(6) / math.sqrt(noise.numel())  # standard error of the mean
    assert abs(noise.mean().item() - 0.5772156649) < 4 * error
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02


def test_sequence_seeds():
    seeds = [philox.sequence_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert torch.tensor(seeds).dtype == torch.int64
    low, high, _, _ = literal((2**32 - 1, 0, 7, 0), (9, 0))
    assert philox.sequence_seed(9, 7) % 2**64 == low | high << 32
    assert philox.sequence_seed(-1, 3) == philox.sequence_seed(2**64 - 1, 3)
    with pytest.raises(ValueError, match=r"index: expected 0 or more, below 2\^64, got -1"):
        philox.sequence_seed(0, -1)
    with pytest.raises(ValueError, match=r"index: expected 0 or more, below 2\^64, got 18446744073709551616"):
        philox.sequence_seed(0, 2**64)
    with pytest.raises(ValueError, match="64 bits, got 18446744073709551616"):
        philox.sequence_seed(2**64, 0)

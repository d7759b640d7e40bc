"""One seed per sequence, from the seed of a request: Philox-4x32-10 in Python's integers.

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter of four words
and a key of two to four random words. The draws of tokens use it too, inside the remasking kernels.
"""

from typing import Any

from twotower_kernels.options.arguments import are_several, whole, wholes

_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10: numbers in [0, 2^32) in, numbers in [0, 2^32) out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & _WORD, a >> 32 ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def as_int64(seed: int, name: str = "seed") -> int:
    """A number of 64 bits, signed or unsigned, as the int64 of the same bits, which fits into a tensor.

    Raises:
        ValueError: a number of more bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: expected a number of 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request: what makes a sequence sample the same whatever else is in its batch.

    One Philox call with the key `seed` on the counter (2^32 - 1, 0, index's halves), which no draw of a token uses.
    So row b of what was generated with a number as `seed` comes again, alone, with `seed=[sequence_seed(seed, b)]`.

    Args:
        seed: 64 bits, signed or unsigned.
        index: 0, 1, ... below 2^64.

    Returns:
        An int64, so that it fits into a tensor of seeds.

    Raises:
        ValueError: a number outside its range. TypeError: no integer.
    """
    seed, index = seed_and_index(seed, index)
    low, high, _, _ = philox((_WORD, 0, index & _WORD, index >> 32), (seed & _WORD, seed >> 32 & _WORD))
    return as_int64(high << 32 | low)


def row_seeds(seed: Any, rows: int) -> list[int]:
    """The seed of each row of a request: those that were given, one per row, or those that follow from one number.

    Args:
        seed: 64 bits, signed or unsigned; or a sequence, an array or a tensor of them `[rows]`.

    Returns:
        int64 numbers.

    Raises:
        ValueError: a number of more bits, another number of them. TypeError: no integers.
    """
    return seeds_given(seed, rows) if are_several(seed) else [sequence_seed(seed, row) for row in range(rows)]


def seed_and_index(seed: Any, index: Any) -> tuple[int, int]:
    """What `sequence_seed` is called with, checked: an int64, and a number of 64 bits."""
    seed, index = as_int64(whole("seed", seed)), whole("index", index)
    if not 0 <= index < 2**64:
        raise ValueError(f"index: expected 0 or more, below 2^64, got {index}")
    return seed, index


def seeds_given(seed: Any, rows: int) -> list[int]:
    """The seeds of a request that has one per row, checked: int64 numbers."""
    seeds = wholes("seed", seed, "an integer, or one per row")
    if len(seeds) != rows:
        raise ValueError(f"seed: expected a number, or one for each of {rows} rows, got {len(seeds)}")
    return [as_int64(key, f"seed[{row}]") for row, key in enumerate(seeds)]

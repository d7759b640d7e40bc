"""One seed per sequence, from the seed of a request: Philox-4x32-10 in Python's integers.

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter of four words
and a key of two to four random words. The draws of tokens use it too, inside the remasking kernels.
"""

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


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request: what makes a sequence sample the same whatever else is in its batch.

    One Philox call with the key `seed` on the counter (2^32 - 1, 0, index's halves), which no draw of a token uses.

    Args:
        seed: 64 bits, signed or unsigned.
        index: 0, 1, ... below 2^64.

    Returns:
        An int64, so that it fits into a tensor of seeds.

    Raises:
        ValueError: a number outside its range.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")
    if not 0 <= index < 2**64:
        raise ValueError(f"index: expected 0 or more, below 2^64, got {index}")
    low, high, _, _ = philox((_WORD, 0, index & _WORD, index >> 32), (seed & _WORD, seed >> 32 & _WORD))
    bits = high << 32 | low
    return bits - 2**64 if bits >= 2**63 else bits

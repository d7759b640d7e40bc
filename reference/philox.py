"""Counter-based randomness: Philox-4x32-10 in plain integer tensors, and the noise the ops draw from it.

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and
a 64-bit key to four 32-bit words. The same (seed, row offset, step, position, token) gives the same word on every
device, in every batch and in every order of evaluation, so a sampled generation can be reproduced anywhere:

    key     = low and high half of the 64-bit seed of the row
    counter = (token >> 2, position in the block, step, row offset),   output lane = token & 3

Draws that belong to a position and not to a token use the reserved token numbers RANKING, POSTERIOR and RENOISE.
"""

from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options.arguments import are_several
from twotower_kernels.options.seeds import as_int64, seed_and_index, seeds_given

RANKING = 2**32 - 1  # the order of a random score, noise on the order of any, and each position's own coin
POSTERIOR = 2**32 - 2  # whether a position stays a mask under q(x_s | x_t)
RENOISE = 2**32 - 3  # the random token of a rejected position

_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product a * b, in 16-bit halves of b so that no int64 product overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # both below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _WORD


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four counter words and two key words, broadcasting int64 in [0, 2^32), to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _WORD, (seed >> 32) & _WORD


def words(seed: Tensor, offset: Tensor, step: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """The 32-bit words of the given tokens, int64 in [0, 2^32). All arguments are int64 tensors that broadcast."""
    out = philox((token >> 2, position & _WORD, step & _WORD, offset & _WORD), _key(seed))
    lanes = torch.stack(torch.broadcast_tensors(*out), dim=-1)  # [..., 4]
    lane = (token & 3).expand(lanes.shape[:-1])
    return lanes.gather(-1, lane.unsqueeze(-1)).squeeze(-1)


def vocabulary_words(seed: Tensor, offset: Tensor, step: Tensor, positions: int, vocabulary: int) -> Tensor:
    """The words of every token at every position: seed, offset, step [B] -> int64 [B, positions, vocabulary]."""
    device = seed.device
    quads = torch.arange((vocabulary + 3) // 4, device=device)  # [Q], four tokens share a counter
    position = torch.arange(positions, device=device)[:, None]  # [S, 1]
    k0, k1 = (half[:, None, None] for half in _key(seed))
    out = philox((quads, position, step[:, None, None] & _WORD, offset[:, None, None] & _WORD), (k0, k1))
    lanes = torch.stack(torch.broadcast_tensors(*out), dim=-1)  # [B, S, Q, 4]
    return lanes.flatten(2)[..., :vocabulary]  # [B, S, 4Q] -> [B, S, V]


def position_words(seed: Tensor, offset: Tensor, step: Tensor, positions: int, number: int) -> Tensor:
    """One word per position for a reserved token number: seed, offset, step [B] -> int64 [B, positions]."""
    position = torch.arange(positions, device=seed.device)
    token = torch.full((), number, dtype=torch.int64, device=seed.device)
    return words(seed[:, None], offset[:, None], step[:, None], position, token)


def uniform(word: Tensor) -> Tensor:
    """(word + 1/2) / 2^32, exact in float64, strictly between 0 and 1. For the draws that belong to a position."""
    return (word.double() + 0.5) * 2.0**-32


def gumbel(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gumbel noise -log(-log1p(-w)), w = (word + 1/2) / 2^32, every operation in `dtype`.

    log1p keeps the full relative precision of small w, hence of the large noise that decides an argmax over a hundred
    thousand candidates. In float32 the largest words round to w = 1 and the noise to minus infinity: they cannot win.
    """
    w = (word.to(dtype) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w))


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` (0, 1, ...) of a request with `seed`: an int64, so it fits into a tensor of seeds.

    One Philox call on the counter (2^32 - 1, 0, index's halves), which no draw of a token uses. A sequence so samples
    the same whatever else is in its batch.
    """
    seed, index = seed_and_index(seed, index)
    counter = (_WORD, 0, index & _WORD, index >> 32)
    low, high, _, _ = philox(tuple(torch.tensor(c) for c in counter), _key(torch.tensor(seed)))
    return as_int64(int(low) | int(high) << 32)


def row_seeds(seed: Any, rows: int) -> list[int]:
    """The seeds of the sequences of a request: from one number, or those that were given, one for each."""
    return seeds_given(seed, rows) if are_several(seed) else [sequence_seed(seed, index) for index in range(rows)]

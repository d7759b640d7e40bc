"""Wrong remasking steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from tests.testing.plain.remask import Remask
from tests.testing.wrong.collection import wrong

# --- what is proposed -------------------------------------------------------------------------------------------------


@wrong("remask", "numbers")
class MaskCanBeProposed(Remask):
    """The mask token may be a candidate, and have probability."""

    def admitted(self, logits: Tensor, mask_token_id: int, suppressed: Sequence[int] | Tensor | None) -> Tensor:
        z = super().admitted(logits, mask_token_id, suppressed)
        z[..., mask_token_id] = logits[..., mask_token_id]
        return z


@wrong("remask", "numbers")
class SuppressedCanBeProposed(Remask):
    """`suppress_ids` is ignored."""

    def admitted(self, logits: Tensor, mask_token_id: int, suppressed: Sequence[int] | Tensor | None) -> Tensor:
        return super().admitted(logits, mask_token_id, None)


@wrong("remask", "numbers")
class LastOfEqualLogits(Remask):
    """Among equal logits the last token is proposed."""

    def argmax(self, z: Tensor) -> Tensor:
        return len(z) - 1 - z.flip(0).argmax()


@wrong("remask", "numbers")
class NotANumberIsProposed(Remask):
    """Logits that hold NaN are used."""

    def is_usable(self, z: Tensor) -> bool:
        return True


@wrong("remask", "numbers")
class TopKOffByOne(Remask):
    """One token more is kept."""

    def top_k(self, z: Tensor, k: int) -> Tensor:
        return super().top_k(z, k + 1 if k else 0)


@wrong("remask", "numbers")
class TopKCutsTies(Remask):
    """What ties with the last token kept is not kept."""

    def top_k(self, z: Tensor, k: int) -> Tensor:
        kept = super().top_k(z, k)
        if 0 < k < len(z):
            kept = torch.zeros_like(kept)
            kept[z.sort(descending=True, stable=True).indices[:k]] = True
        return kept


@wrong("remask", "numbers")
class NucleusWithoutTheCrossingToken(Remask):
    """The token that crosses top_p is not kept."""

    def nucleus_size(self, p: Tensor, top_p: float) -> int:
        return max(1, int((p.cumsum(0) <= top_p).sum()))


@wrong("remask", "numbers")
class NucleusOfAllTokens(Remask):
    """top-p is that of the distribution before top-k."""

    def propose(
        self, z: Tensor, temperature: float, top_k: int, top_p: float, row: int, *where: int
    ) -> tuple[Tensor, Tensor]:
        kept = self.top_k(z, top_k) & self.nucleus(self.tempered(z, temperature), top_p)
        return super().propose(z.masked_fill(~kept, -torch.inf), temperature, 0, 1.0, row, *where)


@wrong("remask", "numbers")
class NucleusBeforeTemperature(Remask):
    """top-p is that of the distribution before it is tempered."""

    def propose(
        self, z: Tensor, temperature: float, top_k: int, top_p: float, row: int, *where: int
    ) -> tuple[Tensor, Tensor]:
        kept = self.top_k(z, top_k)
        kept = kept & self.nucleus(z.masked_fill(~kept, -torch.inf), top_p)
        return super().propose(z.masked_fill(~kept, -torch.inf), temperature, 0, 1.0, row, *where)


@wrong("remask", "numbers")
class TemperatureMultiplies(Remask):
    """Logits are multiplied by the temperature."""

    def tempered(self, z: Tensor, temperature: float) -> Tensor:
        return super().tempered(z, 1 / temperature if temperature > 0 else 0.0)


# --- the noise --------------------------------------------------------------------------------------------------------


@wrong("remask", "numbers")
class NoiseInTheWrongLane(Remask):
    """The four tokens of a counter take its words in reverse order."""

    def words(self, token: Tensor, *where: Tensor) -> Tensor:
        return super().words(token ^ 3, *where)


@wrong("remask", "numbers")
class SeedOf32Bits(Remask):
    """The upper half of the seed is dropped."""

    def noise(self, vocabulary: int, row: int, seed: int, *where: int) -> Tensor:
        return super().noise(vocabulary, row, seed & 0xFFFFFFFF, *where)


@wrong("remask", "numbers")
class NoiseOfTheBatchRow(Remask):
    """A row's noise depends on its place in the batch."""

    def noise(self, vocabulary: int, row: int, seed: int, offset: int, *where: int) -> Tensor:
        return super().noise(vocabulary, row, seed, offset + row, *where)


@wrong("remask", "numbers")
class EveryStepTheSameNoise(Remask):
    """The step is no part of the counter."""

    def noise(self, vocabulary: int, row: int, seed: int, offset: int, step: int, position: int) -> Tensor:
        return super().noise(vocabulary, row, seed, offset, 0, position)


@wrong("remask", "numbers")
class EveryPositionTheSameNoise(Remask):
    """The position is no part of the counter."""

    def noise(self, vocabulary: int, row: int, seed: int, offset: int, step: int, position: int) -> Tensor:
        return super().noise(vocabulary, row, seed, offset, step, 0)


@wrong("remask", "numbers", "deterministic")
class NoiseOfAGlobalGenerator(Remask):
    """The noise is PyTorch's, and another each time."""

    def words(self, token: Tensor, *where: Tensor) -> Tensor:
        return torch.randint(0, 2**32, token.shape)


# --- how sure ---------------------------------------------------------------------------------------------------------


@wrong("remask", "numbers")
class ConfidenceOfTheFiltered(Remask):
    """The confidence is that of the tempered and filtered distribution, where the raw one is asked for."""

    def distribution(self, z: Tensor, kept: Tensor, temperature: float) -> Tensor:
        return self.tempered(z, temperature).masked_fill(~kept, -torch.inf).softmax(0)


@wrong("remask", "numbers")
class EntropyWithTheWrongSign(Remask):
    """Entropy is negative."""

    def entropy(self, p: Tensor) -> Tensor:
        return -super().entropy(p)


@wrong("remask", "numbers")
class EntropyInBits(Remask):
    """Entropy is to base 2."""

    def entropy(self, p: Tensor) -> Tensor:
        return super().entropy(p) / 0.6931471805599453


@wrong("remask", "numbers")
class NothingTimesItsLogarithm(Remask):
    """The entropy of a token without probability is NaN."""

    def entropy(self, p: Tensor) -> Tensor:
        return -(p * p.log()).sum()


@wrong("remask", "numbers")
class StatisticsInBfloat16(Remask):
    """Probabilities are rounded to bfloat16."""

    def distribution(self, z: Tensor, kept: Tensor, temperature: float) -> Tensor:
        return super().distribution(z, kept, temperature).bfloat16().to(z.dtype)


# --- which are committed ----------------------------------------------------------------------------------------------


@wrong("remask", "numbers")
class LastOfEqualConfidences(Remask):
    """Among equals the last position is committed first."""

    def ranked(self, score: Tensor, usable: Tensor) -> Tensor:
        return len(score) - 1 - super().ranked(score.flip(0), usable.flip(0))


@wrong("remask", "numbers")
class LeastConfidentFirst(Remask):
    """The order is ascending."""

    def ranked(self, score: Tensor, usable: Tensor) -> Tensor:
        return super().ranked(-score, usable)


@wrong("remask", "numbers")
class DueRoundedDown(Remask):
    """⌊n / r⌋ positions are committed."""

    def due(self, waiting: int, step: int, num_steps: int) -> int:
        return max(1, waiting // max(1, num_steps - step))


@wrong("remask", "numbers")
class StepsFromOne(Remask):
    """The remaining steps are counted without this one."""

    def due(self, waiting: int, step: int, num_steps: int) -> int:
        return super().due(waiting, step + 1, num_steps)


@wrong("remask", "numbers")
class NothingMayBeDue(Remask):
    """Past the last step nothing is committed."""

    def due(self, waiting: int, step: int, num_steps: int) -> int:
        return super().due(waiting, step, num_steps) if step < num_steps else 0


# --- where ------------------------------------------------------------------------------------------------------------


@wrong("remask", "numbers")
class EditableIgnored(Remask):
    """Positions that may not be written wait as well."""

    def reach(self, tokens: Tensor, editable: Tensor | None, valid_lens: Tensor | None) -> Tensor:
        return super().reach(tokens, None, valid_lens)


@wrong("remask", "numbers")
class PaddingIsCommitted(Remask):
    """Positions beyond a row's length wait as well."""

    def reach(self, tokens: Tensor, editable: Tensor | None, valid_lens: Tensor | None) -> Tensor:
        return super().reach(tokens, editable, None)


@wrong("remask", "numbers")
class LengthOffByOne(Remask):
    """A row's last position is left alone."""

    def reach(self, tokens: Tensor, editable: Tensor | None, valid_lens: Tensor | None) -> Tensor:
        return super().reach(tokens, editable, None if valid_lens is None else valid_lens - 1)


@wrong("remask", "numbers")
class CountsBeforeItWrites(Remask):
    """The masks that are counted are those before the step."""

    def left(self, after: Tensor, mask_token_id: int, tokens: Tensor, *reach: Any) -> Tensor:
        return super().left(tokens, mask_token_id, tokens, *reach)


@wrong("remask", "numbers")
class CountsMasksOutOfReach(Remask):
    """Masks that may not be written are counted: the row is never done."""

    def left(self, after: Tensor, mask_token_id: int, tokens: Tensor, *reach: Any) -> Tensor:
        return (after == mask_token_id).sum(1)


@wrong("remask", "numbers")
class TokensBecomeInt64(Remask):
    """int32 tokens come back as int64."""

    def written(self, tokens: Tensor, chosen: Tensor, candidate: Tensor) -> Tensor:
        return torch.where(chosen, candidate, tokens.long())


@wrong("remask", "untouched")
class WritesTheCallersTokens(Remask):
    """The step is made in place."""

    def written(self, tokens: Tensor, chosen: Tensor, candidate: Tensor) -> Tensor:
        return tokens.copy_(super().written(tokens, chosen, candidate))


# --- what the policy says ---------------------------------------------------------------------------------------------


def other(policy: tt.RemaskPolicy, **changes: Any) -> tt.RemaskPolicy:
    """The policy with these fields, or itself where they do not go with the others."""
    try:
        return dataclasses.replace(policy, **changes)
    except ValueError:
        return policy


@wrong("remask", "numbers")
def statistics_of_the_other_kind(
    logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, policy: tt.RemaskPolicy, **options: Any
) -> tt.RemaskResult:
    """Raw statistics where filtered ones are asked for, and the other way round."""
    policy = other(policy, statistics="raw" if policy.statistics == "filtered" else "filtered")
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def crossing_token_the_other_way(
    logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, policy: tt.RemaskPolicy, **options: Any
) -> tt.RemaskResult:
    """The token that crosses top_p stays where it should not, and the other way round."""
    policy = other(policy, top_p_keep_crossing=not policy.top_p_keep_crossing)
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def schedule_without_its_remainder(
    logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, policy: tt.RemaskPolicy, **options: Any
) -> tt.RemaskResult:
    """What an even schedule leaves over is not spread over its first steps."""
    policy = other(policy, spread_remainder=not policy.spread_remainder)
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def last_step_commits_no_more_than_others(
    logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, policy: tt.RemaskPolicy, **options: Any
) -> tt.RemaskResult:
    """`finish` is ignored."""
    policy = other(policy, finish=False)
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def bound_of_the_row_ignored(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int | None,
    policy: tt.RemaskPolicy,
    gate_bound: float | Tensor | None = None,
    **options: Any,
) -> tt.RemaskResult:
    """The gate's bound is always the policy's."""
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def does_not_edit(
    logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, policy: tt.RemaskPolicy, **options: Any
) -> tt.RemaskResult:
    """Committed tokens are never edited."""
    policy = other(policy, edit_threshold=None)
    return tt.remask(logits, tokens, mask_token_id=mask_token_id, policy=policy, **options)


@wrong("remask", "numbers")
def shift_ignored(logits: Tensor, tokens: Tensor, *, mask_token_id: int | None, shift: int = 0) -> tt.RemaskResult:
    """A position is predicted by its own logits."""
    return tt.remask(logits, tokens, mask_token_id=mask_token_id)

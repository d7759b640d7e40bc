"""A remasking step as a short program whose steps are methods: the default policy, one position after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.reference import philox


def of_row(value: Any, row: int) -> Any:
    """A number of one batch row: given for all rows, or for each."""
    return value[row].item() if isinstance(value, Tensor) and value.ndim else value


class Remask:
    """`remask` with the policy of TwoTower without its threshold: ⌈n / r⌉ positions of the highest confidence."""

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor,
        *,
        mask_token_id: int,
        step: int | Tensor = 0,
        num_steps: int | Tensor = 1,
        temperature: float | Tensor = 0.0,
        top_k: int | Tensor | None = 0,
        top_p: float | Tensor | None = 1.0,
        seed: int | Tensor = 0,
        offset: int | Tensor = 0,
        suppress_ids: Sequence[int] | Tensor | None = None,
        editable: Tensor | None = None,
        valid_lens: Tensor | None = None,
    ) -> tt.RemaskResult:
        batch, length, _ = logits.shape
        z = self.admitted(logits, mask_token_id, suppress_ids)
        waiting = self.waiting(tokens, mask_token_id, self.reach(tokens, editable, valid_lens))
        candidate = torch.full((batch, length), -1, device=logits.device)
        confidence, entropy = z.new_zeros(batch, length), z.new_zeros(batch, length)
        chosen = torch.zeros_like(waiting)
        for row in range(batch):
            of = [of_row(value, row) for value in (temperature, 0 if top_k is None else top_k)]
            numbers = (*of, of_row(1.0 if top_p is None else top_p, row), row)
            words = (of_row(seed, row), of_row(offset, row), of_row(step, row))
            for position in torch.nonzero(waiting[row]).flatten().tolist():
                at = z[row, position]
                if not self.is_usable(at):
                    confidence[row, position] = entropy[row, position] = torch.nan
                    continue
                candidate[row, position], kept = self.propose(at, *numbers, *words, position)
                p = self.distribution(at, kept, of[0])
                confidence[row, position] = p[candidate[row, position]]
                entropy[row, position] = self.entropy(p)
            best = self.ranked(confidence[row], waiting[row] & (candidate[row] >= 0))
            chosen[row, best[: self.due(int(waiting[row].sum()), of_row(step, row), of_row(num_steps, row))]] = True
        after = self.written(tokens, chosen, candidate)
        left = self.left(after, mask_token_id, tokens, editable, valid_lens)
        return tt.RemaskResult(after, chosen, candidate, confidence, entropy, left, left == 0)

    # --- where --------------------------------------------------------------------------------------------------------

    def reach(self, tokens: Tensor, editable: Tensor | None, valid_lens: Tensor | None) -> Tensor:
        reach = torch.ones_like(tokens, dtype=torch.bool)
        if valid_lens is not None:
            reach &= torch.arange(tokens.shape[1], device=tokens.device) < valid_lens[:, None]
        return reach if editable is None else reach & editable

    def waiting(self, tokens: Tensor, mask_token_id: int, reach: Tensor) -> Tensor:
        return (tokens == mask_token_id) & reach

    def left(self, after: Tensor, mask_token_id: int, tokens: Tensor, *reach: Any) -> Tensor:
        return self.waiting(after, mask_token_id, self.reach(tokens, *reach)).sum(1)

    # --- what ---------------------------------------------------------------------------------------------------------

    def admitted(self, logits: Tensor, mask_token_id: int, suppressed: Sequence[int] | Tensor | None) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        z[..., mask_token_id] = -torch.inf
        if suppressed is not None:
            z[..., torch.as_tensor(suppressed, dtype=torch.int64, device=z.device)] = -torch.inf
        return z

    def is_usable(self, z: Tensor) -> bool:
        return math.isfinite(z.amax())  # of NaN, NaN

    def propose(
        self, z: Tensor, temperature: float, top_k: int, top_p: float, row: int, *where: int
    ) -> tuple[Tensor, Tensor]:
        """The candidate, and which tokens the filters keep. where: seed, offset, step, position."""
        tempered = self.tempered(z, temperature)
        kept = self.top_k(z, top_k)
        kept = kept & self.nucleus(tempered.masked_fill(~kept, -torch.inf), top_p)
        if temperature < 1e-36:
            return self.argmax(z), kept
        noise = self.noise(len(z), row, *where).to(z.device)
        return self.argmax(torch.where(kept, self.tempered(z.double(), temperature) + noise, -torch.inf)), kept

    def argmax(self, z: Tensor) -> Tensor:
        return z.argmax()  # the first of equals

    def tempered(self, z: Tensor, temperature: float) -> Tensor:
        return (z - z.amax()) / (max(temperature, 1e-36) if temperature > 0 else 1.0)

    def top_k(self, z: Tensor, k: int) -> Tensor:
        if not 0 < k < len(z):
            return torch.ones_like(z, dtype=torch.bool)
        return z >= z.sort(descending=True).values[k - 1]

    def nucleus(self, z: Tensor, top_p: float) -> Tensor:
        """Every token before which there is no more than top_p, and what ties with the last of them."""
        if top_p >= 1:
            return torch.ones_like(z, dtype=torch.bool)
        ordered = z.sort(descending=True).values
        count = self.nucleus_size(ordered.softmax(0).double(), top_p)
        return z >= ordered[count - 1]

    def nucleus_size(self, p: Tensor, top_p: float) -> int:
        return max(1, int((p.cumsum(0) - p <= top_p).sum()))

    def noise(self, vocabulary: int, row: int, seed: int, offset: int, step: int, position: int) -> Tensor:
        """float64 [V]."""
        given = (torch.tensor(x, dtype=torch.int64) for x in (seed, offset, step, position))
        return philox.gumbel(self.words(torch.arange(vocabulary), *given), torch.float64)

    def words(self, token: Tensor, seed: Tensor, offset: Tensor, step: Tensor, position: Tensor) -> Tensor:
        return philox.words(seed, offset, step, position, token)

    # --- how sure -----------------------------------------------------------------------------------------------------

    def distribution(self, z: Tensor, kept: Tensor, temperature: float) -> Tensor:
        return z.softmax(0)

    def entropy(self, p: Tensor) -> Tensor:
        return torch.special.entr(p).sum()

    # --- which --------------------------------------------------------------------------------------------------------

    def ranked(self, score: Tensor, usable: Tensor) -> Tensor:
        """Positions, best first, the first of equals first."""
        order = score.masked_fill(~usable, -torch.inf).argsort(descending=True, stable=True)
        return order[: int(usable.sum())]

    def due(self, waiting: int, step: int, num_steps: int) -> int:
        """⌈n / r⌉, at least 1; all in the last step."""
        return max(1, -(-waiting // max(1, num_steps - step)))

    def written(self, tokens: Tensor, chosen: Tensor, candidate: Tensor) -> Tensor:
        return torch.where(chosen, candidate, tokens).to(tokens.dtype)

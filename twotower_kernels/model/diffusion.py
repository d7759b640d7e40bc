"""Block diffusion of a TwoTower: the denoiser fills blocks, reading a state that the context tower extends by them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from twotower_kernels.generation.request import Request
from twotower_kernels.model.interface import Calls
from twotower_kernels.model.state import ContextState
from twotower_kernels.options.remask_policy import RemaskPolicy


@dataclass(frozen=True)
class TowersContext:
    """The context of R rows, as the loop over blocks sees it (`generation.blocks.Context`)."""

    calls: Calls
    policy: RemaskPolicy
    state: ContextState

    def denoise(self, tokens: Tensor, num_masked: Tensor, step: int, num_steps: int) -> Tensor:
        t = self.policy.model_time(num_masked, tokens.shape[1], step, num_steps)
        return self.calls.denoise(tokens, self.state, t)

    def select(self, index: Tensor) -> TowersContext:
        return replace(self, state=self.state.select(index))

    def commit(self, tokens: Tensor) -> TowersContext:
        return replace(self, state=self.calls.commit(tokens, self.state))


def prefilled(request: Request, calls: Calls, request_rows: list[int]) -> TowersContext:
    """The context of these rows: their prompts up to their first blocks."""
    state = calls.prefill(*request.padded(request_rows))
    return TowersContext(calls, request.options.unmasking, state)

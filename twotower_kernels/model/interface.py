"""What recording and generation ask of a model. `TwoTowerModel` has it; they need not know that class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from twotower_kernels.model.state import BlockLook, BlockRead, ContextState, Scanned
from twotower_kernels.model.verification import Verification
from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.config import TwoTowerConfig


class Towers(Protocol):
    """The two towers, and how a context travels from one to the other."""

    config: TwoTowerConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def denoiser_device(self) -> torch.device: ...

    def prefill(self, input_ids: Integers, lengths: Integers | None = None) -> ContextState: ...

    def denoise(self, block_ids: Integers, state: ContextState, t: Tensor | float | None = None) -> Tensor: ...

    def commit(self, block_ids: Integers, state: ContextState, lengths: Integers | None = None) -> ContextState: ...

    def commit_by(
        self,
        read: Callable[[Tensor, ContextState, Any], BlockRead],
        block_ids: Integers,
        state: ContextState,
        lengths: Integers | None = None,
    ) -> ContextState: ...

    def read_block(self, block_ids: Tensor, state: ContextState, lengths: Tensor | None) -> BlockRead: ...

    def verify(self, block_ids: Integers, state: ContextState) -> Verification: ...

    def verify_by(
        self, look: Callable[[Tensor, ContextState], BlockLook], block_ids: Integers, state: ContextState
    ) -> Verification: ...

    def look_at_block(self, block_ids: Tensor, state: ContextState) -> BlockLook: ...

    def accept(self, verification: Verification, lengths: Integers) -> ContextState: ...

    def accept_by(
        self,
        replay: Callable[[BlockLook, ContextState, Tensor], BlockRead],
        verification: Verification,
        lengths: Integers,
    ) -> ContextState: ...

    def replay_block(self, look: BlockLook, state: ContextState, lengths: Tensor) -> BlockRead: ...

    def replay_scans(
        self, scanned: dict[int, Scanned], state: ContextState, lengths: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]: ...


@dataclass(frozen=True)
class Calls:
    """What generation calls of a model; on a GPU, all but the prefill is recorded and replayed."""

    prefill: Callable[[Tensor, Tensor], ContextState]
    denoise: Callable[..., Tensor]
    commit: Callable[[Tensor, ContextState], ContextState]
    verify: Callable[[Tensor, ContextState], Verification]
    accept: Callable[[Verification, Tensor], ContextState]

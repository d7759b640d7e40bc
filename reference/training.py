"""Training the denoiser against a frozen context tower (arXiv 2606.26493), and that tower by next-token prediction.

One pass trains every block of a sequence: with `S` the block size, the clean sequence goes through the context tower
once, and block b of the noisy sequence becomes a batch row of the *inference* denoiser, whose context is the clean
tokens 0..b·S. So the training pass is not a second implementation; it differs only in how its state is made.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.reference.model import ContextState, TwoTower

T_MIN = 1e-3


def corrupt(ids: Tensor, *, mask_token_id: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Masks every token of a sequence independently with probability t, one t ~ U[1e-3, 1] per sequence.

    Args:
        ids: `[B, L]` clean tokens.

    Returns:
        noisy `[B, L]` and t `[B]` float32.
    """
    t = T_MIN + (1 - T_MIN) * torch.rand(len(ids), generator=generator, device=ids.device)
    masked = torch.rand(ids.shape, generator=generator, device=ids.device) < t[:, None]
    return ids.masked_fill(masked, mask_token_id), t


def block_states(model: TwoTower, ids: Tensor, block_size: int) -> ContextState:
    """The context of every block of `ids [B, L]` at once: one state of B·L/S rows (sequence-major), without gradient.

    Row (b, j) has length j·S. Its Mamba states are the context tower's at the end of block j-1 (zeros for block 0); its
    keys and values are the sequence's, shared by all of its blocks through `kv_index`.

    Raises:
        ValueError: L is no multiple of `block_size`.
    """
    batch, length = ids.shape
    if block_size < 1 or length % block_size:
        raise ValueError(f"ids: expected a length that is a multiple of block_size {block_size}, got {length}")
    blocks = length // block_size
    with torch.no_grad():
        empty = model.empty_state(batch)
        _, state = model.context_pass(ids, empty, states_every=block_size)

        def before_each_block(first: dict[int, Tensor], after: dict[int, Tensor]) -> dict[int, Tensor]:
            shifted = {i: torch.cat([first[i][:, None], after[i][:, :-1]], 1) for i in first}  # [B, blocks, ...]
            return {i: states.flatten(0, 1) for i, states in shifted.items()}

        rows = torch.arange(batch * blocks, device=ids.device)
        return replace(
            state,
            lengths=rows % blocks * block_size,
            conv=before_each_block(empty.conv, state.conv),
            ssm=before_each_block(empty.ssm, state.ssm),
            last_hidden=state.last_hidden.repeat_interleave(blocks, 0),
            kv_index=rows // blocks,
        )


def denoise_all_blocks(
    model: TwoTower, noisy: Tensor, ids: Tensor, t: Tensor | float | None, *, block_size: int
) -> Tensor:
    """The denoiser on every block of `noisy [B, L]`, each seeing the clean `ids` before it: logits `[B, L, V]`.

    Block b's logits equal `model.denoise(noisy[:, b·S:(b+1)·S], model.prefill(ids[:, :b·S]), t)`.
    """
    if noisy.shape != ids.shape:
        raise ValueError(f"noisy: expected the shape of ids {tuple(ids.shape)}, got {tuple(noisy.shape)}")
    state = block_states(model, ids, block_size)
    blocks = ids.shape[1] // block_size
    if isinstance(t, Tensor) and t.dim():
        t = t.repeat_interleave(blocks)
    logits = model.denoise(noisy.reshape(-1, block_size), state, t)  # [B·blocks, S, V]
    return logits.reshape(*ids.shape, -1)


def masked_loss(logits: Tensor, noisy: Tensor, ids: Tensor, *, mask_token_id: int) -> Tensor:
    """Mean cross-entropy over the masked positions of the micro-batch, at the same position (no shift, no 1/t weight).

    A batch without any mask has loss 0 (and zero gradient) rather than NaN.
    """
    masked = noisy == mask_token_id
    return F.cross_entropy(logits[masked], ids[masked], reduction="sum") / masked.sum().clamp(min=1)


def denoiser_loss(
    model: TwoTower, ids: Tensor, *, block_size: int, mask_token_id: int = 3, generator: torch.Generator | None = None
) -> Tensor:
    """One training step's loss on clean sequences `[B, L]`: corrupt, denoise all blocks, masked cross-entropy."""
    noisy, t = corrupt(ids, mask_token_id=mask_token_id, generator=generator)
    logits = denoise_all_blocks(model, noisy, ids, t, block_size=block_size)
    return masked_loss(logits, noisy, ids, mask_token_id=mask_token_id)


def ar_loss(model: TwoTower, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy of the context tower on clean sequences `[B, L]`, L ≥ 2."""
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected at least 2 tokens per sequence, got {ids.shape[1]}")
    logits = model.forward_ar(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def seed_denoiser(model: TwoTower) -> None:
    """Copies the context tower and its head into the denoiser, where its training starts."""
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.load_state_dict(model.context_lm_head.state_dict())

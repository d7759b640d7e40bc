"""DiffusionGemma's sampler over `remask`."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

from twotower_kernels.integrations.transformers.swap import NotServed
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

_PREPARE = "_prepare_sampler"  # the method of a model by which its `generate` gets a sampler
_COMPILED = ("_compiled_accept_canvas", "_compiled_renoise_canvas")  # of the sampler that was there at a first call


class EntropyBoundSampler(theirs.EntropyBoundSampler):
    """Accepts by rising entropy while the sum of the entropies before stays within the bound, as the class of the same
    name in transformers; entropies, order and sum in one pass over the logits.

    Proposals and noise are drawn by PyTorch's generator, as there. So with the same seed the canvas is the same, unless
    a sum lies within rounding of the bound, or two entropies within rounding of each other there: both sum in float32,
    not in one order. Of equal entropies the first position comes first; there, any. A position whose logits hold NaN
    is not accepted; there, NaN is an error where arguments are validated.

    Arguments as there: the configuration with the bound, the canvas' length, the size of the vocabulary, and the number
    of steps, which changes nothing.
    """

    def __init__(
        self,
        config: theirs.EntropyBoundSamplerConfig,
        canvas_length: int,
        vocab_size: int,
        max_denoising_steps: int,
    ) -> None:
        super().__init__(config, canvas_length, vocab_size, max_denoising_steps)
        policy = RemaskPolicy.named("diffusion_gemma", entropy_bound=config.entropy_bound, t_min=None)
        self.accepted_token_mask: Any = None
        self._policy = dataclasses.replace(policy, greedy=True)  # the proposals are given

    def accept_canvas(
        self, current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: int | Tensor
    ) -> Any:
        """The canvas with the accepted proposals.

        Args:
            current_canvas, denoiser_canvas: `[B, S]` integers, what stands and what is proposed.
            logits: `[B, S, V]` float32, divided by the temperature.
            cur_step: not used.

        Raises:
            NotImplementedError: logits of another dtype, in which the original would round its entropies.
        """
        if logits.dtype != torch.float32:
            raise NotImplementedError(f"twotower EntropyBoundSampler: expected logits in float32, got {logits.dtype}")
        step = remask(
            logits,
            current_canvas,
            mask_token_id=None,
            policy=self._policy,
            temperature=1.0,
            candidates=denoiser_canvas,
        )
        self.accepted_token_mask = step.transfer_mask
        return torch.where(step.transfer_mask, denoiser_canvas, current_canvas)


def has_sampler(module: nn.Module) -> bool:
    return hasattr(type(module), _PREPARE)


def swap_sampler(model: Any) -> str:
    """Has the model's `generate` use ours, after a canvas on which both agree; what was swapped.

    Raises:
        NotServed: it is there already, or the model's is another.
    """
    if _PREPARE in vars(model):
        raise NotServed("it is swapped already")
    if getattr(type(model), _PREPARE) is not theirs.DiffusionGemmaGenerationMixin._prepare_sampler:
        raise NotServed(f"{type(model).__name__}.{_PREPARE} is not known")
    if not _agrees():
        raise NotServed("EntropyBoundSampler computes something else than the sampler of that name")
    model._prepare_sampler = partial(_prepare, model)
    _forget_compiled(model)
    return "EntropyBoundSampler over remask"


def restore_sampler(model: nn.Module) -> None:
    if _PREPARE in vars(model):
        delattr(model, _PREPARE)
        _forget_compiled(model)


def _prepare(model: Any, generation_config: Any) -> EntropyBoundSampler:
    return EntropyBoundSampler(
        config=generation_config.sampler_config,
        canvas_length=model.config.canvas_length,
        vocab_size=model.config.text_config.vocab_size,
        max_denoising_steps=generation_config.max_denoising_steps,
    )


def _forget_compiled(model: nn.Module) -> None:
    for name in _COMPILED:
        vars(model).pop(name, None)


def _agrees() -> bool:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 50, generator=generator) * torch.linspace(1, 12, 12)[:, None]
    current, proposed = torch.randint(50, (2, 2, 12), generator=generator)
    found = []
    for kind in (theirs.EntropyBoundSampler, EntropyBoundSampler):
        sampler = kind(theirs.EntropyBoundSamplerConfig(entropy_bound=1.5), 12, 50, 1)
        found.append((sampler.accept_canvas(current, proposed, logits, 1), sampler.accepted_token_mask))
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))

"""The kernels in the models of Hugging Face transformers, 5.20 or newer; docs/transformers.md."""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface

from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.cache import BlockCache
from twotower_kernels.integrations.transformers.experts import experts
from twotower_kernels.integrations.transformers.masks import mask
from twotower_kernels.integrations.transformers.replace import replace, restore
from twotower_kernels.integrations.transformers.sampler import EntropyBoundSampler
from twotower_kernels.integrations.transformers.swap import Swap

__all__ = ["BlockCache", "EntropyBoundSampler", "Swap", "register", "replace", "restore"]


def register(name: str = "twotower") -> None:
    """Makes the kernels known to transformers under a name: attention, its masks and mixtures of experts.

    Then `from_pretrained(path, attn_implementation=name, experts_implementation=name)`, or `from_config`, or a model's
    `set_attn_implementation` and `set_experts_implementation`. All three are registered together: attention without
    the mask function would lose the padding. What a model asks for and the kernels do not serve raises a
    NotImplementedError or ValueError whose text begins with "twotower"; nothing is left to another implementation.

    Args:
        name: not one of those that transformers has already.

    Raises:
        ValueError: the name is another implementation's.
    """
    table = (AttentionInterface, attention), (AttentionMaskInterface, mask), (ExpertsInterface, experts)
    for interface, function in table:
        if name == "eager" or interface().get(name, function) is not function:
            raise ValueError(f"twotower register: expected a name that is free, got {name!r}")
    for interface, function in table:
        interface.register(name, function)

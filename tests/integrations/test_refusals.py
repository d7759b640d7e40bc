"""What the adapter does not serve is refused by its name, and what it serves is not refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils

from tests.integrations.tiny_models import padded_batch, tiny
from twotower_kernels.integrations.transformers import register
from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.experts import experts
from twotower_kernels.integrations.transformers.masks import Mask, mask

register()


def qkv(queries: int = 3, keys: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dropout", 0.1),
        ("position_bias", torch.zeros(1, 4, 3, 3)),
        ("output_attentions", True),
        ("cu_seq_lens_q", torch.tensor([0, 3])),
        ("something_new", 1),
    ],
)
def test_arguments_of_attention(name: str, given: object) -> None:
    with pytest.raises(NotImplementedError, match=f"^twotower attention: {name} "):
        attention(nn.Module(), *qkv(), mask(2, 3, 3), **{name: given})


def test_what_changes_nothing_is_taken() -> None:
    given = {
        "position_ids": torch.arange(3)[None],
        "use_cache": True,
        "output_attentions": False,
        "position_bias": None,
    }
    inputs = qkv()
    plain, _ = attention(nn.Module(), *inputs, mask(2, 3, 3))
    assert torch.equal(attention(nn.Module(), *inputs, mask(2, 3, 3), **given)[0], plain)


def test_no_mask() -> None:
    """Where the keys may be a cache's, nothing says how many are in use."""
    module = nn.Module()
    with pytest.raises(NotImplementedError, match=r"^twotower attention: expected an attention_mask for 1 queries"):
        attention(module, *qkv(1, 9), None)
    q, k, v = qkv(3, 9)
    seen, _ = attention(module, q, k, v, None, is_causal=False)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(seen, wanted)
    q, k, v = qkv(3, 3)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attention(module, q, k, v, None)[0], wanted)


def test_masks_of_others() -> None:
    with pytest.raises(NotImplementedError, match=r"^twotower attention: expected an attention_mask from mask"):
        attention(nn.Module(), *qkv(), torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"^twotower attention: expected an attention_mask for \(2, 1, 3, 3\)"):
        attention(nn.Module(), *qkv(), mask(2, 3, 4, 1))
    with pytest.raises(ValueError, match=r"^twotower attention: expected sliding_window as in the attention_mask"):
        attention(nn.Module(), *qkv(), mask(2, 3, 3), sliding_window=2)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (lambda *_: True, "<lambda>"),
        (
            masking_utils.and_masks(
                masking_utils.chunked_overlay(4, torch.zeros(2)), masking_utils.bidirectional_mask_function
            ),
            "chunked_overlay",
        ),
        (masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: True), "or_masks"),
        (
            masking_utils.or_masks(
                masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0]]))
            ),
            "blockwise_overlay",
        ),
    ],
)
def test_patterns(pattern: object, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^twotower mask: expected causal_mask_function.*got .*{name}"):
        mask(2, 3, 3, mask_function=pattern)


def test_holes_and_unknown_options() -> None:
    with pytest.raises(NotImplementedError, match=r"^twotower mask: .* holes"):
        mask(1, 4, 4, attention_mask=torch.tensor([[True, False, True, True]]))
    with pytest.raises(NotImplementedError, match=r"^twotower mask: expected an attention_mask"):
        mask(1, 4, 4, attention_mask=torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match=r"^twotower mask: something_new"):
        mask(1, 4, 4, something_new=3)


@pytest.mark.parametrize(
    "compute", [lambda x: x.dtype, lambda x: x[:, :, :2], lambda x: torch.zeros(3) + x, lambda x: torch.where(x, 1, 0)]
)
def test_models_that_compute_with_their_mask(compute: Callable[[Mask], object]) -> None:
    with pytest.raises(NotImplementedError, match=r"^twotower mask: expected a model that hands its mask on"):
        compute(mask(2, 3, 3))
    assert not hasattr(mask(2, 3, 3), "to")


def as_matrix(seen: Mask) -> Tensor:
    """The mask that a `Mask` stands for, [B, queries, keys]."""
    batch, _, queries, keys = seen.shape
    lens = torch.as_tensor(seen.lens).expand(batch)
    starts = torch.zeros(batch) if seen.starts is None else seen.starts
    rows = torch.full((batch,), queries) if seen.block_lens is None else seen.block_lens
    t, i = torch.arange(keys), torch.arange(queries)[:, None]
    found = ((t >= starts[:, None]) & (t < lens[:, None]))[:, None].expand(batch, queries, keys)
    if seen.causal:
        last = (lens - rows)[:, None, None] + i
        found = found & (t <= last) & (t > last - (seen.window or keys)) & (i < rows[:, None, None])
    return found


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("offset", [0, 4, torch.tensor(4)])
@pytest.mark.parametrize("keys", [7, 12])
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_masks_are_those_of_transformers(window: int | None, offset: int | Tensor, keys: int, pad: str | None) -> None:
    """The same keys for every query that is no padding, also of a static cache with rows to spare."""
    pattern = masking_utils.causal_mask_function
    if window is not None:
        pattern = masking_utils.sliding_window_causal_mask_function(window)
    tokens = int(offset) + 3
    padding = None if pad is None else torch.arange(tokens).expand(2, -1) >= torch.tensor([[0], [2]])
    if pad == "right":
        padding = padding.flip(1)
    arguments = {"q_offset": offset, "mask_function": pattern, "attention_mask": padding}
    wanted = masking_utils.sdpa_mask(2, 3, keys, **arguments, allow_is_causal_skip=False)
    real = torch.ones(2, 3, dtype=torch.bool) if padding is None else padding[:, -3:]
    found = as_matrix(mask(2, 3, keys, **arguments))
    assert torch.equal(found[real], wanted[:, 0].expand(2, 3, keys)[real]) and real.any()


@pytest.mark.parametrize(
    ("flag", "value"), [("is_transposed", True), ("is_concatenated", False), ("has_post_expert_norm", True)]
)
def test_flags_of_experts(flag: str, value: bool) -> None:
    module = tiny("Mixtral").model.layers[0].mlp.experts
    setattr(module, flag, value)
    with pytest.raises(NotImplementedError, match=f"^twotower experts: {flag}={value} of MixtralExperts"):
        experts(module, torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


def test_activations_of_experts() -> None:
    module = tiny("Mixtral").model.layers[0].mlp.experts
    arguments = torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    module.act_fn = nn.Tanh()
    with pytest.raises(NotImplementedError, match=r"^twotower experts: act_fn Tanh of MixtralExperts"):
        experts(module, *arguments)

    class Other(type(module)):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate_up.chunk(2, dim=-1)[0]

    module.__class__ = Other
    with pytest.raises(NotImplementedError, match=r"^twotower experts: Other._apply_gate"):
        experts(module, *arguments)


def test_a_model_with_packed_experts_says_so() -> None:
    model, (ids, padding) = tiny("GptOss"), padded_batch()
    model.set_experts_implementation("twotower")
    with pytest.raises(NotImplementedError, match=r"^twotower experts: is_transposed=True of GptOssExperts"):
        model(input_ids=ids, attention_mask=padding)


def test_names() -> None:
    register()  # once more changes nothing
    for name in ("eager", "sdpa", "grouped_mm"):
        with pytest.raises(ValueError, match=f"^twotower register: expected a name that is free, got '{name}'"):
            register(name)
    assert AttentionInterface().get("twotower") is attention

"""Mamba-2 mixers over the scan: results, states, padding; what is not served is refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.integrations.tiny_models import MODELS, padded_batch, tiny
from twotower_kernels.integrations.transformers import replace, restore


def mixer_of(name: str, **more: object) -> tuple[nn.Module, object]:
    model = tiny(name, **more)
    return next(module for module in model.modules() if hasattr(module, "A_log")), model.config


def run(mixer: nn.Module, config: object, mask: Tensor | None, pieces: list[int]) -> list[Tensor]:
    """What comes of a text in pieces, and the states at its end."""
    x = torch.randn(3, sum(pieces), mixer.hidden_size, generator=torch.Generator().manual_seed(4))
    cache, results, start = DynamicCache(config=config), [], 0
    with torch.no_grad():
        for tokens in pieces:
            piece = slice(start, start + tokens)
            of_piece = None if mask is None or tokens == 1 else mask[:, piece]
            results.append(mixer(x[:, piece], cache_params=cache, attention_mask=of_piece))
            start += tokens
    layer = mixer.layer_idx
    return [torch.cat(results, 1), cache.get_conv_state(layer), cache.get_recurrent_state(layer)]


@pytest.mark.parametrize("name", ["NemotronH", "Bamba", "FalconH1"])
@pytest.mark.parametrize("pieces", [[14], [11, 1, 1, 1], [1, 1, 12], [2, 9, 3], [8, 1, 5]])
def test_texts_in_pieces(name: str, pieces: list[int]) -> None:
    """A row begins in the first piece, in a later one, or at once; states are those of the original, too."""
    mixer, config = mixer_of(name)
    starts = torch.tensor([0, 3, 8]) if 1 not in pieces[:1] else torch.zeros(3)
    for mask in (None, (torch.arange(14) >= starts[:, None]).long()):
        wanted = run(mixer, config, mask, pieces)
        assert replace(mixer)[0].swapped
        for found, original in zip(run(mixer, config, mask, pieces), wanted, strict=True):
            assert found.dtype == original.dtype
            torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-4)
        restore(mixer)
        assert all(torch.equal(x, y) for x, y in zip(run(mixer, config, mask, pieces), wanted, strict=True))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mamba_rms_norm": False}, "mamba2_scan"),  # SiLU(gate) alone
        ({"mamba_norm_before_gate": True}, "mamba2_scan"),  # by the module's norm
        ({"mamba_proj_bias": True, "time_step_limit": (0.1, 0.5)}, "mamba2_scan and gated_rms_norm"),
        ({"mamba_conv_bias": False, "mamba_n_groups": 1}, "mamba2_scan and gated_rms_norm"),
    ],
)
def test_variants(more: dict[str, object], why: str) -> None:
    mixer, config = mixer_of("FalconH1", **more)
    mask = (torch.arange(14) >= torch.tensor([0, 3, 8])[:, None]).long()
    wanted = run(mixer, config, mask, [11, 1, 2])
    assert replace(mixer)[0] == ("", True, why)
    for found, original in zip(run(mixer, config, mask, [11, 1, 2]), wanted, strict=True):
        torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["NemotronH", "Bamba"])
def test_padding_between_pieces(name: str) -> None:
    """On the right of a piece and on the left of the next one, over states that are not zero."""
    mixer, config = mixer_of(name)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1, 5:8] = mask[2, 2:5] = mask[2, 12:] = 0
    wanted = run(mixer, config, mask, [5, 8, 1])
    replace(mixer)
    for found, original in zip(run(mixer, config, mask, [5, 8, 1]), wanted, strict=True):
        torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-4)


def test_what_it_refuses() -> None:
    mixer, _ = mixer_of("NemotronH")
    replace(mixer)
    x, holes = torch.randn(1, 4, 32), torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        with pytest.raises(
            NotImplementedError, match=r"^twotower mixer: expected an attention_mask with padding at the ends"
        ):
            mixer(x, attention_mask=holes)
        with pytest.raises(NotImplementedError, match=r"^twotower mixer: seq_idx is not served, got Tensor"):
            mixer(x, seq_idx=torch.zeros(1, 4))
        mixer(x, use_cache=False, position_ids=torch.arange(4)[None], seq_idx=None)


def test_bfloat16() -> None:
    """As near to float32's results as the original is, or twice as far."""
    model, (_, mask) = tiny("NemotronH"), padded_batch()
    mixer = model.model.layers[0].mixer
    x = torch.randn(3, 11, 32)
    with torch.no_grad():
        exact = mixer(x, attention_mask=mask)
        mixer.bfloat16()
        errors = []
        for _ in range(2):
            errors.append((mixer(x.bfloat16(), attention_mask=mask) - exact).abs().mean())
            replace(mixer)
    assert errors[1] <= 2 * errors[0]


def test_other_mixers_are_left() -> None:
    mixer, _ = mixer_of("Mamba2")
    mixer.activation = "gelu"
    assert replace(mixer)[0] == ("", False, "Mamba2Mixer: activation gelu is not served")

    class Mamba2Mixer(type(mixer)):
        def forward(self, *arguments: object, **options: object) -> Tensor:
            return super().forward(*arguments, **options) * 1.001

    mixer, _ = mixer_of("Mamba2")
    mixer.__class__ = Mamba2Mixer
    assert replace(mixer)[0] == ("", False, "Mamba2Mixer computes something else than the mixer of that name")
    assert "Mamba2" not in MODELS

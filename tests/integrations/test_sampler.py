"""DiffusionGemma's sampler accepts what the original accepts, and leaves the noise to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

from tests.integrations.tiny_models import diffusion_gemma
from twotower_kernels.integrations.transformers import EntropyBoundSampler, Swap, replace, restore


def samplers(bound: float, canvas: int, vocab: int) -> tuple[EntropyBoundSampler, theirs.EntropyBoundSampler]:
    arguments = theirs.EntropyBoundSamplerConfig(entropy_bound=bound), canvas, vocab, 48
    return EntropyBoundSampler(*arguments), theirs.EntropyBoundSampler(*arguments)


@given(
    st.integers(0, 2**32),
    st.floats(0.01, 8.0),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(2, 300),
    st.booleans(),
)
def test_the_same_canvas(seed: int, bound: float, rows: int, canvas: int, vocab: int, suppressed: bool) -> None:
    """Unless a sum lies within rounding of the bound."""
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.logspace(-1, 1.5, canvas)[torch.randperm(canvas, generator=generator)]
    logits = torch.randn(rows, canvas, vocab, generator=generator) * sharp[:, None]
    if suppressed:
        logits[..., 1] = -torch.inf
    current, proposed = torch.randint(vocab, (2, rows, canvas), generator=generator)
    found, original = samplers(bound, canvas, vocab)
    entropies = torch.distributions.Categorical(logits=logits.double()).entropy().sort().values
    before = entropies.cumsum(-1) - entropies
    results = [s.accept_canvas(current, proposed, logits, torch.tensor(3)) for s in (found, original)]
    if (before - bound).abs().min() > 1e-4:
        assert torch.equal(*results) and torch.equal(found.accepted_token_mask, original.accepted_token_mask)
    for sampler in (found, original):
        torch.manual_seed(seed)
        results.append(sampler.renoise_canvas(proposed, torch.tensor(3)))
    if torch.equal(found.accepted_token_mask, original.accepted_token_mask):
        assert torch.equal(*results[2:])
    assert found.accepted_token_mask.any(1).all()  # the surest position, whatever the bound


def test_ties_and_numbers_that_are_none() -> None:
    found, _ = samplers(1.0, 4, 9)
    current, proposed = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    assert found.accept_canvas(current, proposed, torch.zeros(1, 4, 9), 1).tolist() == [[1, 0, 0, 0]]
    logits = torch.zeros(1, 4, 9)
    logits[0, 0, 3] = torch.nan
    assert found.accept_canvas(current, proposed, logits, 1).tolist() == [[0, 1, 0, 0]]


def test_what_it_refuses() -> None:
    found, _ = samplers(1.0, 4, 9)
    canvas = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"^twotower EntropyBoundSampler: expected logits in float32, got"):
        found.accept_canvas(canvas, canvas, torch.zeros(1, 4, 9, dtype=torch.bfloat16), 1)


def test_where_it_is_put() -> None:
    model = diffusion_gemma()

    def replaced(**arguments: bool) -> list[Swap]:
        swaps = replace(model, norms=False, routers=False, experts=False, **arguments)
        return [swap for swap in swaps if not swap.name.endswith("append_to_cache")]

    assert replaced(sampler=False) == []
    assert replaced() == [Swap("generate", True, "EntropyBoundSampler over remask")]
    assert replaced() == [Swap("generate", False, "it is swapped already")]
    config = theirs.DiffusionGemmaGenerationConfig(sampler_config=theirs.EntropyBoundSamplerConfig(entropy_bound=0.3))
    assert isinstance(model._prepare_sampler(config), EntropyBoundSampler)
    restore(model)
    assert type(model._prepare_sampler(config)) is theirs.EntropyBoundSampler

    class Other(type(model)):
        def _prepare_sampler(self, generation_config: object) -> None:
            """Of another kind."""

    model.__class__ = Other
    assert replaced() == [Swap("generate", False, "Other._prepare_sampler is not known")]


@pytest.mark.thorough
def test_compiled() -> None:
    """As `generate` compiles it with a static cache."""
    found, _ = samplers(1.0, 8, 50)
    logits, canvas = torch.randn(2, 8, 50) * 3, torch.randint(49, (2, 8))
    wanted = found.accept_canvas(canvas, canvas + 1, logits, torch.tensor(2))
    compiled = torch.compile(found.accept_canvas, fullgraph=True, backend="eager")
    assert torch.equal(compiled(canvas, canvas + 1, logits, torch.tensor(2)), wanted)

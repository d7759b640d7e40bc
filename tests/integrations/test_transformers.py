"""Models of transformers give the same logits and the same tokens with these kernels as with its own."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.integrations.tiny_models import MODELS, PACKED, padded_batch, tiny
from twotower_kernels.integrations.transformers import register

register()
NEW_TOKENS = 12
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def ours(model: PreTrainedModel, experts: bool = True) -> PreTrainedModel:
    model.set_attn_implementation("twotower")
    if experts:
        model.set_experts_implementation("twotower")
    return model


def theirs(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found if mask is None else found[mask.bool()]


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "no_repeat_ngram_size": 1} | options  # no token twice
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens(name: str) -> None:
    model, (ids, mask) = theirs(tiny(name)), padded_batch()
    wanted = logits(model, ids, mask), logits(model, ids)
    tokens = generated(model, ids, mask)
    assert len({tuple(row) for row in tokens[:, ids.shape[1] :].tolist()}) == len(ids)  # each row says its own
    ours(model, experts=name not in PACKED)
    torch.testing.assert_close(logits(model, ids, mask), wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model, ids), wanted[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(generated(model, ids, mask), tokens)
    assert torch.equal(generated(model, ids, mask, cache_implementation="static"), tokens)

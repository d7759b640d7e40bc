"""The context tower against transformers' own nemotron_h model with the same weights, which it wrote to disk itself."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower_kernels import TwoTowerModel
from twotower_kernels.bench.baselines.foreign import nemotron_h
from twotower_kernels.reference.model import ContextState, TwoTower
from twotower_kernels.testing.budget import assert_within_budget

VOCABULARY, CHUNK = 97, 8
GROUPED = dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
OTHER = dict(norm_topk_prob=False, num_key_value_heads=4, n_groups=1, use_conv_bias=False, layer_norm_epsilon=1e-3)
MODELS: dict[str, tuple[str, dict]] = {
    "mamba": ("M", {}),
    "attention": ("*", {}),
    "experts": ("E", {}),
    "dense": ("-", {}),
    "one of each": ("M*E-", {}),
    "the released order": ("MEM*EMEM*E", {}),
    "grouped router": ("E", GROUPED),
    "grouped router in a hybrid": ("MEM*EM*E", GROUPED),
    "other options": ("M*E-M", OTHER),
    "clamped time step": ("MM", dict(time_step_min=0.05)),
}


def randomized(pattern: str, options: dict) -> Any:
    """Their model with weights of the size that training leaves: residual stream, logits and states are of order 1."""
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=40, chunk_size=CHUNK)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    sizes |= dict(mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=16, n_groups=2, time_step_min=1e-9)
    sizes |= dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
    sizes |= dict(moe_shared_expert_intermediate_size=32, hybrid_override_pattern=pattern)
    config = nemotron_h.Config(**sizes | options, attn_implementation="eager", experts_implementation="eager")
    model = nemotron_h.Model(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(len(pattern))
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        normal = torch.randn(p.shape, generator=generator)
        if name.endswith("A_log"):
            p.copy_(normal.abs().add(0.1).log())
        elif name.endswith("dt_bias"):
            p.copy_(normal * 2 - 2)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias")):
            p.copy_(1 + 0.3 * normal)
        elif name.endswith("e_score_correction_bias"):
            p.copy_(normal.abs() * 0.1)  # positive, because they drop a group by -inf where the definition says 0
        elif name.endswith("embeddings.weight"):
            p.copy_(normal)
        else:
            p.copy_(normal / p.shape[-1] ** 0.5)
    return model


@cache
def loaded(name: str) -> SimpleNamespace:
    """Their model, and ours in float32 and float64 from the files that `save_pretrained` wrote."""
    pattern, options = MODELS[name]
    theirs = randomized(pattern, options)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        path = Path(folder) / "config.json"
        # Their code takes the limits from time_step_min.
        limit = [theirs.config.time_step_min, math.inf]
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(time_step_limit=limit)))
        ours = TwoTower.from_pretrained(folder).requires_grad_(False)
        exact = TwoTower.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    return SimpleNamespace(theirs=theirs, ours=ours, exact=exact)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 4 * CHUNK + 5])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(name: str, length: int) -> None:
    """Within 1e-4, and no further from float64 than twice what their float32 program is."""
    models, ids = loaded(name), random_ids(2, length)
    ours, theirs = models.ours.forward_ar(ids), models.theirs(ids, use_cache=False).logits
    assert theirs.abs().max() > 1
    close(ours, theirs)
    assert_within_budget(ours, theirs, models.exact.forward_ar(ids), what="logits")


def test_the_weights_make_a_difference() -> None:
    """Guards the parity above: no parameter is so small, or so little used, that its loss would go unnoticed."""
    models, ids = loaded("grouped router in a hybrid"), random_ids(2, 29)
    right = models.ours.forward_ar(ids)
    experts = 0
    for key, p in models.ours.context_tower.named_parameters():
        kept = p.data.clone()
        p.data.zero_()
        unnoticed = (models.ours.forward_ar(ids) - right).abs().max() < 1e-3
        p.data.copy_(kept)
        assert not unnoticed or ".experts." in key, key
        experts += ".experts." in key and not unnoticed
    assert experts > 20


@pytest.mark.parametrize("original", [True, False], ids=["as published", "as in their modules"])
@pytest.mark.parametrize("kind", [TwoTower, TwoTowerModel], ids=["reference", "package"])
def test_what_they_save_is_read_untouched(kind: type[TwoTower | TwoTowerModel], original: bool, tmp_path: Path) -> None:
    """A folder as `save_pretrained` leaves it, in bfloat16: layers by name, an infinity as an object, two ends. It is
    loaded in bfloat16, every number of it, and computes in float32 as they do."""
    theirs = randomized("M*E-M", dict(eos_token_id=[2, 11])).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, save_original_format=original)
    saved = (tmp_path / "config.json").read_text()
    assert "linear_attention" in saved and "__float__" in saved and "torch_dtype" not in saved
    ours = kind.from_pretrained(tmp_path)
    assert ours.config.hybrid_override_pattern == "M*E-M" and ours.config.eos_token_id == (2, 11)
    assert ours.config.time_step_limit == (0.0, math.inf)
    state = ours.state_dict()
    assert all(value.dtype == torch.bfloat16 for key, value in state.items() if key.startswith("context_"))
    for key, value in theirs.state_dict().items():
        key = key.replace("model.", "context_tower.", 1).replace("lm_head", "context_lm_head")
        pieces = value if (stacked := key.endswith(("experts.up_proj", "experts.down_proj"))) else [value]
        for i, piece in enumerate(pieces):
            prefix, _, projection = key.rpartition(".")
            assert torch.equal(state.pop(f"{prefix}.{i}.{projection}.weight" if stacked else key), piece), key
    assert not any(key.startswith("context_") for key in state)
    ids = random_ids(2, 4 * CHUNK + 5)
    wide = kind.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        close(wide.forward_ar(ids), theirs.float()(ids, use_cache=False).logits)


@settings(max_examples=15)
@given(
    name=st.sampled_from(["mamba", "one of each", "grouped router in a hybrid", "other options"]),
    pieces=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_committing_in_pieces_gives_their_logits(name: str, pieces: list[int], seed: int) -> None:
    """Prefill, then commits of any length: the cached state's logits are those of their one pass over all tokens."""
    models, ids = loaded(name), random_ids(2, 1 + sum(pieces), seed)
    theirs = models.theirs(ids, use_cache=False).logits
    state, end = models.ours.prefill(ids[:, :1]), 1
    close(state.logits, theirs[:, 0])
    for piece in pieces:
        state = models.ours.commit(ids[:, end : end + piece], state)
        end += piece
        close(state.logits, theirs[:, end - 1])


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 19), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_ragged_batch_gives_what_they_give_for_each_row(lengths: list[int], seed: int) -> None:
    models, ids = loaded("grouped router in a hybrid"), random_ids(len(lengths), max(lengths), seed)
    state = models.ours.prefill(ids, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        close(state.logits[row : row + 1], models.theirs(ids[row : row + 1, :length], use_cache=False).logits[:, -1])


def same_cache(state: ContextState, cache: Any, pattern: str) -> None:
    for i, letter in enumerate(pattern):
        layer = cache.layers[i]
        if letter == "M":
            close(state.ssm[i], cache.get_recurrent_state(i, state_idx=0))
            theirs = cache.get_conv_state(i, state_idx=0)
            close(state.conv[i], theirs[..., -state.conv[i].shape[-1] :])
        elif letter == "*":
            close(state.k[i].transpose(1, 2), layer.keys)
            close(state.v[i].transpose(1, 2), layer.values)


@pytest.mark.parametrize("name", ["one of each", "grouped router in a hybrid", "other options"])
def test_decoding_token_by_token_follows_their_cache(name: str) -> None:
    """States, keys and values too: after the prompt, and after each of some tokens in their recurrent form."""
    models, ids = loaded(name), random_ids(2, 24)
    prompt = 2 * CHUNK + 3
    out = models.theirs(ids[:, :prompt], use_cache=True)
    state = models.ours.prefill(ids[:, :prompt])
    for token in range(prompt, ids.shape[1]):
        same_cache(state, out.past_key_values, MODELS[name][0])
        close(state.logits, out.logits[:, -1])
        out = models.theirs(ids[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True)
        state = models.ours.commit(ids[:, token : token + 1], state)
    close(state.logits, out.logits[:, -1])


@pytest.mark.parametrize("name", ["one of each", "grouped router in a hybrid"])
def test_the_denoiser_seeded_from_them_predicts_as_they_do(name: str) -> None:
    """Without time, and with a block of one token, the denoiser that a backbone seeds is that backbone."""
    models, ids = loaded(name), random_ids(3, 12)
    theirs = models.theirs(ids, use_cache=False).logits
    for length in (1, 5, 12):
        state = models.ours.prefill(ids[:, : length - 1])
        close(models.ours.denoise(ids[:, length - 1 : length], state), theirs[:, length - 1 : length])

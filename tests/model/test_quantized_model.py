"""Models whose weights are quantized as they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twotower_kernels as tt
from twotower_kernels.model import parts
from twotower_kernels.quantization import FORMATS

PROMPT = [[1, 40, 41, 42], [1, 40]]


def quantized(model: nn.Module) -> dict[str, str]:
    return {name: m.format for name, m in model.named_modules() if isinstance(m, tt.QuantizedTensor)}


def dequantized(path: Path, model: tt.TwoTowerModel, dtype: torch.dtype) -> tt.TwoTowerModel:
    """The model that a quantized one stands for, with plain weights."""
    plain = tt.TwoTowerModel.from_pretrained(path, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, tt.QuantizedTensor):
            owner = plain.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(module.dequantize(dtype), requires_grad=False))
    return plain


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "mxfp4"])
def test_it_computes_with_what_its_weights_stand_for(format: str) -> None:
    every = {f"{tower}.{part}": format for tower in parts.TOWERS for part in ("head", "embeddings")}
    chosen = {"context": format, "denoiser": format} | every
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path(), dtype=torch.float32, quantize=chosen)
    plain = dequantized(tt.demo_path(), model, torch.float32)
    ids = torch.tensor([[1, 40, 41, 42, 43, 50, 7, 9]])
    torch.testing.assert_close(model.forward_ar(ids), plain.forward_ar(ids), rtol=1e-3, atol=1e-3)
    block = torch.full((1, 16), 3)
    got, expected = (m.denoise(block, m.prefill(ids), t=0.5) for m in (model, plain))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    texts = [m.generate(PROMPT, max_new_tokens=20, mode="ar").sequences for m in (model, plain)]
    assert all(torch.equal(a[:4], b[:4]) for a, b in zip(*texts, strict=True))  # later, sums may decide


def test_names_decide() -> None:
    choice: dict[str, str | None] = {"denoiser": "int4", "denoiser.mamba": "int8", "denoiser.attention": None}
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path(), quantize=choice)
    found = quantized(model)
    assert found and all(name.startswith("denoiser_tower.layers.") for name in found)
    assert {f for name, f in found.items() if name.endswith(("in_proj.weight", "out_proj.weight"))} == {"int8"}
    assert not any("q_proj" in name for name in found)
    assert {f for name, f in found.items() if ".experts." in name or "shared" in name} == {"int4"}
    everything = quantized(tt.TwoTowerModel.from_pretrained(tt.demo_path(), quantize="int8"))
    assert not any(
        part in name for name in everything for part in ("head", "embed", "gate", "norm", "conv1d", "t_block", "tables")
    )
    assert {name.split("_")[0] for name in everything} == {"context", "denoiser"}


def test_drafts_of_a_quantized_denoiser_are_autoregressions_text() -> None:
    """The context tower decides, and it is not quantized."""
    plain = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path(), quantize={"denoiser": "int4"})
    options: dict[str, Any] = dict(max_new_tokens=24, temperature=0.8, seed=3)
    drafted = model.generate(PROMPT, mode="speculative", **options)
    alone = plain.generate(PROMPT, mode="ar", **options)
    assert all(torch.equal(a, b) for a, b in zip(drafted.sequences, alone.sequences, strict=True))


def test_states_survive_being_saved() -> None:
    first, other = (tt.TwoTowerModel.from_pretrained(tt.demo_path(), quantize="int4") for _ in range(2))
    for module in other.modules():
        if isinstance(module, tt.QuantizedTensor):
            module.data.zero_()
    other.load_state_dict(first.state_dict())
    ids = torch.tensor([[1, 40, 41, 42]])
    assert torch.equal(first.forward_ar(ids), other.forward_ar(ids))
    total = sum(tensor.nbytes for tensor in first.state_dict().values())
    assert total < 0.55 * sum(p.nbytes for p in tt.TwoTowerModel.from_pretrained(tt.demo_path()).state_dict().values())


@pytest.mark.parametrize(
    ("quantize", "error", "said"),
    [
        ("int3", ValueError, "quantize: expected one of .* for context, got 'int3'"),
        ({"contexts": "int4"}, ValueError, "quantize: expected names among context, .* got 'contexts'"),
        ({"context.heads": "int4"}, ValueError, "got 'context.heads'"),
        (4, TypeError, "quantize: expected a format, a mapping to formats, or None, got int"),
        ("mxfp4", ValueError, "quantize: expected a multiple of 32 columns for mxfp4, got 80 in context_tower"),
    ],
)
def test_what_cannot_be_is_refused(quantize: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tt.TwoTowerModel.from_pretrained(tt.demo_path(), quantize=quantize)


def test_every_key_of_a_tower_is_of_a_part_or_of_none() -> None:
    keys = tt.TwoTowerModel.from_pretrained(tt.demo_path()).state_dict()
    found: dict[str | None, set[str]] = {}
    for key in keys:
        found.setdefault(parts.part_of(key), set()).add(key)
    assert set(found) == {"experts", "shared", "attention", "mamba", "head", "embeddings", None}
    assert all(isinstance(keys[key], Tensor) and keys[key].ndim == 2 for part in found if part for key in found[part])
    assert not any(key.endswith(("gate.weight", "proj.weight")) and "gate" not in key for key in found[None])

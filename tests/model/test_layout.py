"""The layout by arithmetic is the layout of the modules, and weights that nothing could hold are refused at once."""

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paths import ROOT
from twotower_kernels import TwoTowerConfig, TwoTowerModel
from twotower_kernels.bench.checks.random_models import SIZES
from twotower_kernels.model import loading, memory
from twotower_kernels.model.layout import STACKED, Layout
from twotower_kernels.reference import model as specification

RELEASED = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    options = {name: draw(st.booleans()) for name in ("use_conv_bias", "n_shared_experts")}
    options["n_shared_experts"] = int(options["n_shared_experts"])
    sizes = {name: draw(st.integers(1, 9)) for name in ("head_dim", "moe_intermediate_size", "conv_kernel")}
    pattern = draw(st.text("ME*-", min_size=1, max_size=12))
    return SIZES | options | sizes | {"hybrid_override_pattern": pattern}


@settings(max_examples=60)
@given(fields=configs(), towers=st.sampled_from(["both", "context", "denoiser"]), stacked=st.booleans())
def test_the_layout_is_that_of_the_modules(fields: dict[str, Any], towers: str, stacked: bool) -> None:
    """Keys, their number, shapes, and the count of all numbers; what the other tower has is no key here."""
    config = TwoTowerConfig(**fields)
    model = TwoTowerModel(config, device="meta", towers=towers)
    targets, layout = loading.targets(model, stacked=stacked), Layout(config, towers, stacked=stacked)
    assert set(layout) == set(targets) and len(layout) == len(targets)
    assert {key: layout.shape(key) for key in layout} == {key: target.shape for key, target in targets.items()}
    numbers = sum(layout.numbers(tower) for tower in layout.towers)
    assert numbers == sum(p.numel() for p in model.parameters())
    others = {key for key in Layout(config, stacked=stacked) if key not in targets}
    assert all(layout.shape(key) is None for key in others)
    assert len(Layout(config, stacked=stacked)) == len(targets) + len(others)


@given(fields=configs())
def test_the_specification_counts_the_same_numbers(fields: dict[str, Any]) -> None:
    config = TwoTowerConfig(**fields)
    assert specification.numbers(config) == Layout(config, "context").numbers("context")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "lm_head",
        "context_tower.layers.1.mixer.experts.8.up_proj.weight",
        "context_tower.layers.1.mixer.experts.08.up_proj.weight",
        "context_tower.layers.1.mixer.experts.{}.up_proj.weight",
        "context_tower.layers.1.mixer.experts.-1.up_proj.weight",
        "context_tower.layers.1.mixer.experts.٣.up_proj.weight",
        f"context_tower.layers.1.mixer.experts.{'1' * 5000}.up_proj.weight",
        "context_tower.layers.4.norm.weight",
        "context_tower.layers.01.norm.weight",
        "context_tower.layers.0.mixer.q_proj.weight",
        "context_tower.layers.0.norm.weight\n",
        "scale_shift_tables.4",
        "scale_shift_tables.-1",
        *(f"context_tower.layers.1{key}" for key in STACKED),
    ],
)
def test_a_key_that_only_looks_like_one_has_no_shape(key: str) -> None:
    layout = Layout(TwoTowerConfig(**SIZES, hybrid_override_pattern="ME*-"))
    assert layout.shape("context_tower.layers.1.mixer.experts.7.up_proj.weight") == (24, 32)
    assert layout.shape(key) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def released(**fields: Any) -> TwoTowerConfig:
    raw = json.loads((ROOT / "twotower_kernels" / "demo" / "config.json").read_text())
    sizes = dict(vocab_size=131072, hidden_size=2688, hybrid_override_pattern=RELEASED, num_hidden_layers=52)
    sizes |= dict(num_attention_heads=32, num_key_value_heads=2, head_dim=128, mamba_num_heads=64, mamba_head_dim=64)
    sizes |= dict(ssm_state_size=128, n_groups=8, n_routed_experts=128, num_experts_per_tok=6)
    sizes |= dict(moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712)
    return TwoTowerConfig.from_dict(raw | sizes | fields)


def test_the_released_model_has_its_parameters() -> None:
    """31.6 billion in each tower (arXiv 2606.26493)."""
    layout = Layout(released())
    assert round(layout.numbers("context") / 1e9, 1) == 31.6
    assert layout.numbers("denoiser") - layout.numbers("context") == sum(
        p.numel()
        for name, p in TwoTowerModel(released(), device="meta").named_parameters()
        if name.startswith(("t_embedder", "t_block", "scale_shift"))
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(n_routed_experts=10**9, n_group=1), "1000000000 experts"),
        (dict(vocab_size=2**31 - 1), "vocab_size 2147483647"),
        (dict(hidden_size=2**31 - 1), "hidden_size 2147483647"),
        (dict(hybrid_override_pattern="E" * 10_000, num_hidden_layers=10_000), "10000 layers"),
    ],
)
def test_a_model_that_no_memory_could_hold_is_refused(fields: dict[str, Any], words: str) -> None:
    """At once, in one line that says what it needs and what there is."""
    start = time.process_time()
    with pytest.raises(
        ValueError, match=rf"^[^\n]*{words}[^\n]* needs \d+ bytes in \S+, more than the \d+ that cpu has"
    ):
        TwoTowerModel(released(**fields))
    assert time.process_time() - start < 2


def test_sizes_beyond_any_address_are_refused_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match=r"needs \d+ bytes .* that meta has"):
        TwoTowerModel(released(vocab_size=2**31 - 1, hidden_size=2**31 - 1), device="meta")


def test_the_limit_is_each_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the device's, of both towers if both are there, in the dtype they will have."""
    config = TwoTowerConfig(**SIZES, hybrid_override_pattern="ME*-")
    layout = Layout(config)
    bytes_of = {tower: 4 * layout.numbers(tower) for tower in layout.towers}
    cpu = torch.device("cpu")
    devices = dict.fromkeys(layout.towers, cpu)
    monkeypatch.setattr(memory, "memory", lambda device: sum(bytes_of.values()) - (1 if device == cpu else 0))
    with pytest.raises(ValueError, match=f"needs {sum(bytes_of.values())} bytes in torch.float32"):
        memory.check_room(layout, torch.float32, devices)
    memory.check_room(layout, torch.bfloat16, devices)
    memory.check_room(layout, torch.float32, devices | {"denoiser": torch.device("meta")})
    memory.check_room(Layout(config, "context"), torch.float32, devices)


def test_what_a_device_has_is_known() -> None:
    total = memory.memory(torch.device("cpu"))
    assert 2**28 < total <= memory.UNKNOWN
    assert memory.memory(torch.device("meta")) == memory.UNKNOWN

"""The options of a remasking step: what the presets set, what is refused, and the time that the denoiser is given."""

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.kernels.remask_cases import policies
from twotower_kernels.reference import remask_policy as specification
from twotower_kernels.reference.remask_schedule import model_time

P = tt.RemaskPolicy

# Written down while the specification and the package each had presets of their own, and agreed on all of these. Fields
# that are not named have their default.
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8"))
DEFAULTS = {
    **{"suppress_mask": True, "skip_mask_candidates": False, "standing": False, "greedy": False, "statistics": "raw"},
    **{"top_p_first": False, "top_p_tempered": True, "top_p_keep_crossing": True, "temperature_end": None},
    **{"score": "confidence", "position_penalty": 0.0, "rank_temperature": 0.0},
    **{"gate": "none", "gate_bound": 0.0, "strict": True, "gate_on": "confidence", "gate_slack": None},
    **{"factor_last_free": False, "entropy_includes_self": True, "run_threshold": None},
    **{"schedule": "remaining", "schedule_base": "masks", "spread_remainder": True, "alpha": "linear", "min_t": 0.0},
    **{"alpha_floor": 0.0},
    **{"long_grid": False, "warmup": 0.0, "min_commits": 1, "finish": True},
    **{"window": False, "combine": "fill", "sub_block": 0, "complete_threshold": None},
    **{
        "edit_threshold": None,
        "remask_threshold": None,
        "renoise": False,
        "renoise_as": "random",
        "time": "masked_fraction",
    },
}


def test_there_is_one_class() -> None:
    """A policy made under either name serves both programs."""
    assert specification.RemaskPolicy is P


def test_the_defaults() -> None:
    assert dataclasses.asdict(P()) == DEFAULTS
    assert [field.name for field in dataclasses.fields(P)] == list(DEFAULTS)


def test_every_preset_is_recorded() -> None:
    presets = {name for name in vars(P) if inspect.ismethod(getattr(P, name))}
    assert {r["preset"] for r in RECORDED if not r["arguments"] and not r["options"]} == presets


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: f"{r['preset']}{r['arguments'] or ''}{r['options'] or ''}")
def test_presets_set_what_was_recorded(recorded: dict[str, Any]) -> None:
    policy = getattr(P, recorded["preset"])(*recorded["arguments"], **recorded["options"])
    assert dataclasses.asdict(policy) == DEFAULTS | recorded["fields"]


# --- time -------------------------------------------------------------------------------------------------------------


def test_model_time() -> None:
    ranking, noising = P.twotower(), P.predict_and_noise(min_t=1e-3)
    n, step = torch.tensor([16, 4, 0]), torch.tensor([0, 1, 3])
    assert ranking.model_time(n, 16, step, 4).tolist() == [1.0, 0.25, 0.0]
    want = torch.tensor([1 - i * (1 - 1e-3) / 4 for i in (0, 1, 3)])
    torch.testing.assert_close(noising.model_time(n, 16, step, 4), want)
    assert P.posterior().model_time(3, 16, 0, 4).item() == 1.0
    assert P.posterior(long_grid=True).model_time(n, 16, 3, 4).tolist() == [0.0] * 3
    assert ranking.model_time(n, 16, 0, 4).dtype == torch.float32 and noising.model_time(n, 16, 0, 4).shape == (3,)


@given(
    policy=policies(),
    step=st.integers(0, 9),
    steps=st.integers(1, 8),
    masked=st.integers(0, 12),
    block=st.integers(0, 12),
)
def test_the_time_is_the_specifications(policy: Any, step: int, steps: int, masked: int, block: int) -> None:
    for waiting, i in ((torch.tensor([masked, 1]), torch.tensor(step)), (torch.tensor(masked), step), (masked, step)):
        got = policy.model_time(waiting, block, i, steps)
        want = model_time(policy, torch.as_tensor(waiting), block, torch.as_tensor(i), torch.tensor(steps))
        assert got.dtype == want.dtype == torch.float32 and torch.equal(got, want)
    options, bounds = policy.encoded()
    assert all(isinstance(x, int) for x in options) and all(math.isfinite(x) for x in bounds)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("score", "best", ValueError, "score: expected one of 'confidence', 'margin', .*'leftmost', got 'best'"),
        (
            "gate",
            None,
            ValueError,
            "gate: expected one of 'none', .*'entropy_sum', 'prefix', got None",
        ),
        ("schedule", "cosine", ValueError, "schedule: expected one of .*'posterior', got 'cosine'"),
        ("alpha", "log", ValueError, "alpha: expected one of .*'cosine_floor', got 'log'"),
        ("gate_bound", math.nan, ValueError, r"gate_bound: expected a number in \[-inf, inf\], got nan"),
        ("run_threshold", math.nan, ValueError, r"run_threshold: expected a number in \[-inf, inf\], got nan"),
        ("gate_bound", "0.8", TypeError, "gate_bound: expected a number, got '0.8'"),
        ("edit_threshold", True, TypeError, "edit_threshold: expected a number or None, got True"),
        ("rank_temperature", -1.0, ValueError, r"rank_temperature: expected a number in \[0, 1e\+06\], got -1.0"),
        ("min_t", 0.7, ValueError, r"min_t: expected a number in \[0, 0.5\], got 0.7"),
        ("min_commits", -1, ValueError, "min_commits: expected 0 or larger, got -1"),
        ("sub_block", 2.0, TypeError, "sub_block: expected an int, got 2.0"),
        ("strict", 1, TypeError, "strict: expected True or False, got 1"),
        ("combine", "cap", ValueError, "combine: expected a gate with 'cap', got gate='none'"),
        ("complete_threshold", 0.5, ValueError, "sub_block: expected a positive length with complete_threshold, got 0"),
    ],
)
def test_policies_refuse(field: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        P(**{field: value})


def test_policies_refuse_combinations() -> None:
    with pytest.raises(ValueError, match="suppress_mask: expected True with the posterior"):
        dataclasses.replace(P.posterior(), suppress_mask=False)
    with pytest.raises(ValueError, match="renoise: expected edit_threshold and remask_threshold None"):
        dataclasses.replace(P.diffusion_gemma(), edit_threshold=0.9)
    for wrong in ({"score": "random"}, {"gate_on": "score"}, {"schedule": "coin"}, {"schedule": "posterior"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"rank_temperature: expected 0 with {name}='{value}'"):
            P(rank_temperature=0.5, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strategy: expected one of 'low_confidence_static', .*, got 'beam'"):
        P.jetengine("beam")
    with pytest.raises(
        ValueError, match="algorithm: expected one of 'maskgit', 'margin', 'entropy', 'origin', got 'x'"
    ):
        P.dream("x")
    assert hash(P.twotower(0.8)) == hash(P.twotower())

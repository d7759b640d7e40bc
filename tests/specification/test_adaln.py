"""reference/adaln.py against its definition number by number, against PyTorch's and transformers' norms, and itself."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from twotower_kernels.bench.baselines.foreign import nemotron_h
from twotower_kernels.reference.adaln import (
    CASES,
    ORDERS,
    adaln_norm,
    gated_residual,
    gated_residual_adaln_norm,
    make_inputs,
    rms_norm,
)
from twotower_kernels.testing.budget import assert_within_budget, widened

OPS: dict[str, Any] = {
    "rms_norm": rms_norm,
    "adaln_norm": adaln_norm,
    "gated_residual": gated_residual,
    "gated_residual_adaln_norm": gated_residual_adaln_norm,
}
SMALL = [(op, case) for op in OPS for case in CASES[op] if not case.startswith("released")]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def results(op: str, inputs: dict) -> tuple[Tensor, ...]:
    out = OPS[op](**inputs)
    return out if isinstance(out, tuple) else (out,)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


# --- the definition ---------------------------------------------------------------------------------------------------


def definition(op: str, inputs: dict) -> tuple[Tensor, ...]:
    """The formulas on one token's list of numbers, in Python's float64."""
    x = inputs["residual" if "residual" in inputs else "x"]
    shift, scale, gate = (inputs.get(name) for name in ("shift", "scale", "gate"))
    order = inputs.get("order")

    def modulated(numbers: list[float], b: int) -> list[float]:
        if shift is None or scale is None:
            return numbers
        return [v * (1 + a) + s for v, a, s in zip(numbers, scale[b].tolist(), shift[b].tolist(), strict=True)]

    def normed(numbers: list[float]) -> list[float]:
        root = math.sqrt(math.fsum(v * v for v in numbers) / len(numbers) + inputs["eps"])
        weight = [1.0] * len(numbers) if inputs["weight"] is None else inputs["weight"].tolist()
        return [v / root * w for v, w in zip(numbers, weight, strict=True)]

    h, norm = torch.empty_like(x), torch.empty_like(x)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            numbers = x[b, s].tolist()
            if "y" in inputs:
                gates = [1.0] * len(numbers) if gate is None else gate[b].tolist()
                numbers = [r + g * v for r, g, v in zip(numbers, gates, inputs["y"][b, s].tolist(), strict=True)]
            h[b, s] = torch.tensor(numbers, dtype=x.dtype)
            if "weight" in inputs:
                first = order == "modulate_norm"
                out = normed(modulated(numbers, b)) if first else modulated(normed(numbers), b)
                norm[b, s] = torch.tensor(out, dtype=x.dtype)
    return {"gated_residual": (h,), "gated_residual_adaln_norm": (h, norm)}.get(op, (norm,))


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_equals_the_definition(op: str, case: str) -> None:
    inputs = make_inputs(op, case, dtype=torch.float64)
    for got, expected in zip(results(op, inputs), definition(op, inputs), strict=True):
        close(got, expected)


def naive(op: str, inputs: dict) -> tuple[Tensor, ...]:
    """What one writes in PyTorch: every operation in the tensors' own dtype, and PyTorch's own norm."""
    h = inputs.get("x")
    if h is None:
        gate = inputs["gate"]
        h = inputs["residual"] + (inputs["y"] if gate is None else gate[:, None] * inputs["y"])
    if op == "gated_residual":
        return (h,)
    plain = inputs.get("scale") is None
    shift, scale = (0, 0) if plain else (inputs["shift"][:, None], inputs["scale"][:, None])

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], inputs["weight"], inputs["eps"])

    after = inputs.get("order") == "norm_modulate"
    out = norm(h) * (1 + scale) + shift if after else norm(h * (1 + scale) + shift)
    return (h, out) if op == "gated_residual_adaln_norm" else (out,)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_low_precision_stays_within_the_budget(op: str, case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, case, dtype=dtype, seed=1)
    exact = definition(op, widened(inputs))
    for n, (got, plain, truth) in enumerate(zip(results(op, inputs), naive(op, inputs), exact, strict=True)):
        assert got.dtype == dtype
        assert_within_budget(got, plain, truth, what=f"{op} {case}, result {n}")


# --- rounding is part of the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_every_operation_of_the_modulation_rounds_and_the_norm_rounds_once(order: str, dtype: torch.dtype) -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def norm(x: Tensor) -> Tensor:
        return rounded(rms_norm(x, weight, eps=1e-5))

    def modulate(x: Tensor) -> Tensor:
        return rounded(rounded(x * rounded(1 + scale[:, None])) + shift[:, None])

    inputs = make_inputs("gated_residual_adaln_norm", f"block_{order}", dtype=dtype)
    names = ("residual", "y", "gate", "weight", "shift", "scale")
    residual, y, gate, weight, shift, scale = (inputs[name].float() for name in names)
    h = rounded(residual + rounded(gate[:, None] * y))
    normed = norm(modulate(h)) if order == "modulate_norm" else modulate(norm(h))
    got = gated_residual_adaln_norm(**inputs)
    assert torch.equal(got[0].float(), h) and torch.equal(got[1].float(), normed)


def test_a_scale_below_the_rounding_of_one_is_lost() -> None:
    """In bfloat16, 1 + 2⁻⁹ = 1, and 256 + 0.5 = 256: worked by hand."""
    one = torch.tensor([[[256.0, -256.0]]]).bfloat16()
    small, half = torch.full((1, 2), 2.0**-9).bfloat16(), torch.full((1, 2), 0.5).bfloat16()
    weight = torch.ones(2).bfloat16()
    assert torch.equal(adaln_norm(one, weight, half, small, eps=0.0), torch.tensor([[[1.0, -1.0]]]).bfloat16())
    assert torch.equal(gated_residual(one, one, small), one)  # 256 + 0.5
    assert not torch.equal(adaln_norm(one.float(), weight, half, small, eps=0.0), torch.tensor([[[1.0, -1.0]]]))


def test_the_residual_may_be_wider_than_the_update() -> None:
    """`residual_in_fp32`: the product rounds to the update's dtype, the sum and the norm do not."""
    inputs = make_inputs("gated_residual_adaln_norm", "block_norm_modulate", dtype=torch.bfloat16)
    inputs["residual"] = make_inputs("rms_norm", "block", seed=5)["x"]
    h, normed = gated_residual_adaln_norm(**inputs)
    assert h.dtype == normed.dtype == torch.float32
    assert torch.equal(h, inputs["residual"] + (inputs["gate"][:, None] * inputs["y"]).float())
    wide = {k: v.float() for k, v in inputs.items() if k in ("weight", "shift", "scale")}
    assert torch.equal(normed, adaln_norm(h, **wide, eps=inputs["eps"], order=inputs["order"]))


# --- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("size", [1, 2, 17, 96, 2688])
def test_the_norms_of_others(size: int, dtype: torch.dtype) -> None:
    """PyTorch's in float64, and transformers' to the last bit: it too multiplies the weight before it rounds."""
    inputs = make_inputs("rms_norm", dict(b=2, s=3, h=size), dtype=dtype)
    out = rms_norm(**inputs)
    if dtype == torch.float64:
        close(out, F.rms_norm(inputs["x"], (size,), inputs["weight"], inputs["eps"]))
        return
    module = nemotron_h.Norm(size, eps=inputs["eps"]).to(dtype).requires_grad_(False)
    module.weight.copy_(inputs["weight"])
    assert torch.equal(out, module(inputs["x"]))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", [1, 17, 96, 2688])
def test_the_norm_that_rounds_first(size: int, dtype: torch.dtype) -> None:
    """To the last bit Llama's in transformers, which Qwen and LLaDA have, too; in float32 the other one."""
    inputs = make_inputs("rms_norm", dict(b=2, s=3, h=size), dtype=dtype)
    module = LlamaRMSNorm(size, eps=inputs["eps"]).to(dtype).requires_grad_(False)
    module.weight.copy_(inputs["weight"])
    out = rms_norm(**inputs, round_first=True)
    assert torch.equal(out, module(inputs["x"]))
    differ = (out != rms_norm(**inputs)).double().mean()
    assert differ == 0 if dtype == torch.float32 or size == 1 else 0.1 < differ < 0.4


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("round_first", [False, True])
def test_no_weight_is_a_weight_of_one(round_first: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs("rms_norm", "block", dtype=dtype) | {"round_first": round_first}
    one = inputs | {"weight": torch.ones_like(inputs["weight"])}
    assert torch.equal(rms_norm(**inputs | {"weight": None}), rms_norm(**one))


# --- properties -------------------------------------------------------------------------------------------------------

sizes = st.fixed_dictionaries(dict(b=st.integers(0, 3), s=st.integers(0, 4), h=st.integers(1, 40)))
dtypes = st.sampled_from([torch.float64, *LOW])
orders = st.sampled_from(ORDERS)


@settings(max_examples=40)
@given(size=sizes, dtype=dtypes, order=orders)
def test_identities(size: dict, dtype: torch.dtype, order: str) -> None:
    inputs = make_inputs("gated_residual_adaln_norm", size | dict(order=order), dtype=dtype)
    x, y, weight, shift, eps = (inputs[name] for name in ("residual", "y", "weight", "shift", "eps"))
    plain, nothing, one = rms_norm(x, weight, eps=eps), torch.zeros_like(shift), torch.ones_like(shift)
    assert torch.equal(adaln_norm(x, weight, eps=eps, order=order), plain)
    assert torch.equal(adaln_norm(x, weight, nothing, nothing, eps=eps, order=order), plain)
    assert torch.equal(gated_residual(x, y), gated_residual(x, y, one))
    assert torch.equal(gated_residual(x, y), x + y)
    assert torch.equal(gated_residual(x, y, nothing), x)
    # A scale of -1 leaves the shift alone: after the norm as it is, before the norm to be normed.
    alone = shift[:, None].expand_as(x)
    expected = alone if order == "norm_modulate" else rms_norm(alone, weight, eps=eps)
    assert torch.equal(adaln_norm(x, weight, shift, -one, eps=eps, order=order), expected)


@settings(max_examples=40)
@given(size=sizes, dtype=dtypes, order=orders, gated=st.booleans(), modulated=st.booleans())
def test_fused_is_two_calls_bit_for_bit(
    size: dict, dtype: torch.dtype, order: str, gated: bool, modulated: bool
) -> None:
    inputs = make_inputs("gated_residual_adaln_norm", size | dict(order=order), dtype=dtype)
    if not gated:
        inputs["gate"] = None
    if not modulated:
        inputs["shift"] = inputs["scale"] = None
    h, normed = gated_residual_adaln_norm(**inputs)
    assert torch.equal(h, gated_residual(inputs["residual"], inputs["y"], inputs["gate"]))
    rest = {name: inputs[name] for name in ("weight", "shift", "scale", "eps", "order")}
    assert torch.equal(normed, adaln_norm(h, **rest))


@settings(max_examples=30)
@given(size=sizes, power=st.integers(-30, 30))
def test_the_norm_forgets_the_scale_of_its_input(size: dict, power: int) -> None:
    """Exactly so for powers of two, so values of 2³⁰ and 2⁻³⁰ are normed as well as those of order 1."""
    inputs = make_inputs("rms_norm", size)
    scaled = inputs | dict(x=inputs["x"] * 2.0**power, eps=inputs["eps"] * 4.0**power)
    assert torch.equal(rms_norm(**scaled), rms_norm(**inputs))


def test_the_orders_differ() -> None:
    """A common factor survives after the norm and not before it."""
    inputs = make_inputs("adaln_norm", "block_modulate_norm", dtype=torch.float64)
    inputs |= dict(shift=torch.zeros(2, 96).double(), scale=torch.full((2, 96), 3.0).double(), eps=0.0)
    plain = rms_norm(inputs["x"], inputs["weight"], eps=0.0)
    close(adaln_norm(**inputs | dict(order="modulate_norm")), plain)
    close(adaln_norm(**inputs | dict(order="norm_modulate")), 4 * plain)


def test_nothing_is_zero_and_what_is_not_finite_stays_in_its_row() -> None:
    inputs = make_inputs("rms_norm", "odd")
    clean = rms_norm(**inputs)
    inputs["x"][0, 0], inputs["x"][1, 2, 3], inputs["x"][2, 4] = 0.0, math.nan, math.inf
    out = rms_norm(**inputs)
    assert not out[0, 0].any() and out[1, 2].isnan().all() and out[2, 4].isnan().all()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[0, 0] = others[1, 2] = others[2, 4] = False
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("order", ORDERS)
def test_each_sequence_has_its_own_vectors(order: str) -> None:
    """A row alone gives the same, whatever else is in the batch, to the last bit."""
    inputs = make_inputs("gated_residual_adaln_norm", f"odd_{order}")
    batch = gated_residual_adaln_norm(**inputs)
    for b in range(3):
        per_row = ("residual", "y", "gate", "shift", "scale")
        alone = gated_residual_adaln_norm(**inputs | {k: inputs[k][b : b + 1] for k in per_row})
        assert torch.equal(alone[0], batch[0][b : b + 1]) and torch.equal(alone[1], batch[1][b : b + 1])


@pytest.mark.parametrize("order", ORDERS)
def test_layout_does_not_matter(order: str) -> None:
    """Permuted activations, and vectors that are slices of one tensor, as the time conditioning yields them."""
    inputs = make_inputs("gated_residual_adaln_norm", f"odd_{order}", dtype=torch.float64)
    expected = gated_residual_adaln_norm(**inputs)
    together = torch.stack([inputs[k] for k in ("shift", "scale", "gate")], 1)  # [B, 3, H]
    strided = dict(zip(("shift", "scale", "gate"), together.unbind(1), strict=True))
    strided |= {k: inputs[k].transpose(0, 1).contiguous().transpose(0, 1) for k in ("residual", "y")}
    strided["weight"] = inputs["weight"].repeat_interleave(2)[::2]
    for got, want in zip(gated_residual_adaln_norm(**inputs | strided), expected, strict=True):
        close(got, want)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, case in SMALL if case.startswith("odd")])
def test_gradients(op: str, case: str) -> None:
    inputs = make_inputs(op, dict(CASES[op][case], h=4, s=2), dtype=torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return results(op, inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, [inputs[k].requires_grad_() for k in names])


# --- errors -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict, str]] = {
    "weight of another size": ("rms_norm", dict(weight=torch.ones(16)), r"weight: expected shape \(17,\), got \(16,\)"),
    "an unknown order": ("adaln_norm", dict(order="norm"), "order: expected one of .*norm_modulate.*, got 'norm'"),
    "shift alone": ("adaln_norm", dict(scale=None), "shift and scale: expected both or neither"),
    "scale alone": ("adaln_norm", dict(shift=None), "shift and scale: expected both or neither"),
    "shift of another batch": ("adaln_norm", dict(shift=torch.ones(2, 17)), r"shift: expected shape \(3, 17\)"),
    "scale per token": ("adaln_norm", dict(scale=torch.ones(3, 5, 17)), r"scale: expected shape \(3, 17\)"),
    "norm weight of another size": ("adaln_norm", dict(weight=torch.ones(1)), "weight: expected"),
    "update of another length": ("gated_residual", dict(y=torch.ones(3, 4, 17)), "y: expected the residual's shape"),
    "gate for all": ("gated_residual", dict(gate=torch.ones(17)), r"gate: expected shape \(3, 17\), got \(17,\)"),
    "fused: an unknown order": ("gated_residual_adaln_norm", dict(order=None), "order: expected one of"),
    "fused: gate of another batch": ("gated_residual_adaln_norm", dict(gate=torch.ones(1, 17)), "gate: expected"),
    "fused: update of another size": ("gated_residual_adaln_norm", dict(y=torch.ones(3, 5, 16)), "y: expected"),
    "fused: shift alone": ("gated_residual_adaln_norm", dict(scale=None), "shift and scale: expected both"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_explained(what: str) -> None:
    op, change, message = BAD[what]
    case = {"rms_norm": "odd", "gated_residual": "odd_gated"}.get(op, "odd_norm_modulate")
    with pytest.raises(ValueError, match=message):
        OPS[op](**make_inputs(op, case) | change)

"""The experts' kernel: against the specification on every instruction set, dtype and layout; registration; errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set
from twotower_kernels.reference import moe
from twotower_kernels.testing.cases import moe as cases
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward

SMALL = [case for case in moe.CASES["moe_experts"] if case != "released"]  # that one is 2.6 GB: the benchmark checks it


def assert_as_specified(inputs: dict, layout: int = 0) -> None:
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs, layout=layout)


def close_to_reference(sizes: dict | str, dtype: torch.dtype, seed: int = 0, layout: int = 0) -> None:
    assert_as_specified(moe.make_inputs("moe_experts", sizes, dtype=dtype, seed=seed), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SMALL)
def test_every_case_on_every_instruction_set(case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            close_to_reference(case, dtype)


@settings(max_examples=80)
@given(
    sizes=st.fixed_dictionaries(
        dict(
            n=st.integers(0, 9),
            e=st.integers(1, 6),
            h=st.integers(1, 70) | st.just(515),
            i=st.integers(1, 40) | st.just(515),
            shared=st.integers(0, 20),
            activation=st.sampled_from(["relu2", "silu_gated", "gelu_gated"]),
        )
    ),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, data, dtype, isa, layout, seed):  # type: ignore[no-untyped-def]
    sizes["top_k"] = data.draw(st.integers(1, sizes["e"]))
    with instruction_set(isa):
        close_to_reference(sizes, dtype, seed, layout)


@settings(max_examples=80)
@given(
    sizes=cases.mixtures(),
    clamp=cases.clamps(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_activation_bias_and_experts_elsewhere(sizes, clamp, dtype, isa, layout, seed):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        close_to_reference(sizes | (clamp if sizes["activation"] == "clamped_gated" else {}), dtype, seed, layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["relu2", "gelu_gated"])
def test_more_pairs_than_one_group_holds(activation: str, isa: str) -> None:
    """1200 pairs, so that groups end inside an expert, and the shared expert takes 400 tokens."""
    sizes = dict(n=400, e=4, top_k=3, h=36, i=20, shared=18, activation=activation)
    with instruction_set(isa):
        close_to_reference(sizes, torch.float32)
    sizes |= dict(n=1100, top_k=2)  # more tokens than a group
    with instruction_set(isa):
        close_to_reference(sizes, torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_is_bit_for_bit_the_same(dtype: torch.dtype, isa: str) -> None:
    """Whatever the other tokens are: rows of 1 to 9 tokens per expert are blocked differently."""
    sizes = dict(n=17, e=3, top_k=2, h=1100, i=37, shared=19, activation="silu_gated")
    inputs = moe.make_inputs("moe_experts", sizes, dtype=dtype)
    with instruction_set(isa):
        together = tt.moe_experts(**inputs)
        for n in range(17):
            one = {name: inputs[name][n : n + 1] for name in ("x", "weights", "experts")}
            assert torch.equal(tt.moe_experts(**inputs | one), together[n : n + 1])


def test_threads_change_no_bit() -> None:
    inputs = moe.make_inputs("moe_experts", dict(n=33, e=8, top_k=3, h=96, i=80, shared=64), dtype=torch.bfloat16)
    alone = tt.moe_experts(**inputs)
    torch.set_num_threads(3)
    try:
        assert torch.equal(tt.moe_experts(**inputs), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
def test_experts_that_no_token_chose_are_not_read(isa: str) -> None:
    inputs = moe.make_inputs("moe_experts", "idle_experts")
    with instruction_set(isa):
        clean = tt.moe_experts(**inputs)
        idle = sorted(set(range(32)) - set(inputs["experts"].flatten().tolist()))
        inputs["w_up"][idle], inputs["w_down"][idle] = torch.nan, torch.nan
        assert torch.equal(tt.moe_experts(**inputs), clean)


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_nan_stays_in_its_row(activation: str) -> None:
    inputs = moe.make_inputs("moe_experts", dict(n=9, e=2, top_k=2, h=20, i=12, activation=activation))
    clean = tt.moe_experts(**inputs)
    inputs["x"][3, 5] = torch.nan
    got = tt.moe_experts(**inputs)
    assert got[3].isnan().all()
    got[3] = clean[3]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_exactly(dtype: torch.dtype, isa: str) -> None:
    """As weights of the second product, with 1 in between: the output is the weights, special numbers included."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one, expected = torch.ones(1, 1, dtype=dtype), numbers
    if dtype == torch.bfloat16 and isa.startswith(("avx512bf16", "amx", "neonbf16")):
        # Products of pairs of bfloat16 take subnormal numbers for zeros, on x86 as on Arm.
        expected = torch.where(numbers.abs() < torch.finfo(dtype).tiny, 0, numbers)
    for i in (1, 16):  # the rest of a row, and a whole vector
        w_up, w_down = torch.zeros(1, i, 2**16, dtype=dtype), torch.zeros(1, 2**16, i, dtype=dtype)
        x = torch.zeros(1, 2**16, dtype=dtype)
        w_up[..., 0], x[0, 0], w_down[0, :, i // 2] = 1, 1, numbers
        if i > 1:
            w_up[0, : i // 2], w_up[0, i // 2 + 1 :] = 0, 0
        with instruction_set(isa):
            got = tt.moe_experts(x, w_up, w_down, one, torch.zeros(1, 1, dtype=torch.int32))[0]
        finite = ~numbers.isnan()
        assert torch.equal(got[finite], expected[finite]) and got[~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_extreme_activations(activation: str, dtype: torch.dtype) -> None:
    """Gates from -300 to 300: both tails of each activation, where exp overflows in float32."""
    gates = torch.tensor([-300.0, -100.0, -20.0, -1.0, -0.0, 0.0, 1.0, 20.0, 100.0, 150.0])
    x = gates[:, None].to(dtype)
    w_up = torch.ones(1, 1 if activation in moe.PLAIN else 2, 1, dtype=dtype)
    inputs = dict(x=x, w_up=w_up, w_down=w_up[:, :1], weights=torch.ones(10, 1), experts=torch.zeros(10, 1).int())
    assert_as_specified(inputs | dict(activation=activation))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pairs_may_name_an_expert_twice_or_no_expert(dtype: torch.dtype) -> None:
    inputs = moe.make_inputs("moe_experts", "shared", dtype=dtype)
    inputs["experts"][:, 1] = inputs["experts"][:, 0]
    assert_as_specified(inputs)
    inputs |= dict(weights=inputs["weights"][:, :0], experts=inputs["experts"][:, :0])
    assert_as_specified(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_and_wider_numbers_change_nothing(dtype: torch.dtype) -> None:
    inputs = moe.make_inputs("moe_experts", "shared", dtype=torch.bfloat16)
    inputs["weights"] = inputs["weights"].bfloat16()
    plain = tt.moe_experts(**inputs)
    assert torch.equal(tt.moe_experts(**inputs, plan=tt.moe_plan(inputs["experts"], 8)), plain)
    assert torch.equal(tt.moe_experts(**inputs | dict(experts=inputs["experts"].long())), plain)
    if torch.promote_types(dtype, torch.bfloat16) == dtype:
        assert torch.equal(tt.moe_experts(**inputs | dict(weights=inputs["weights"].to(dtype))), plain)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_elsewhere_add_nothing(dtype: torch.dtype, isa: str) -> None:
    """To the bit what a weight of 0 gives; with their plan too; and tokens with none here have the shared expert."""
    inputs = moe.make_inputs("moe_experts", "shared", dtype=dtype)
    elsewhere = torch.rand(17, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    elsewhere[4] = True
    zero = dict(weights=inputs["weights"].masked_fill(elsewhere, 0))
    far = torch.tensor([-1, 8, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(13)[:51].reshape(17, 3)
    moved = dict(experts=torch.where(elsewhere, far, inputs["experts"]))
    with instruction_set(isa):
        got = tt.moe_experts(**inputs | moved)
        assert torch.equal(got, tt.moe_experts(**inputs | zero))
        assert torch.equal(got, tt.moe_experts(**inputs | moved, plan=tt.moe_plan(moved["experts"], 8)))
        nobody = dict(experts=torch.full((17, 3), -1), weights=torch.full((17, 3), torch.nan))
        alone = dict(experts=inputs["experts"][:, :0], weights=inputs["weights"][:, :0])
        assert torch.equal(tt.moe_experts(**inputs | nobody), tt.moe_experts(**inputs | alone))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_limit_of_infinity_clamps_nothing_and_nan_passes(dtype: torch.dtype, isa: str) -> None:
    sizes = dict(n=5, e=2, top_k=1, h=9, i=7, activation="clamped_gated")
    inputs = moe.make_inputs("moe_experts", sizes, dtype=dtype)
    with instruction_set(isa):
        assert_as_specified(inputs | dict(limit=float("inf"), alpha=1.0))
        assert_as_specified(inputs | dict(limit=0.0))
        inputs["x"][2, 3] = torch.nan
        got = tt.moe_experts(**inputs)
    assert got[2].isnan().all() and got[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("isa", ISAS)
def test_only_the_plan_itself_is_taken(isa: str, dtype: torch.dtype) -> None:
    """Not one with any number changed, or two exchanged, or that of other experts."""
    inputs = moe.make_inputs("moe_experts", dict(n=4, e=5, top_k=2, h=3, i=2))
    experts = torch.tensor([[1, 3], [3, 4], [1, 4], [3, 1]], dtype=dtype)
    plan = tt.moe_plan(experts, 5)

    def refused(plan: tt.MoePlan, experts: Tensor = experts) -> None:
        with pytest.raises(ValueError, match=r"plan: expected moe_plan\(experts, E\) of these experts, got another"):
            tt.moe_experts(**inputs | dict(experts=experts), plan=plan)

    with instruction_set(isa):
        for place, numbers in enumerate(plan):
            for i, change in itertools.product(range(len(numbers)), (-(2**62), -1, 1, 2**62)):
                wrong = numbers.clone()
                wrong[i] += change
                refused(plan._replace(**{plan._fields[place]: wrong}))
        for i, j in itertools.combinations(range(8), 2):
            wrong = plan.pairs.clone()
            wrong[[i, j]] = wrong[[j, i]]
            refused(plan._replace(pairs=wrong))
        for other in (0, 4, -1, 5, 2**31 - 1):
            changed = experts.clone()
            changed[2, 0] = other
            refused(plan, changed)
            refused(tt.moe_plan(changed, 5))
        strided = tt.MoePlan(*(numbers.repeat_interleave(2)[::2] for numbers in plan))
        inputs["experts"] = awkward(experts, 3)
        assert torch.equal(tt.moe_experts(**inputs, plan=strided), tt.moe_experts(**inputs))


@pytest.mark.parametrize("layout", [0, 3])
def test_registration(layout: int) -> None:
    inputs = moe.make_inputs("moe_experts", "shared", dtype=torch.bfloat16)
    tensors = {k: awkward(v, layout) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    shared, first = (tensors.pop("shared_up"), tensors.pop("shared_down")), list(tensors.values())[:-1]
    op, biases = torch.ops.twotower.moe_experts.default, (torch.ones(8, 11).bfloat16(), torch.ones(8, 17).bfloat16())
    torch.library.opcheck(op, (*first, *tt.moe_plan(inputs["experts"], 8), *shared, *biases, "relu2", 1.0, 2.0))
    torch.library.opcheck(op, (*first, *[None] * 7, "relu2", 1.0, 2.0))


def test_the_family_compiles_into_one_graph() -> None:
    inputs = moe.make_inputs("moe_experts", "shared")
    gate_weight = torch.randn(8, 17, generator=torch.Generator().manual_seed(1))

    def layer(x: Tensor, gate_weight: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        weights, experts = tt.moe_route(tt.moe_gate(x, gate_weight), top_k=3, scaling=2.5)
        return tt.moe_experts(x, w_up, w_down, weights, experts, plan=tt.moe_plan(experts, 8))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for n in (17, 5):
            arguments = inputs["x"][:n], gate_weight, inputs["w_up"], inputs["w_down"]
            assert torch.equal(compiled(*arguments), layer(*arguments))


SHARED = moe.make_inputs("moe_experts", "shared")  # 17 tokens, 8 experts, H 17, I 11, J 23
PLAN = moe.moe_plan(SHARED["experts"], 8)
CLAMPED = dict(activation="clamped_gated", w_down=torch.ones(8, 17, 5), shared_up=None, shared_down=None)
CLAMPED["w_up"] = torch.ones(8, 10, 17)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(activation="relu"), ValueError, "activation: expected one of .* got 'relu'"),
        (dict(x=torch.ones(1, 17, 17)), ValueError, r"x: expected \[N, H\], got \[1, 17, 17\]"),
        (dict(x=torch.ones(17, 17).int()), TypeError, "x: expected float64.* got torch.int32"),
        (dict(experts=torch.ones(17).int()), ValueError, r"experts: expected \[N, k\], got \[17\]"),
        (dict(experts=torch.ones(17, 3)), TypeError, "experts: expected int32 or int64, got torch.float32"),
        (
            dict(experts=torch.ones(16, 3).int()),
            ValueError,
            r"experts: expected \[17, k\] for 17 tokens, got \[16, 3\]",
        ),
        (dict(weights=torch.ones(17, 2)), ValueError, r"weights: expected the experts' shape \[17, 3\], got \[17, 2\]"),
        (dict(weights=torch.ones(17, 3).int()), TypeError, "weights: expected float64.* got torch.int32"),
        (dict(w_up=torch.ones(8, 11, 16)), ValueError, r"w_up: expected \[E, I, 17\], got \[8, 11, 16\]"),
        (dict(w_up=torch.ones(8, 12, 17)), ValueError, r"w_up: expected \[8, 11, 17\] for w_down \[8, 17, 11\], got"),
        (dict(w_up=torch.ones(7, 11, 17)), ValueError, r"w_up: expected \[8, 11, 17\] for w_down \[8, 17, 11\], got"),
        (dict(w_up=torch.ones(11, 17)), ValueError, r"w_up: expected \[E, I, 17\], got \[11, 17\]"),
        (dict(activation="silu_gated"), ValueError, r"w_up: expected \[8, 22, 17\] for w_down \[8, 17, 11\], got"),
        (dict(w_down=torch.ones(8, 16, 11)), ValueError, r"w_down: expected \[E, 17, I\], got \[8, 16, 11\]"),
        (
            dict(w_down=torch.ones(8, 17, 11).half()),
            TypeError,
            "w_down: expected torch.float32 as x, got torch.float16",
        ),
        (dict(shared_up=None), ValueError, "shared_up and shared_down: expected both or neither, got one"),
        (dict(shared_down=None), ValueError, "shared_up and shared_down: expected both or neither, got one"),
        (dict(shared_up=torch.ones(23, 16)), ValueError, r"shared_up: expected \[I, 17\], got \[23, 16\]"),
        (
            dict(shared_down=torch.ones(17, 22)),
            ValueError,
            r"shared_up: expected \[22, 17\] for shared_down \[17, 22\]",
        ),
        (dict(shared_up=torch.ones(23, 17).half()), TypeError, "shared_up: expected torch.float32 as x"),
        (dict(w_down=torch.ones(8, 17, 11, device="meta")), ValueError, "w_down: expected device cpu, got meta"),
        (dict(w_up=torch.ones(8, 17, 11)), ValueError, r"w_up: expected .* got \[8, 17, 11\]; transposed, as it seems"),
        (dict(w_down=torch.ones(8, 11, 17)), ValueError, r"w_down: expected .*, got \[8, 11, 17\]; transposed, as it"),
        (dict(up_bias=torch.ones(8, 12)), ValueError, r"up_bias: expected \[8, 11\], got \[8, 12\]"),
        (dict(up_bias=torch.ones(11)), ValueError, r"up_bias: expected \[8, 11\], got \[11\]"),
        (dict(down_bias=torch.ones(8, 11)), ValueError, r"down_bias: expected \[8, 17\], got \[8, 11\]"),
        (dict(down_bias=torch.ones(8, 17).half()), TypeError, "down_bias: expected torch.float32 as x, got"),
        (dict(limit=1.0), ValueError, "alpha and limit: expected None for activation 'relu2', got None and 1.0"),
        (dict(alpha=1.0), ValueError, "alpha and limit: expected None for activation 'relu2', got 1.0 and None"),
        (CLAMPED | dict(limit=-1.0), ValueError, "limit: expected 0 or more, got -1.0"),
        (CLAMPED | dict(limit=float("nan")), ValueError, "limit: expected 0 or more, got nan"),
        (CLAMPED | dict(limit="7"), TypeError, "limit: expected a number"),
        (dict(plan=tt.MoePlan(PLAN[0][:7], *PLAN[1:])), ValueError, r"plan.counts: expected shape \[8\], got \[7\]"),
        (dict(plan=tt.MoePlan(*PLAN[:2], PLAN[2].int())), TypeError, "plan.pairs: expected torch.int64, got"),
        (dict(plan=tt.MoePlan(*PLAN[:2], PLAN[2] + 1)), ValueError, r"plan: expected moe_plan\(experts, E\) of these"),
        (dict(plan=tt.MoePlan(PLAN[0], PLAN[1] + 9, PLAN[2])), ValueError, "plan: expected .* got another"),
    ],
)
def test_bad_input_is_named(change, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        tt.moe_experts(**SHARED | change)

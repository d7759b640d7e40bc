"""reference/moe.py: the experts, against loops over tokens and experts, against others' experts, and itself."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tests.specification.test_moe import LOW, close, small
from twotower_kernels.bench.baselines.foreign import nemotron_h
from twotower_kernels.reference.moe import ACTIVATIONS, make_inputs, moe_experts, moe_plan
from twotower_kernels.testing.budget import assert_within_budget, widened


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SCALAR: dict[str, Callable[[float], float]] = {
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": gelu_tanh,
    "gelu_gated": gelu_tanh,
}


def activated(up: list[float], inputs: dict) -> list[float]:
    activation = inputs["activation"]
    if not activation.endswith("_gated"):
        return [SCALAR[activation](v) for v in up]
    half = len(up) // 2
    pairs = list(zip(up[:half], up[half:], strict=True))
    if activation == "clamped_gated":
        alpha, limit = inputs.get("alpha", 1.702), inputs.get("limit", 7.0)
        pairs = [(min(g, limit), min(max(v, -limit), limit)) for g, v in pairs]
        return [g / (1 + math.exp(-alpha * g)) * (v + 1) for g, v in pairs]
    function = SCALAR.get(activation) or SCALAR[activation.split("_")[0]]
    return [function(g) * v for g, v in pairs]


def experts_one_by_one(inputs: dict) -> Tensor:
    """Each token, each of its experts, each number, in Python's float64."""

    def product(x: list[float], matrix: Tensor, bias: Tensor | None) -> list[float]:
        added = [0.0] * len(matrix) if bias is None else bias.tolist()
        return [sum(map(float.__mul__, row, x)) + b for row, b in zip(matrix.tolist(), added, strict=True)]

    def forward(x: list[float], up: Tensor, down: Tensor, *biases: Tensor | None) -> list[float]:
        up_bias, down_bias = biases or (None, None)
        return product(activated(product(x, up, up_bias), inputs), down, down_bias)

    out = torch.zeros_like(inputs["x"])
    for n, x in enumerate(inputs["x"].tolist()):
        for weight, e in zip(inputs["weights"][n].tolist(), inputs["experts"][n].tolist(), strict=True):
            if not 0 <= e < len(inputs["w_up"]):
                continue
            biases = (inputs[name][e] if name in inputs else None for name in ("up_bias", "down_bias"))
            y = forward(x, inputs["w_up"][e], inputs["w_down"][e], *biases)
            out[n] += torch.tensor([weight * v for v in y], dtype=torch.float64)
        if inputs["shared_up"] is not None:
            out[n] += torch.tensor(forward(x, inputs["shared_up"], inputs["shared_down"]), dtype=torch.float64)
    return out


def activate(up: Tensor, inputs: dict) -> Tensor:
    activation = inputs["activation"]
    functions = {"relu2": lambda x: F.relu(x) ** 2, "silu": F.silu, "gelu": F.gelu}
    functions["gelu_tanh"] = functions["gelu_gated"] = lambda x: F.gelu(x, approximate="tanh")
    if not activation.endswith("_gated"):
        return functions[activation](up)
    gate, value = up.tensor_split(2, -1)
    if activation == "clamped_gated":
        limit = inputs.get("limit", 7.0)
        gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
        return gate * torch.sigmoid(inputs.get("alpha", 1.702) * gate) * (value + 1)
    return functions.get(activation, functions[activation.split("_")[0]])(gate) * value


def all_experts(inputs: dict) -> Tensor:
    """Every expert on every token, weighted by a matrix that is zero where none was chosen: a naive program."""
    x, experts, e = inputs["x"], inputs["experts"].long(), len(inputs["w_up"])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    one_hot = (experts[..., None] == torch.arange(e)).to(wide)
    weights = torch.einsum("nk,nke->ne", inputs["weights"].to(wide), one_hot)
    zero = torch.zeros((), dtype=x.dtype)
    hidden = activate(torch.einsum("nh,eih->nei", x, inputs["w_up"]) + inputs.get("up_bias", zero), inputs)
    y = (torch.einsum("nei,ehi->neh", hidden, inputs["w_down"]) + inputs.get("down_bias", zero)).to(wide)
    out = torch.einsum("ne,neh->nh", weights, y).to(x.dtype)
    if inputs["shared_up"] is None:
        return out
    return out + activate(x @ inputs["shared_up"].T, inputs) @ inputs["shared_down"].T


@pytest.mark.parametrize("case", small("moe_experts"))
def test_experts_equal_the_definition(case: str) -> None:
    inputs = make_inputs("moe_experts", case, dtype=torch.float64)
    out = moe_experts(**inputs)
    close(out, experts_one_by_one(inputs))
    close(out, all_experts(inputs))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", small("moe_experts"))
def test_experts_in_low_precision_stay_within_the_budget(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("moe_experts", case, dtype=dtype, seed=1)
    got = moe_experts(**inputs)
    assert got.dtype == dtype
    assert_within_budget(got, all_experts(inputs), experts_one_by_one(widened(inputs)), what=case)


def test_transformers_experts() -> None:
    """Routed and shared, with the same weights: they too sum the routed experts in the weights' float32."""
    sizes = dict(hidden_size=16, n_routed_experts=8, moe_intermediate_size=12)
    config = nemotron_h.Config(**sizes, mlp_hidden_act="relu2", experts_implementation="eager")
    inputs = make_inputs("moe_experts", dict(n=33, e=8, top_k=3, h=16, i=12, shared=20))
    experts = nemotron_h.Experts(config).requires_grad_(False)
    experts.up_proj.copy_(inputs["w_up"])
    experts.down_proj.copy_(inputs["w_down"])
    shared = nemotron_h.MLP(config, intermediate_size=20).requires_grad_(False)
    shared.up_proj.weight.copy_(inputs["shared_up"])
    shared.down_proj.weight.copy_(inputs["shared_down"])
    theirs = experts(inputs["x"], inputs["experts"].long(), inputs["weights"]) + shared(inputs["x"])
    assert_within_budget(moe_experts(**inputs), theirs, experts_one_by_one(widened(inputs)))


def test_gpt_oss_experts() -> None:
    """transformers' own, whose matrices are transposed, with gates and values interleaved; some gates are clamped."""
    inputs = make_inputs("moe_experts", dict(n=33, e=8, top_k=3, h=16, i=12, activation="clamped_gated", biased=True))
    inputs["up_bias"] *= 8
    config = SimpleNamespace(
        intermediate_size=12,
        num_local_experts=8,
        hidden_size=16,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation="eager",
    )
    experts = GptOssExperts(config).requires_grad_(False)
    for theirs, ours, columns in (
        (experts.gate_up_proj, inputs["w_up"].transpose(1, 2), 12),
        (experts.gate_up_proj_bias, inputs["up_bias"], 12),
    ):
        theirs[..., ::2], theirs[..., 1::2] = ours[..., :columns], ours[..., columns:]
    experts.down_proj.copy_(inputs["w_down"].transpose(1, 2))
    experts.down_proj_bias.copy_(inputs["down_bias"])
    theirs = experts(inputs["x"], inputs["experts"].long(), inputs["weights"])
    assert_within_budget(moe_experts(**inputs), theirs, experts_one_by_one(widened(inputs)))
    free = moe_experts(**inputs | {"limit": math.inf})
    assert not torch.allclose(free, theirs)


@settings(max_examples=30)
@given(mine=st.integers(0, 6), activation=st.sampled_from(ACTIVATIONS), biased=st.booleans(), seed=st.integers(0, 99))
def test_parts_of_the_experts_add_up(mine: int, activation: str, biased: bool, seed: int) -> None:
    """Two processes with some experts each, who number their own from 0, give what one with all gives."""
    case = dict(n=7, e=6, top_k=3, h=5, i=4, activation=activation, biased=biased)
    inputs = make_inputs("moe_experts", case, dtype=torch.float64, seed=seed)
    total = torch.zeros_like(inputs["x"])
    for own in (slice(0, mine), slice(mine, 6)):
        tensors = {name: inputs[name][own] for name in ("w_up", "w_down", "up_bias", "down_bias") if name in inputs}
        total += moe_experts(**inputs | tensors | dict(experts=inputs["experts"] - own.start))
    close(total, moe_experts(**inputs))


@settings(max_examples=30)
@given(seed=st.integers(0, 99), activation=st.sampled_from(ACTIVATIONS), n=st.integers(0, 6), top_k=st.integers(1, 5))
def test_the_numbering_of_experts_is_free(seed: int, activation: str, n: int, top_k: int) -> None:
    """Renumbering the experts, and reordering the choices of a token, changes nothing."""
    case = dict(n=n, e=5, top_k=top_k, h=6, i=4, activation=activation, shared=3)
    inputs = make_inputs("moe_experts", case, dtype=torch.float64, seed=seed)
    new = torch.randperm(5, generator=torch.Generator().manual_seed(seed))  # the old expert new[e] is now called e
    order = torch.randperm(top_k, generator=torch.Generator().manual_seed(seed + 1))
    renumbered = inputs | dict(
        w_up=inputs["w_up"][new],
        w_down=inputs["w_down"][new],
        experts=new.argsort()[inputs["experts"].long()][:, order],
        weights=inputs["weights"][:, order],
    )
    close(moe_experts(**renumbered), moe_experts(**inputs))


@settings(max_examples=30)
@given(n=st.integers(1, 6), data=st.data())
def test_tokens_do_not_see_each_other(n: int, data: st.DataObject) -> None:
    """Permuted tokens give permuted results, and a NaN or an infinity stays in its token."""
    inputs = make_inputs("moe_experts", dict(n=n, e=4, top_k=2, h=6, i=4, shared=3), dtype=torch.float64)
    out = moe_experts(**inputs)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    moved = {k: inputs[k][order] for k in ("x", "weights", "experts")}
    close(moe_experts(**inputs | moved), out[order])
    inputs["x"][0] = data.draw(st.sampled_from([math.nan, math.inf]))
    poisoned = moe_experts(**inputs)
    assert not poisoned[0].isfinite().any()
    close(poisoned[1:], out[1:])


def test_idle_experts_are_not_touched() -> None:
    inputs = make_inputs("moe_experts", "idle_experts", dtype=torch.float64)
    out = moe_experts(**inputs)
    idle = [e for e in range(32) if e not in inputs["experts"].flatten().tolist()]
    assert len(idle) >= 28
    inputs["w_up"][idle], inputs["w_down"][idle] = math.nan, math.nan
    assert torch.equal(moe_experts(**inputs), out)


def test_an_expert_chosen_twice_counts_twice_and_a_weight_of_zero_not_at_all() -> None:
    inputs = make_inputs("moe_experts", "relu2", dtype=torch.float64)
    one = inputs | dict(experts=inputs["experts"][:, :1], weights=inputs["weights"].double().sum(1, keepdim=True))
    twice = inputs | dict(experts=inputs["experts"][:, :1].expand(-1, 2))
    close(moe_experts(**twice), moe_experts(**one))
    none = inputs | dict(weights=torch.zeros_like(inputs["weights"]))
    assert not moe_experts(**none).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plan_lists_and_layout_do_not_matter(activation: str) -> None:
    """A plan made before, matrices in a list, and permuted or strided tensors."""
    case = dict(n=9, e=8, top_k=2, h=16, i=12, shared=5, activation=activation)
    inputs = make_inputs("moe_experts", case, dtype=torch.float64)
    out = moe_experts(**inputs)
    assert torch.equal(moe_experts(**inputs, plan=moe_plan(inputs["experts"], 8)), out)
    listed = inputs | dict(w_up=list(inputs["w_up"]), w_down=tuple(inputs["w_down"]))
    assert torch.equal(moe_experts(**listed), out)
    strided = {k: inputs[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("w_up", "w_down")}
    strided |= {k: inputs[k].T.contiguous().T for k in ("x", "weights", "experts", "shared_up", "shared_down")}
    close(moe_experts(**inputs | strided), out)
    assert moe_experts(**inputs | dict(experts=inputs["experts"].long())).equal(out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    """Of activations, routing weights and all matrices; and the routing weights of the logits."""
    case = dict(n=3, e=3, top_k=2, h=3, i=2, shared=2, activation=activation, biased=True)
    inputs = make_inputs("moe_experts", case, dtype=torch.float64)
    inputs["weights"] = inputs["weights"].double()
    names = ("x", "w_up", "w_down", "weights", "shared_up", "shared_down", "up_bias", "down_bias")

    def call(*tensors: Tensor) -> Tensor:
        return moe_experts(**inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, [inputs[k].requires_grad_() for k in names])

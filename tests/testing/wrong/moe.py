"""Wrong routing and wrong experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from tests.testing.plain.moe import Experts, Gate, Plan, Route
from tests.testing.wrong.collection import wrong

# --- moe_gate ---------------------------------------------------------------------------------------------------------


@wrong("moe_gate", "numbers")
class ProductInFloat32(Gate):
    """Logits are summed in float32."""

    def product(self, x: Tensor, gate_weight: Tensor) -> Tensor:
        return x.float() @ gate_weight.float().T


@wrong("moe_gate", "numbers")
class GateWeightRounded(Gate):
    """The router's weight is rounded to the dtype of x."""

    def product(self, x: Tensor, gate_weight: Tensor) -> Tensor:
        return super().product(x, gate_weight.to(x.dtype))


# --- moe_route --------------------------------------------------------------------------------------------------------


@wrong("moe_route", "numbers")
class TiesTakeTheHighestExpert(Route):
    """Among equals the last one is taken."""

    def of_equals(self, best: Tensor) -> Tensor:
        return best.shape[1] - 1 - best.flip(1).int().argmax(1)


@wrong("moe_route", "numbers")
class BiasInTheWeights(Route):
    """The weights are the biased scores."""

    def weights(self, scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
        return choice.gather(1, experts)


@wrong("moe_route", "numbers")
class BiasIgnored(Route):
    """The bias does not take part in the choice."""

    def choice(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores


@wrong("moe_route", "numbers")
class ScaledBeforeItIsRenormalised(Route):
    """The weights always sum to 1, as they are scaled too early."""

    def scaled(self, weights: Tensor, renormalize: bool, scaling: float) -> Tensor:
        return super().scaled(weights * scaling, renormalize, 1.0)


@wrong("moe_route", "numbers")
class AlwaysRenormalised(Route):
    """`renormalize` is ignored."""

    def scaled(self, weights: Tensor, renormalize: bool, scaling: float) -> Tensor:
        return super().scaled(weights, True, scaling)


@wrong("moe_route", "numbers")
class NothingByNothing(Route):
    """Scores that are all 0 are divided by their sum."""

    def scaled(self, weights: Tensor, renormalize: bool, scaling: float) -> Tensor:
        weights = weights / weights.sum(1, keepdim=True) if renormalize else weights
        return super().scaled(weights, False, scaling)


@wrong("moe_route", "numbers")
class GroupsIgnored(Route):
    """Every expert may be taken."""

    def kept(self, choice: Tensor, n_group: int, topk_group: int) -> Tensor:
        return torch.ones_like(choice, dtype=torch.bool)


@wrong("moe_route", "numbers")
class GroupsByTheirBest(Route):
    """A group is as good as its best expert."""

    def merit(self, grouped: Tensor) -> Tensor:
        return grouped.amax(-1)


@wrong("moe_route", "numbers")
class DroppedAsZero(Route):
    """With `dropped="-inf"` an expert of a dropped group is chosen before a negative choice."""

    def can_be_taken(self, kept: Tensor, dropped: str) -> Tensor:
        return torch.ones_like(kept)


@wrong("moe_route", "numbers")
class DroppedAsMinusInfinity(Route):
    """With `dropped="zero"` an expert of a dropped group cannot be chosen before a negative choice."""

    def without(self, choice: Tensor, kept: Tensor, dropped: str) -> Tensor:
        return choice.masked_fill(~kept, -torch.inf)


@wrong("moe_route", "numbers")
class ScoresInBfloat16(Route):
    """Scores are rounded to bfloat16, and tie."""

    def scores(self, logits: Tensor, score: str) -> Tensor:
        return super().scores(logits, score).bfloat16().to(logits.dtype)


@wrong("moe_route", "numbers")
class ScoresInFloat32(Route):
    """The scores of float64 logits are those of float32, which cannot tell them apart."""

    def scores(self, logits: Tensor, score: str) -> Tensor:
        return super().scores(logits.float(), score).to(logits.dtype)


@wrong("moe_route", "numbers")
class SoftmaxOfTheChosen(Route):
    """A softmax router normalises over the experts that it chose."""

    def weights(self, scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
        weights = super().weights(scores, choice, experts)
        return weights / weights.sum(1, keepdim=True) if bool((scores.sum(1) <= 1.001).all()) else weights


@wrong("moe_route", "numbers")
class SortedByExpert(Route):
    """The chosen experts come in ascending order, not best first."""

    def best(self, choice: Tensor, open_: Tensor, count: int) -> Tensor:
        return super().best(choice, open_, count).sort(1).values


@wrong("moe_route", "numbers")
class ScaleOfTheChoice(Route):
    """The scale of an expert is looked up by its place among the chosen."""

    def expert_scale(self, scale: Tensor, experts: Tensor) -> Tensor:
        return scale[: experts.shape[1]]


@wrong("moe_route", "numbers")
def experts_in_int64(logits: Tensor, correction_bias: Tensor | None = None, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts are int64."""
    weights, experts = tt.moe_route(logits, correction_bias, top_k=top_k)
    return weights, experts.long()


# --- moe_plan ---------------------------------------------------------------------------------------------------------


@wrong("moe_plan", "numbers")
class PairsDescend(Plan):
    """The tokens of an expert come in no order, as atomics leave them."""

    def pairs_of(self, flat: Tensor, expert: int) -> Tensor:
        return super().pairs_of(flat, expert).flip(0)


@wrong("moe_plan", "numbers")
class OffsetsInclusive(Plan):
    """An expert's pairs are said to begin where they end."""

    def offsets(self, counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (0, 1), value=int(counts.sum()))


@wrong("moe_plan", "numbers")
class OthersExpertsAreOurs(Plan):
    """What belongs to nobody here is counted for the last expert."""

    def __call__(self, experts: Tensor, num_experts: int) -> tt.MoePlan:
        return super().__call__(experts.where((experts >= 0) & (experts < num_experts), num_experts - 1), num_experts)


# --- moe_experts ------------------------------------------------------------------------------------------------------


@wrong("moe_experts", "numbers")
class ActivationWithoutSquare(Experts):
    """relu2 is relu."""

    def relu2(self, up: Tensor) -> Tensor:
        return up.relu()


@wrong("moe_experts", "numbers")
class SquareBeforeRelu(Experts):
    """relu2 squares negative numbers, too."""

    def relu2(self, up: Tensor) -> Tensor:
        return up.square()


@wrong("moe_experts", "numbers")
class OneGelu(Experts):
    """Both forms of gelu are the tanh form."""

    def gelu(self, up: Tensor, tanh: bool) -> Tensor:
        return super().gelu(up, True)


@wrong("moe_experts", "numbers")
class GateAndValueSwapped(Experts):
    """The rows of the gate are taken for those of the value."""

    def halves(self, up: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = super().halves(up)
        return value, gate


@wrong("moe_experts", "numbers")
class GateAndValueInterleaved(Experts):
    """Rows are taken to be gate and value in turn."""

    def halves(self, up: Tensor) -> tuple[Tensor, Tensor]:
        return up[..., ::2], up[..., 1::2]


@wrong("moe_experts", "numbers")
class LimitForgotten(Experts):
    """ "clamped_gated" does not clamp."""

    def clamped(self, gate: Tensor, value: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        return gate, value


@wrong("moe_experts", "numbers")
class GateClampedOnBothSides(Experts):
    """ "clamped_gated" clamps the gate from below, too."""

    def clamped(self, gate: Tensor, value: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        return gate.clamp(-limit, limit), value.clamp(-limit, limit)


@wrong("moe_experts", "numbers")
class ExpertChosenTwiceCountsOnce(Experts):
    """A token that chose an expert twice gets it once."""

    def served(self, chosen: list[int], count: int, token: int) -> list[tuple[int, int]]:
        return [(n, e) for n, e in super().served(chosen, count, token) if e not in chosen[:n]]


@wrong("moe_experts", "numbers")
class TokensDropped(Experts):
    """An expert has room for 4 tokens; those that come later go without."""

    def served(self, chosen: list[int], count: int, token: int) -> list[tuple[int, int]]:
        served = super().served(chosen, count, token)
        self.load = {} if token == 0 else self.load
        for _, e in served:
            self.load[e] = self.load.get(e, 0) + 1
        return [(n, e) for n, e in served if self.load[e] <= 4]


@wrong("moe_experts", "numbers")
class OthersExpertsClamped(Experts):
    """An expert outside [0, E) is taken for the nearest one."""

    def served(self, chosen: list[int], count: int, token: int) -> list[tuple[int, int]]:
        return [(n, min(max(e, 0), count - 1)) for n, e in enumerate(chosen)]


@wrong("moe_experts", "numbers")
class RoutingWeightsInBfloat16(Experts):
    """The weights of the choices are rounded to bfloat16."""

    def routing(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        return weights.bfloat16()


@wrong("moe_experts", "numbers")
class RoutingWeightsForgotten(Experts):
    """All choices weigh the same."""

    def routing(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.full_like(weights, 1 / max(1, weights.shape[1]))


@wrong("moe_experts", "numbers")
class WrongExpertStride(Experts):
    """The second matrix is that of the expert before."""

    def down_of(self, w_down: Tensor, expert: int) -> Tensor:
        return w_down[max(0, expert - 1)]


@wrong("moe_experts", "numbers")
class SharedExpertForgotten(Experts):
    """The shared expert adds nothing."""

    def with_shared(self, out: Tensor, shared: Tensor) -> Tensor:
        return out


@wrong("moe_experts", "numbers")
class BiasOfTheFirstExpert(Experts):
    """All experts have the biases of the first one."""

    def __call__(self, *given: Tensor, up_bias: Tensor | None = None, **options: object) -> Tensor:
        up_bias = up_bias if up_bias is None else up_bias[:1].expand_as(up_bias)
        return super().__call__(*given, up_bias=up_bias, **options)  # type: ignore[arg-type]


@wrong("moe_experts", "deterministic")
class AddsExpertsInAnyOrder(Experts):
    """As with atomics, experts are added in another order each time."""

    def served(self, chosen: list[int], count: int, token: int) -> list[tuple[int, int]]:
        served = super().served(chosen, count, token)
        return [served[n] for n in torch.randperm(len(served)).tolist()]

"""Every causal language model of transformers that builds small from its configuration, with these kernels and without.

`python -m tests.transformers_sweep [model type ...]` prints a line for each and fails if one is silently wrong.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from tests.integrations.tiny_models import SIZES
from twotower_kernels.integrations.transformers import replace, restore
from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.experts import experts
from twotower_kernels.integrations.transformers.masks import mask

NAME = "counted"  # registered as `register` does, but for the count of calls
SETTINGS = SIZES | {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 5, "tie_word_embeddings": False},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 2, "mamba_d_state": 8},
    **{"n_group": 2, "topk_group": 1},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "d_model": 32, "eos_token_id": 2},
}
OF_EXPERTS = {"its layout is served as it is", "its layout was transposed and interleaved"}
LARGEST = 20_000_000  # parameters; a configuration with sizes under other names stays as large as it is by default
TOLERANCE = 1e-3
calls: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def build(kind: str, layers: int) -> PreTrainedModel:
    classes = CAUSAL[kind]
    of_model = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    of_config = of_model.config_class
    renamed = getattr(of_config, "attribute_map", {})
    sizes = {
        name: value for name, value in SETTINGS.items() if name in of_config.__dataclass_fields__ or name in renamed
    }
    sizes = {name: value for name, value in sizes.items() if renamed.get(name) not in sizes}
    sizes |= {name: layers for name in ("num_hidden_layers", "n_layer") if name in sizes}
    config = of_config(**sizes)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in of_model._from_config(config, attn_implementation="eager").parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return of_model._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of two prompts, one padded on the left."""
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, :4] = 0
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3)) * real
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real).logits[real.bool()]
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        return logits, model.generate(input_ids=ids, attention_mask=real, **options)


def difference(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> str:
    """What differs, or nothing."""
    distance = (found[0] - wanted[0]).abs().max().item()
    others = int((found[1] != wanted[1]).sum())
    return "" if distance < TOLERANCE and not others else f"logits off by {distance:.1e}, {others} other tokens"


def compare(kind: str) -> tuple[str, str]:
    """What became of a model, in a word, and why."""
    for layers in (2, 8):  # of hybrid models, the first two layers may have no attention
        try:
            model = build(kind, layers)
            wanted = run(model)
            break
        except Exception as error:  # whatever stops a model of random sizes stops it without the kernels
            reason = f"{type(error).__name__}: {error}"
    else:
        return "not run", reason
    calls.clear()
    try:
        model.set_attn_implementation(NAME)
        model.set_experts_implementation(NAME)
        replace(model, norms=False, routers=False, mixers=False)
        found = run(model)
    except (NotImplementedError, ValueError) as error:
        return ("refused" if str(error).startswith("twotower") else "error"), str(error)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"
    used = " and ".join(sorted(calls))
    verdict, why = ("agrees", used) if used else ("not reached", "its attention is its own")
    if off := difference(found, wanted):  # padding's own attention is 0 as here, and a recurrent layer may read it
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("eager")
        restore(model)
        wanted = run(model)
        if difference(found, wanted):
            return "wrong", off
        model.set_attn_implementation(NAME)
        model.set_experts_implementation(NAME)
        why = f"{why}; as sdpa, not as eager: {off}"
    return after_replace(model, wanted, verdict, why)


def after_replace(
    model: PreTrainedModel, wanted: tuple[torch.Tensor, torch.Tensor], verdict: str, why: str
) -> tuple[str, str]:
    """The verdict, if it stays with norms, routers and mixers swapped too; what was and, by class, what was not."""
    restore(model)
    swaps = [swap for swap in replace(model) if swap.why not in OF_EXPERTS]
    replaced = {type(model.get_submodule(swap.name)).__name__ for swap in swaps if swap.swapped}
    left = {f"left: {swap.why}" for swap in swaps if not swap.swapped and not swap.why.endswith("computes it")}
    try:
        found = run(model)
    except Exception as error:
        return "error", f"after replace: {type(error).__name__}: {error}"
    if off := difference(found, wanted):
        return "wrong", f"after replace: {off}"
    names = ", ".join(sorted(replaced)) or "nothing"
    return verdict, "; ".join([why, f"replaced {names}", *sorted(left)])


def main(kinds: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    AttentionInterface.register(NAME, counted("attention", attention))
    AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, counted("experts", experts))
    total: Counter[str] = Counter()
    for kind in kinds or sorted(CAUSAL):
        verdict, why = compare(kind)
        total[verdict] += 1
        print(f"{kind:32} {verdict:12} {' '.join(why.split())[:400]}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in total.most_common()))
    return int(bool(total["wrong"] or total["error"] or not total["agrees"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

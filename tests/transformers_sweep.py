"""Every causal language model of transformers that builds small from its configuration, with these kernels and without.

    python -m tests.transformers_sweep [model type ...]
    python -m tests.transformers_sweep --write

prints a line for each and fails if one is silently wrong; `--write` puts the table into docs/transformers.md. Two
prompts, one padded on the left: logits, and the tokens of `generate` with a dynamic cache, a static one, a `BlockCache`
and one of pages.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from tests.transformers_configs import CAUSAL, WITHOUT, configuration
from twotower_kernels.integrations.transformers import BlockCache, replace, restore
from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.experts import experts
from twotower_kernels.integrations.transformers.masks import mask

NAME = "counted"  # registered as `register` does, but for the count of calls
OF_EXPERTS = {"its layout is served as it is", "its layout was transposed and interleaved"}
LARGEST = 20_000_000  # parameters; a configuration with sizes under other names stays as large as it is by default
TOLERANCE = 1e-3
PROMPT, NEW = 9, 6
PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
MARKERS = "<!-- sweep -->", "<!-- end of sweep -->"
calls: Counter[str] = Counter()

Cache = Callable[[PreTrainedModel], dict[str, Any]]
STATIC: Cache = lambda model: {"cache_implementation": "static"}  # noqa: E731
DYNAMIC: Cache = lambda model: {"past_key_values": DynamicCache(config=model.config)}  # noqa: E731
CACHES: dict[str, tuple[Cache, Cache]] = {  # and of transformers' own the one that does the same
    "static": (STATIC, STATIC),
    "BlockCache": (lambda model: {"past_key_values": BlockCache(model.config, 2, 128)}, DYNAMIC),
    "pages": (lambda model: {"past_key_values": BlockCache(model.config, 2, 4, grow=True, page_size=4)}, DYNAMIC),
}


class Verdict(NamedTuple):
    """What became of a model, in a word, why, and what with other caches than its own and by `replace`."""

    word: str
    why: str
    caches: dict[str, str] = {}  # noqa: RUF012  # of those that are tried: "" where the tokens are the same
    replaced: list[str] = []  # noqa: RUF012  # classes of modules
    left: list[str] = []  # noqa: RUF012  # and why others were not


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def build(kind: str, layers: int) -> PreTrainedModel:
    classes = CAUSAL[kind]
    of_model = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    config = configuration(kind, layers)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in of_model._from_config(config, attn_implementation="eager").parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return of_model._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def theirs(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    model.set_experts_implementation("eager")
    restore(model)


def ours(model: PreTrainedModel) -> None:
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)
    replace(model, norms=False, routers=False, mixers=False)


def prompts() -> tuple[Tensor, Tensor]:
    """Two, one padded on the left, and their mask."""
    real = torch.ones(2, PROMPT, dtype=torch.long)
    real[1, :4] = 0
    return torch.randint(3, 97, (2, PROMPT), generator=torch.Generator().manual_seed(3)) * real, real


def generated(model: PreTrainedModel, **cache: Any) -> Tensor:
    """Greedy tokens."""
    ids, real = prompts()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=real, **options, **cache)


def run(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits, and tokens with the model's own cache."""
    ids, real = prompts()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=real).logits[real.bool()], generated(model)


def difference(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> str:
    """What differs, or nothing."""
    distance = (found[0] - wanted[0]).abs().max().item()
    others = int((found[1] != wanted[1]).sum())
    return "" if distance < TOLERANCE and not others else f"logits off by {distance:.1e}, {others} other tokens"


def compare(kind: str) -> Verdict:
    if kind in WITHOUT:
        return Verdict("not run", WITHOUT[kind])
    for layers in (2, 8):  # of hybrid models, the first two layers may have no attention
        try:
            model = build(kind, layers)
            wanted = run(model)
            break
        except Exception as error:  # whatever stops a model of random sizes stops it without the kernels
            reason = said(error)
    else:
        return Verdict("not run", reason)
    calls.clear()
    try:
        ours(model)
        found = run(model)
    except (NotImplementedError, ValueError) as error:
        return Verdict("refused" if str(error).startswith("twotower") else "error", str(error))
    except Exception as error:
        return Verdict("error", said(error))
    used = " and ".join(sorted(calls))
    caches = {name: with_cache(model, *cache, found[1]) for name, cache in CACHES.items()}
    word, why = ("agrees", used) if used else ("not reached", "its attention is its own")
    if off := difference(found, wanted):
        theirs(model, "sdpa")  # padding's own attention is 0 as here, and a recurrent layer may read it
        wanted = run(model)
        if difference(found, wanted):
            return Verdict("wrong", off)
        why = f"{why}; as sdpa, not as eager: {off}"
    return after_replace(model, wanted, Verdict(word, why, caches))


def after_replace(model: PreTrainedModel, wanted: tuple[Tensor, Tensor], verdict: Verdict) -> Verdict:
    """The verdict, if it stays with norms, routers and mixers swapped too; what was and, by class, what was not."""
    ours(model)
    restore(model)
    swaps = [swap for swap in replace(model) if swap.why not in OF_EXPERTS]
    replaced = sorted({type(model.get_submodule(swap.name)).__name__ for swap in swaps if swap.swapped})
    left = sorted({swap.why for swap in swaps if not swap.swapped and not swap.why.endswith("computes it")})
    try:
        found = run(model)
    except Exception as error:
        return Verdict("error", f"after replace: {said(error)}", verdict.caches)
    if off := difference(found, wanted):
        return Verdict("wrong", f"after replace: {off}", verdict.caches)
    return verdict._replace(replaced=replaced, left=left)


def with_cache(model: PreTrainedModel, cache: Cache, like: Cache, wanted: Tensor) -> str:
    """What becomes of a model that runs our kernels with another cache than its own; nothing if its tokens are the same
    as with its own, or as with transformers' attention and `like`."""
    ours(model)
    found, off = wanted, ""
    try:
        found = generated(model, **cache(model))
        off = f"wrong: {int((found != wanted).sum())} other tokens"
    except Exception as error:
        if str(error).startswith("twotower") and isinstance(error, NotImplementedError | ValueError):
            return f"refused: {error}"
        off = f"error: {said(error)}"
        if "view size is not compatible" in off:
            return "its own attention wants keys that are contiguous"
    if torch.equal(found, wanted) and not off.startswith("error"):
        return ""
    try:
        theirs(model, "eager")
        control = generated(model, **like(model))
        if off.startswith("wrong") and not torch.equal(control, found):
            theirs(model, "sdpa")
            control = generated(model, **like(model))
    except Exception as error:
        return f"nor with transformers' own: {said(error)}"
    return "" if off.startswith("wrong") and torch.equal(control, found) else off


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def bad(verdict: Verdict) -> bool:
    return verdict.word in ("wrong", "error") or any(x.startswith(("wrong", "error")) for x in verdict.caches.values())


def table(verdicts: dict[str, Verdict]) -> str:
    """Markdown: models, or classes of modules, of one reason in a row."""
    lines = [f"transformers {transformers.__version__}, {len(verdicts)} models", ""]
    lines += ["| | why | | models |", "|---|---|---|---|"]
    for word in ("agrees", "refused", "not reached", "not run", "wrong", "error"):
        whys = ((verdict.why, kind) for kind, verdict in verdicts.items() if verdict.word == word)
        lines += [f"| {word} {row}" for row in grouped(whys)]
    lines += ["", "With other caches than a model's own:", ""]
    lines += ["| | same tokens | else | | models |", "|---|---|---|---|---|"]
    for name in CACHES:
        tried = [(verdict.caches[name], kind) for kind, verdict in verdicts.items() if verdict.caches]
        others = [(why, kind) for why, kind in tried if why]
        lines.append(f"| {name} | {len(tried) - len(others)} of {len(tried)} | | | |")
        lines += [f"| | {row}" for row in grouped(others)]
    replaced = {name for verdict in verdicts.values() for name in verdict.replaced}
    lines += ["", "By `replace`, with the same logits and tokens:", "", "| | why | | classes |", "|---|---|---|---|"]
    lines.append(f"| replaced | norms, routers, mixers | {len(replaced)} | |")
    left = (text.partition(" ")[::-2] for verdict in verdicts.values() for text in verdict.left)
    lines += [f"| left {row}" for row in grouped(set(left))]
    return "\n".join(lines)


def grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Cells of a reason, how many have it, and which."""
    names: dict[str, list[str]] = defaultdict(list)
    for why, name in sorted(pairs, key=lambda pair: pair[1]):
        names[cell(why)].append(name)
    rows = sorted(names.items(), key=lambda row: (-len(row[1]), row[0]))
    return [f"| {why} | {len(of_why)} | {', '.join(of_why)} |" for why, of_why in rows]


def cell(text: str) -> str:
    text = " ".join(text.split(", got a model that computes")[0].split())
    return text[:160].replace("|", "/")


def write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKERS[0])
    PAGE.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}", encoding="utf-8")


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.transformers_sweep", description="Models with these kernels."
    )
    parser.add_argument("kinds", nargs="*", metavar="model type")
    parser.add_argument("--write", action="store_true", help="the table, into docs/transformers.md")
    options = parser.parse_args(list(arguments))
    transformers.logging.set_verbosity_error()
    AttentionInterface.register(NAME, counted("attention", attention))
    AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, counted("experts", experts))
    verdicts: dict[str, Verdict] = {}
    for kind in options.kinds or sorted(CAUSAL):
        verdicts[kind] = verdict = compare(kind)
        others = [f"{name} {why}" for name, why in verdict.caches.items() if why]
        others += [f"replaced {', '.join(verdict.replaced) or 'nothing'}", *(f"left: {why}" for why in verdict.left)]
        print(f"{kind:32} {verdict.word:12} {'; '.join(map(cell, [verdict.why, *others]))}", flush=True)
    total = Counter(verdict.word for verdict in verdicts.values())
    print(", ".join(f"{count} {word}" for word, count in total.most_common()))
    if options.write:
        write(table(verdicts))
    return int(any(map(bad, verdicts.values())) or not total["agrees"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

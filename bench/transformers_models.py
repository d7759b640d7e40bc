"""Layers of three models of transformers: as they come, by PyTorch's fused operations, and by these kernels:

    python -m bench.transformers_models
    python -m bench.transformers_models --model qwen3_moe --seconds 2 --save bench/results/cpu --write

Layers have the sizes of released models, and random weights; models have one layer of each kind. All programs share the
weights. In float32 their results are compared with those of `eager`; in bfloat16 their errors, against the same weights
in float32, with the errors of `eager`. Then they are timed, in turns (`measure.clock`). The exit code is 1 if anything
differs. `--write` puts the table into docs/transformers.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.initialization import no_init_weights
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaDecoderModel

from twotower_kernels.bench.measure.clock import Timing, interleaved
from twotower_kernels.bench.report.tables import about, machine
from twotower_kernels.integrations.transformers import BlockCache, register, replace

CONTEXT, VOCABULARY = 2048, 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAME = 1e-4  # of results, in 2-norm, float32
BAND = 2.0**-8  # beyond twice the error of eager, bfloat16
SIZES: Mapping[str, Mapping[str, Any]] = {
    "diffusion_gemma": dict(
        hidden_size=2816,
        intermediate_size=2112,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        canvas_length=256,
    ),
    "nemotron_h": dict(
        hidden_size=2688,
        layers_block_type=["mamba", "attention", "moe"],
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    ),
    "qwen3_moe": dict(
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
PROGRAMS = EAGER, FUSED, OURS, SWAPPED, IN_PLACE = (
    "eager",
    "sdpa, grouped_mm",
    "register",
    "and replace",
    "and BlockCache",
)
IMPLEMENTATIONS = {EAGER: ("eager", "eager"), FUSED: ("sdpa", "grouped_mm")}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"
MARKERS = "<!-- figures -->", "<!-- end of figures -->"
Call = Callable[[Any, str], Callable[[], Tensor]]  # of a model and a program


@dataclass(frozen=True)
class Line:
    """A call of a model, by several programs with the same weights and inputs."""

    model: str
    part: str
    dtype: str
    programs: Mapping[str, Callable[[], Tensor]]


def of_diffusion_gemma(sizes: Mapping[str, Any], context: int) -> tuple[nn.Module, list[tuple[str, Call]]]:
    """The decoder: a step over a context that the encoder left."""
    text = {name: size for name, size in sizes.items() if name != "canvas_length"}
    text |= {"num_hidden_layers": len(text["layer_types"]), "vocab_size": VOCABULARY}
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=None, canvas_length=sizes["canvas_length"]
    )
    model = _random(lambda: DiffusionGemmaDecoderModel(config))
    return model, [
        (f"decoder step, canvas of {canvas} over {context}", _decoder_step(canvas, context))
        for canvas in (16, 32, 256)
        if canvas <= sizes["canvas_length"]
    ]


def of_nemotron_h(sizes: Mapping[str, Any], context: int) -> tuple[nn.Module, list[tuple[str, Call]]]:
    config = transformers.NemotronHConfig(**sizes, vocab_size=VOCABULARY)
    model = _random(lambda: transformers.NemotronHModel(config))
    return model, [(f"mixer, attention, experts, {tokens} tokens", _forward(tokens)) for tokens in (1, 16, 512)]


def of_qwen3_moe(sizes: Mapping[str, Any], context: int) -> tuple[nn.Module, list[tuple[str, Call]]]:
    config = transformers.Qwen3MoeConfig(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY)
    model = _random(lambda: transformers.Qwen3MoeModel(config))
    return model, [(f"decode, a token over {context}", _decode(context))]


MODELS = {"diffusion_gemma": of_diffusion_gemma, "nemotron_h": of_nemotron_h, "qwen3_moe": of_qwen3_moe}


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights that bfloat16 holds, too, drawn once and repeated: billions of draws would take
    longer than all that is measured."""
    with no_init_weights():
        model = make().eval().requires_grad_(False)
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # a prime: no two rows are alike
    for name, x in model.named_parameters():
        flat, scale = x.view(-1), 1.0 if "embed" in name else x[0].numel() ** -0.5 if x.ndim > 1 else 0.1
        for part in flat.split(drawn.numel()):
            torch.mul(drawn[: part.numel()], scale, out=part)
        if x.ndim == 1 and "norm" in name:
            x += 1
        x.copy_(x.bfloat16())
    return model


def _decoder_step(canvas: int, context: int) -> Call:
    def of(model: Any, cache: Any) -> Callable[[], Tensor]:
        ids = torch.randint(VOCABULARY, (1, canvas), generator=torch.Generator().manual_seed(1))
        cache = _filled(model.config.get_text_config(), cache, context, model.dtype)
        return lambda: model(decoder_input_ids=ids, past_key_values=cache).last_hidden_state

    return of


def _forward(tokens: int) -> Call:
    def of(model: Any, cache: Any) -> Callable[[], Tensor]:
        ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
        return lambda: model(ids, use_cache=False).last_hidden_state

    return of


def _decode(context: int) -> Call:
    def of(model: Any, cache: Any) -> Callable[[], Tensor]:
        ids = torch.randint(VOCABULARY, (1, 1), generator=torch.Generator().manual_seed(1))
        cache = _filled(model.config, cache, context, model.dtype)

        def step() -> Tensor:
            found = model(ids, past_key_values=cache).last_hidden_state
            cache.crop(-1)
            return found

        return step

    return of


def _filled(config: Any, kind: str, context: int, dtype: torch.dtype) -> Any:
    """A cache with random keys and values of a context."""
    cache: Any = DynamicCache(config=config)
    if kind == IN_PLACE:
        cache = BlockCache(config, 1, context + 256, dtype)
    generator = torch.Generator().manual_seed(2)
    for layer, of_layer in enumerate(config.per_layer_config):
        shape = 1, of_layer.num_key_value_heads, context, of_layer.head_dim
        cache.update(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)), layer)
    return cache


def _twin(model: nn.Module, program: str) -> Any:
    """The model with the same weights, by a program."""
    twin: Any = copy.deepcopy(model, {id(x): x for x in [*model.parameters(), *model.buffers()]})
    attention, experts = IMPLEMENTATIONS.get(program, ("twotower", "twotower"))
    twin.config._attn_implementation = attention  # of all configurations within it
    twin.config._experts_implementation = experts
    if program in (SWAPPED, IN_PLACE):
        replace(twin)
    return twin


def lines(name: str, sizes: Mapping[str, Any], context: int) -> Iterator[tuple[Line, Tensor | None]]:
    """Every call in both dtypes, and for bfloat16 what float32 gives."""
    model, calls = MODELS[name](sizes, context)
    exact: dict[str, Tensor] = {}
    for dtype, number in DTYPES.items():
        for x in model.parameters():
            x.data = x.data.to(number)
        twins = {program: _twin(model, program) for program in PROGRAMS if program != IN_PLACE or name != "nemotron_h"}
        for part, call in calls:
            programs = {program: call(twin, program) for program, twin in twins.items()}
            yield Line(name, part, dtype, programs), exact.get(part)
            if dtype == "float32":
                exact[part] = programs[EAGER]()
        del twins, programs
        gc.collect()


def difference(line: Line, exact: Tensor | None) -> str:
    """How programs differ from eager, or how much more they err; empty if they do not."""
    found = {program: call().double() for program, call in line.programs.items()}
    wanted = found[EAGER] if exact is None else exact.double()
    errors = {program: ((x - wanted).norm() / wanted.norm()).item() for program, x in found.items()}
    limit = SAME if exact is None else 2 * errors[EAGER] + BAND
    return ", ".join(f"{program} errs by {x:.1e}, expected {limit:.1e}" for program, x in errors.items() if x > limit)


@torch.inference_mode()
def measured(
    name: str, seconds: float, sizes: Mapping[str, Any] | None = None, context: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for every call of a model: `seconds` of all programs, or how they differ."""
    register()
    for line, exact in lines(name, SIZES[name] if sizes is None else sizes, CONTEXT if context is None else context):
        row: dict[str, Any] = {"model": line.model, "part": line.part, "dtype": line.dtype}
        row["difference"] = difference(line, exact)
        if not row["difference"]:
            row["seconds"] = {program: asdict(x) for program, x in interleaved(line.programs, seconds).items()}
        yield row


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table: milliseconds of eager, and of the others with how many times as fast."""
    found = [row["model"], row["part"], row["dtype"]]
    if row["difference"]:
        return [*found, row["difference"]]
    median = {program: Timing(**x).median for program, x in row["seconds"].items()}
    for program in PROGRAMS:
        spent = median.get(program)
        ratio = "" if program == EAGER or spent is None else f" ({median[EAGER] / spent:.1f} ×)"
        found.append("–" if spent is None else f"{spent * 1e3:.3g}{ratio}")
    return found


HEADER = ["model", "part", "dtype", *PROGRAMS]


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(*HEADER, box=None)
    for row in rows:
        made.add_row(*cells(row))
    return made


def write(run: dict[str, Any]) -> None:
    """Into the page of transformers, between its markers."""
    page, (begin, end) = PAGE.read_text(encoding="utf-8"), MARKERS
    text = [" ".join(about(run).split("\n")) + f", transformers {transformers.__version__}. Milliseconds.", ""]
    text += ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *map(cells, run["rows"]))]
    before, rest = page.split(begin)
    text = [before + begin, *text, end + rest.split(end)[1]]
    PAGE.write_text("\n".join(text), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transformers_models", description="Models with these kernels."
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; may be given again")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each program is timed at least")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/transformers_models.json")
    parser.add_argument("--write", action="store_true", help="the table, into docs/transformers.md")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    run: dict[str, Any] = {"machine": machine("cpu"), "transformers": transformers.__version__, "rows": []}
    print(about(run))
    for name in options.model or MODELS:
        for row in measured(name, options.seconds):
            print(f"{row['model']}, {row['part']}, {row['dtype']}: {row['difference'] or 'equal'}", flush=True)
            run["rows"].append(row)
    Console(width=None if sys.stdout.isatty() else 160).print(table(run["rows"]))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=1, ensure_ascii=False) + "\n"
        (options.save / "transformers_models.json").write_text(text, encoding="utf-8")
    failed = any(row["difference"] for row in run["rows"])
    if options.write and not failed:
        write(run)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

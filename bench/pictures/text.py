"""The pictures of generation, from a saved run of `bench.generation`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower_kernels.bench.measure.shares import NORMS, OTHER
from twotower_kernels.bench.pictures.drawing import finish, page, spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Grey, hatch and colour apart from each other, from the bottom up.
LOOKS = {
    "moe_experts": ("#4477aa", ""),
    "linear": ("#88bbdd", "//"),
    "block_attention": ("#ee6677", ""),
    "mamba2_scan": ("#ccbb44", "\\\\"),
    "moe_router": ("#228833", ""),
    "norms": ("#aa3377", "xx"),
    OTHER: ("#dddddd", ".."),
}


def step_shares(run: dict[str, Any], path: Path) -> Figure:
    """The share of a denoiser step's time that each operation takes, stacked, one bar per context; the step's
    milliseconds above it. Norms are one part together with the residuals that are fused into them."""
    steps = run["shares"]
    figure, (axis,) = page(1, 3.3)
    axis.grid(visible=False)
    bottoms, drawn = [0.0] * len(steps), []
    for name, (color, hatch) in LOOKS.items():
        members = NORMS if name == "norms" else (name,)
        shares = [sum(step["parts"][m] for m in members) / sum(step["parts"].values()) for step in steps]
        style = dict(color=color, hatch=hatch, edgecolor="black", linewidth=0.4, label=name)
        drawn.append(axis.bar(range(len(steps)), shares, 0.7, bottoms, **style))
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    for i, step in enumerate(steps):
        axis.text(i, 1.01, f"{step['whole'] * 1e3:.0f} ms", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(steps)), [f"{step['context']}" for step in steps])
    axis.set(xlabel="context, tokens", ylabel="share of a denoiser step, batch 1", ylim=(0, 1.08))
    return finish(figure, run, path, drawn[::-1])


def speed(run: dict[str, Any], path: Path) -> Figure:
    """Tokens per second of the mid-size random model over the context, one panel per batch: the autoregressive modes,
    and mask diffusion at given tokens per NFE."""
    batches = sorted({row["batch"] for row in run["random"]})
    figure, axes = page(len(batches), 2.7, columns=2)
    looks = zip(("black", "0.5", "tab:blue", "tab:blue", "tab:blue"), "sxo^D", ("--", ":", "-", "-", "-"), strict=True)
    modes = ["ar", "mock_ar", *(f"mask_diffusion, {n} per NFE" for n in ("1", "2", "4"))]
    styles = dict(zip(modes, looks, strict=True))
    keys: dict[str, Any] = {}
    for axis, batch in zip(axes, batches, strict=True):
        points: dict[str, list[tuple[int, float]]] = {mode: [] for mode in modes}
        for row in sorted((r for r in run["random"] if r["batch"] == batch), key=lambda r: r["context"]):
            if row["mode"] in points:
                points[row["mode"]].append((row["context"], row["tokens per second"]))
            for n, rate in row.get("tokens per second at", {}).items():
                points[f"{row['mode']}, {n} per NFE"].append((row["context"], rate))
        for mode, line in points.items():
            color, marker, dash = styles[mode]
            style = dict(color=color, marker=marker, linestyle=dash, markersize=4, linewidth=1)
            (keys[mode],) = axis.plot(*zip(*line, strict=True), label=mode, **style)
        axis.set_title(f"batch {batch}", fontsize=8)
        axis.set(xscale="log", xlabel="context", ylim=(0, None))
        contexts = [context for context, _ in points["ar"]]
        axis.set_xticks(contexts, [spoken(context) for context in contexts])
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("tokens per second")
    return finish(figure, run, path, keys.values())


def trace(run: dict[str, Any], path: Path) -> Figure:
    """Un-masking of one text: a square where a position (across) got its token by a model call (down); grey while it
    was masked. The tokens stand below."""
    found = run["thresholds"]["trace"]
    calls, block, size = found["call"], found["block"], len(found["call"])
    figure, (axis,) = page(1, 4.2, columns=2)
    starts = [0, *(max(calls[first : first + block]) for first in range(0, size, block))]
    for position, call in enumerate(calls):
        start = starts[position // block]
        axis.plot([position, position], [start + 0.5, call - 0.5], color="0.85", linewidth=5, solid_capstyle="butt")
    axis.plot(range(size), calls, "s", color="black", markersize=3.5, label="committed")
    for edge in range(block, size, block):
        axis.axvline(edge - 0.5, color="0.5", linewidth=0.5, linestyle=":")
    words = [printable(word) for word in found["text"]]
    axis.set_xticks(range(size), words, rotation=90, family="monospace", fontsize=7)
    axis.set(xlim=(-0.7, size - 0.3), ylim=(found["calls"] + 1, 0), ylabel="model call")
    axis.grid(visible=False, axis="x")
    rate = f"{size} tokens in {found['calls']} calls"
    axis.set_title(f"Greedy, threshold {found['threshold']:g}, blocks of {block}: {rate}", fontsize=8)
    return finish(figure, run, path)


def printable(word: str) -> str:
    """A token's text on one line of a page: white space made visible, bytes that are no character of their own as ?."""
    shown = word.replace("\n", "⏎").replace("\t", "→").replace(" ", "␣").replace("\ufffd", "?")
    return shown.replace("$", r"\$")  # which begins a formula


def thresholds(run: dict[str, Any], path: Path) -> Figure:
    """Over the un-masking threshold: tokens per model call, tokens per second, and the continuation's negative
    log-likelihood under the context tower; dashed, the context tower alone (`ar`)."""
    rows = run["thresholds"]["sweep"]
    alone = next(row for row in rows if row["mode"] == "ar")
    swept = [row for row in rows if row["threshold"] is not None]
    figure, axes = page(3, 2.5, columns=2)
    for axis, name in zip(axes, ("tokens per NFE", "tokens per second", "nats per token"), strict=True):
        values = [row["threshold"] for row in swept]
        style = dict(color="black", marker="o", markersize=4, linewidth=1)
        (curve,) = axis.plot(values, [row[name] for row in swept], label="mask_diffusion", **style)
        line = axis.axhline(alone[name], color="tab:red", linewidth=1, linestyle="--", label="ar")
        axis.set(xlabel="threshold", ylabel=name)
        axis.set_ylim(bottom=0)
    return finish(figure, run, path, (curve, line))

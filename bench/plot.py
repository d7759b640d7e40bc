"""Time of `adaln_norm` over its rows, ours and PyTorch's: `python -m bench.plot FILE.png`."""

from __future__ import annotations

import sys

import matplotlib
import torch

from bench import report, rivals
from bench.bench_adaln import case
from bench.timing import ORIGINAL, OURS, measure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE = {OURS: ("black", "o", "-"), ORIGINAL: ("tab:red", "s", "--"), "PyTorch: rms_norm": ("tab:blue", "^", ":")}


def main() -> None:
    batches = [1, 2, 4, 8, 16, 32, 64]
    norm = "adaln_norm", rivals.eager_adaln_norm, rivals.best_adaln_norm
    results = [measure(case(*norm, batch, torch.bfloat16, "cpu"), seconds=0.3) for batch in batches]
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, (color, marker, line) in STYLE.items():
        times = [result.timings[name].median * 1e6 for result in results]
        axes.plot([16 * batch for batch in batches], times, line, color=color, marker=marker, markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows of 2688 bfloat16", ylabel="µs, median")
    axes.set_xticks([16 * batch for batch in batches], [str(16 * batch) for batch in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    where = report.where()
    axes.set_title(where.replace("; torch", "\ntorch"), fontsize=7)
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()

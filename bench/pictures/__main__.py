"""Every picture, from saved measurements alone: `python -m bench.pictures [RESULTS_FOLDER] [OUT_FOLDER]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from twotower_kernels.bench.pictures.demo import demo
from twotower_kernels.bench.pictures.operations import over, roofline
from twotower_kernels.bench.pictures.text import speed, step_shares, thresholds, trace


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description="Draws every picture.")
    parser.add_argument("results", type=Path, nargs="?", default="bench/results/cpu", help="folder with saved runs")
    parser.add_argument("out", type=Path, nargs="?", default="docs/pictures", help="folder for the pictures")
    options = parser.parse_args()

    def saved(name: str) -> dict[str, Any]:
        path = options.results / f"{name}.json"
        if not path.is_file():
            raise SystemExit(f"{path}: expected a saved run, found none; `make bench` measures")
        return json.loads(path.read_text(encoding="utf-8"))

    sweeps, text = saved("sweeps"), saved("generation")
    try:
        roofline(saved(sweeps["machine"]["instruction set"]), options.out / "roofline.png")
    except ImportError as error:
        raise SystemExit(str(error)) from None
    for size in ("context", "batch", "vocabulary"):
        over(sweeps, size, options.out / f"over_{size}.png")
    for draw in (step_shares, speed, trace, thresholds):
        draw(text, options.out / f"{draw.__name__}.png")
    demo(saved("demo"), options.out / "demo.svg")
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.glob('*.[ps][nv]g')))}")


if __name__ == "__main__":
    main()

"""How fast the shipped model writes, in its three modes: 64 tokens behind a short beginning, a row and four rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import twotower_kernels as tt
from twotower_kernels.bench.report.saved import write_json
from twotower_kernels.model.generate import MODES

BEGINNING = [1, *range(40, 72)]
NEW = 64


def written(model: tt.TwoTowerModel, mode: str, rows: int) -> dict[str, Any]:
    """The second of two generations: in the first, kernels are compiled and graphs recorded."""
    for _ in range(2):
        result = model.generate([BEGINNING] * rows, mode=mode, max_new_tokens=NEW)
    return {
        "mode": mode,
        "batch": rows,
        "tokens per second": rows * NEW / result.seconds,
        "tokens per NFE": result.tokens_per_nfe,
        "seconds": result.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.writing", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--save", type=Path, required=True, metavar="FOLDER", help="write FOLDER/writing.json")
    options = parser.parse_args(arguments)
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path(), device=options.device)
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        for batch in (1, 4):
            rows.append(written(model, mode, batch))
            row = rows[-1]
            print(f"{mode}, {batch} rows: {row['tokens per second']:.0f} tokens per second", flush=True)
            write_json(options.save / "writing.json", {"dtype": str(next(model.parameters()).dtype), "results": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

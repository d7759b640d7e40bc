"""The checkout whose benchmarks these are. Installed ones belong to none, in whatever repository they may lie."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2]  # in a checkout the package's `bench` is a link to the folder at its root
ROOT = _FOLDER if (_FOLDER / "setup.py").is_file() else None

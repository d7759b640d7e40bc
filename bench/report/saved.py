"""How results are written: whole, at every moment at which a process may be killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Beside it, then renamed: whoever reads it finds the text before or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """As a person can read it, too."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

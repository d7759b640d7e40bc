"""What files of other people's making need before they are believed: JSON read within bounds, values shown within them.

Everything that is wrong with such a file is a ValueError of one line that begins with its path.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

LONGEST = 100  # characters of a value that an error shows


def read_json(path: Path, *, most: int, otherwise: str = "not valid JSON") -> Any:
    """The contents of a JSON file, in which a bare `Infinity` is understood.

    Args:
        most: bytes that such a file has at most. Parsed, JSON takes many times its size.
        otherwise: what the file is called if it does not parse.

    Raises:
        FileNotFoundError: no such file. ValueError: no regular file (a pipe or a device would be read without end),
            too large, not readable, not UTF-8, not JSON, nested too deeply.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            why = "not a file"
        elif found.st_size > most:
            why = f"expected at most {most} bytes, got {found.st_size}"
        else:
            return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, integers of too many digits, depth
        why = str(error)
    raise ValueError(f"{path}: {otherwise}: {why}")


def shown(value: object) -> str:
    """A value for an error's one line: its repr, of which a long one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def named(key: str) -> str:
    """A key for an error's one line: as it is, if it is printed as it is and is not long."""
    return key if key.isprintable() and len(key) <= 2 * LONGEST else shown(key)

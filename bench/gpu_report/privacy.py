"""What a report must not say: who made it, and on which machine of how many.

A report is made of facts that are asked for one by one (versions, a card's name, times) and of what programs printed.
The latter may hold paths, and with them names. So every text goes through here on its way to the disk.
"""

from __future__ import annotations

import getpass
import math
import os
import platform
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

# A path keeps its last part, an installed file what follows site-packages.
PACKAGES = re.compile(r"(?<![\w.])(?:~|/)[^\s'\":,;()<>\[\]|]*?/(?:site|dist)-packages/")
PATH = re.compile(
    r"(?<![\w./*+-])(?:~\w*|(?:file://)?/[^\s/'\":,;()<>\[\]|]+)(?:/[^\s/'\":,;()<>\[\]|]+)*/([^\s/'\":,;()<>\[\]|]+)/?"
)
BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
PATTERNS = (
    (re.compile(r"\b(?:GPU-|MIG-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.I), "(uuid)"),
    (re.compile(r"\b(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", re.I), "(bus)"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"), "(address)"),
    (re.compile(rf"(?<![\d.])(?:{BYTE}\.){{3}}{BYTE}(?![\d.])"), "(address)"),
    (re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", re.I), "(address)"),
)


def names() -> list[tuple[str, str]]:
    """Texts that say who or where, and what is said instead; the longest first."""
    folders = [(folder, "(folder)") for folder in (str(Path.home()), os.getcwd()) if len(folder) > 1]
    people = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")} | {Path.home().name}
    with suppress(OSError, KeyError):  # a user without a name
        people.add(getpass.getuser())
    hosts = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")}
    hosts |= {host.split(".")[0] for host in hosts}
    told = folders + [(host, "(host)") for host in hosts] + [(person, "(user)") for person in people]
    return sorted(((name, instead) for name, instead in told if name), key=lambda pair: -len(pair[0]))


def anonymous(text: str) -> str:
    """A text without paths, addresses, identifiers of devices, and the names of user and machine."""
    known = names()
    text = PACKAGES.sub("", text)
    for name, instead in known:
        if instead == "(folder)":
            text = text.replace(name, instead)
    text = PATH.sub(r"\1", text)
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    for name, instead in known:
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def cleaned(value: Any) -> Any:
    """The same of every text in lists and dicts; numbers that JSON does not know as texts. Keys are our own words."""
    if isinstance(value, str):
        return anonymous(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return value

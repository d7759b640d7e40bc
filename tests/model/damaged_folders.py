"""Model folders, damaged at random, loaded in a process of their own: how often each ending comes, and what is wrong.

    python -m tests.model.damaged_folders FOLDER COUNT

FOLDER holds a good model, and copies of it are damaged beside it. No more memory is allowed than loading the good one
takes and some. Prints a JSON object per ending that is not one of: loaded with the weights of the good one; refused by
one FileNotFoundError or ValueError of one line that begins with the folder. Last, an object of counts.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twotower_kernels import TwoTowerModel
from twotower_kernels.cli import info
from twotower_kernels.reference.model import TwoTower

ROOM = 2**28  # bytes, beyond what the process has when it begins
PATIENCE = 10  # seconds per load; a good one takes hundredths of one
LONGEST_LINE = 1000
INDEX = "model.safetensors.index.json"

Damage = Callable[[random.Random, Path], None]

NUMBERS = [0, -1, 1, 2, 3, 7, 10**9, 2**31 - 1, 2**31, 2**45, 2**60, 10**30, 10**400, -(10**400)]
NUMBERS += [0.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf]
OTHERS = [None, True, False, "", "x", "\n", "\ud800", "auto", "torch.float16", "é", "M" * 10**6, "E" * 10**4]
OTHERS += [[], {}, [0]]
OTHERS += [[1, 2], [[1]], [0, 10**400], [math.nan, 1], ["moe"] * 5, ["mamba"] * 10**5, {"__float__": "NaN"}]
OTHERS += [{"__float__": "Infinity"}, {"__float__": {}}]
MORE_FIELDS = ["dtype", "layer_types", "layers_block_type", "model_type", "num_hidden_layers", "moe_latent_size"]
NAMES = ["x.safetensors", "../x", "/dev/zero", "a" * 5000, "\ud800", "\n.safetensors", "", ".", None, 3, [], {}]
NAMES += ["pipe", "loop", "folder", "zero", "model.safetensors\n"]
TEXTS = ["", "{", "[]", "{}", "null", "NaN", "\x00", '{"weight_map":' + "[" * 10**5]
TEXTS += [f'{{"weight_map": {{"a": 1{"0" * 5000}}}}}', '{"weight_map": {"a": {"b": []}}}', '{"weight_map": [[]]}']
SHAPES = [[], [0], [2**62], [2**32, 2**32], [-1], [1.5], None, "x", [1] * 1000, [2**64], [[1]]]
OFFSETS = [[0, 0], [0, 2**63], [2**64, 2**64 + 8], [-8, 0], [8, 0], None, [0], [0, 8, 16], ["a", "b"], [1, 9]]
DTYPES = ["F32", "F16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "XX", "", None, 3]
KEYS = ["", "\n", "x" * 10**5, "__metadata__", "\ud800", "../x", "mtp.x", "backbone.x", "model.x", "a\nb"]


def config(chance: random.Random, folder: Path) -> None:
    """Fields of any kind of value."""
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        fields[chance.choice([*fields, *MORE_FIELDS])] = chance.choice(chance.choice([NUMBERS, OTHERS]))
    path.write_text(json.dumps(fields), encoding="utf-8")


def some_bytes(chance: random.Random, folder: Path) -> None:
    """Bytes of the config or of the header, changed, removed or added."""
    path = folder / chance.choice(["config.json", "model.safetensors"])
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 5])):
        end = len(content) if path.suffix == ".json" else 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        start, length = chance.randrange(end), chance.randrange(1, 9)
        content[start : start + chance.choice([0, length])] = chance.randbytes(chance.choice([0, length]))
    path.write_bytes(content)


def header(chance: random.Random, folder: Path) -> None:
    """The header of the weights, as another one would write it."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    key = chance.choice([key for key in entries if key != "__metadata__"])
    entry, twice = entries[key], ""
    change = chance.randrange(8)
    if change < 3:
        fields = {"dtype": DTYPES, "shape": [*SHAPES, entry["shape"][::-1]], "data_offsets": OFFSETS}
        field, values = list(fields.items())[change]
        entry[field] = chance.choice(values)
    elif change == 3:
        entries[chance.choice([*KEYS, f"{key}\n", key.replace("0", "00", 1)])] = entries.pop(key)
    elif change == 4:
        del entries[key]
    elif change == 5:
        entries[chance.choice([key, "__metadata__"])] = chance.choice([None, [], {}, 1, "x", {"a": 1}])
    elif change == 6:
        entries[f"{key}2"] = dict(entry)
    else:
        twice = f", {json.dumps(key)}: {json.dumps(entry)}"
    text = (json.dumps(entries)[:-1] + twice + "}").encode("utf-8")
    said = len(text) if chance.random() < 0.8 else chance.choice([0, 1, 2**60, 2**64 - 1, len(text) - 1, 10**6])
    path.write_bytes(struct.pack("<Q", said) + text + content[8 + length :])


def index(chance: random.Random, folder: Path) -> None:
    """An index of the one file, wrong in one place; and names in the folder that are no files of weights."""
    content = (folder / "model.safetensors").read_bytes()
    keys = list(json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]))
    weight_map: dict[str, Any] = dict.fromkeys(keys, "model.safetensors")
    change = chance.randrange(5)
    if change == 0:
        weight_map[chance.choice(keys)] = chance.choice(NAMES)
    elif change == 1:
        weight_map = {chance.choice(KEYS): chance.choice(["model.safetensors", "gone.safetensors"])}
    elif change == 2:
        weight_map = dict.fromkeys(keys, "gone.safetensors")
    elif change == 3:
        weight_map[f"{chance.choice(keys)}\n"] = "model.safetensors"
    text = json.dumps({"weight_map": weight_map}) if change < 4 else chance.choice(TEXTS)
    (folder / INDEX).write_text(text, encoding="utf-8")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    if chance.random() < 0.2:
        (folder / "model.safetensors").unlink()


def files(chance: random.Random, folder: Path) -> None:
    """Something else in the place of a file, or less or more of it."""
    path = folder / chance.choice(["config.json", "model.safetensors"])
    change = chance.randrange(7)
    if change == 6:
        os.truncate(path, chance.choice([0, 1, 7, 8, 9, 100, 2**40]))
        return
    path.unlink()
    if change < 3:
        path.symlink_to(["/dev/zero", path.name, "gone"][change])
    elif change < 5:
        [os.mkfifo, os.mkdir][change - 3](path)


DAMAGES: list[Damage] = [config, config, config, some_bytes, header, header, index, files]


class Late(BaseException):
    """Not an Exception, which some code on the way might catch."""


def late(*_: object) -> None:
    raise Late


def wrong(load: Callable[[Path], object], folder: Path, endings: Counter[str]) -> str:
    """What is wrong with how a load ends; nothing: an empty string."""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        load(folder)
        ending, words = "loaded", ""
    except (ValueError, FileNotFoundError) as error:
        ending, text = type(error).__name__, str(error)
        good = text.startswith(str(folder)) and text.isprintable() and len(text) < LONGEST_LINE
        words = "" if good else repr(text[:LONGEST_LINE])
    except BaseException as error:
        ending, words = type(error).__name__, f"{type(error).__name__}: {str(error)[:LONGEST_LINE]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    endings[ending] += 1
    return words


def loader(kind: type[nn.Module], good: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Loads and compares: damage that is not noticed must not have mattered."""

    def load(folder: Path) -> None:
        state = kind.from_pretrained(folder).state_dict()  # type: ignore[attr-defined]
        narrow = [key for key in good if not torch.equal(good[key].to(state[key].dtype), state[key])]
        assert state.keys() == good.keys() and not narrow

    return load


def main(good: Path, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    weights = TwoTowerModel.from_pretrained(good).state_dict()
    loads = {kind.__name__: loader(kind, weights) for kind in (TwoTower, TwoTowerModel)}
    loads["info"] = info.sizes
    for load in loads.values():
        load(good)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    endings = {name: Counter[str]() for name in loads}
    for seed in range(count):
        chance, folder = random.Random(seed), good.parent / f"damaged-{seed}"
        shutil.copytree(good, folder)
        damage = DAMAGES[seed % len(DAMAGES)]
        damage(chance, folder)
        for name, load in loads.items():
            if words := wrong(load, folder, endings[name]):
                print(json.dumps({"seed": seed, "damage": damage.__name__, "load": name, "wrong": words}))
        shutil.rmtree(folder)
    print(json.dumps(endings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

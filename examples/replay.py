"""Recorded generations of other systems, replayed: `python -m examples.replay FOLDER`.

FOLDER is one system's folder, or a folder of such folders. A system's folder holds

* `cases.json`: `system`, `config` with the original's field names, `cases`: what each was generated with;
* `model.safetensors`: the weights under the original's names;
* `io.safetensors`: `case{i}.prompt` and `case{i}.sequence`, of padded prompts `case{i}.attention_mask`, too;
  `forward.input` with `forward.logits`, or for blocks of N that see what is before them `forward.block_causalN.logits`;
  `route.logits`, `.bias`, `.experts` and `.weights`.

A case agrees if all its tokens are equal, and its `nfe` if that is recorded; logits, and weights of experts, if they
differ by 1e-3 at most. The exit code is 0 if all agree, and there are any.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from examples import sdar_recorded
from examples.dream import Dream
from examples.layers import Weights, field
from examples.llada import Llada
from examples.llada2_moe import Llada2Moe
from examples.sdar import Sdar

SYSTEMS: dict[str, type[Sdar | Llada | Llada2Moe | Dream]] = {
    "sdar": Sdar,
    "llada": Llada,
    "llada2_moe": Llada2Moe,
    "dream": Dream,
}
FILES = "cases.json", "model.safetensors", "io.safetensors"
LIMIT = 1e-3


def folders(folder: Path) -> list[Path]:
    """The systems' folders in a folder, itself if it is one.

    Raises:
        ValueError: there are none.
    """
    if any((folder / name).exists() for name in FILES):
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, which is not there")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    if not found:
        raise ValueError(f"{folder}: expected {', '.join(FILES)}, or folders that hold these")
    return found


class Recording:
    """A system's folder, read and checked.

    Raises:
        ValueError: a file that is missing or damaged. NotImplementedError: a system, or a field, that is not served.
    """

    def __init__(self, folder: Path) -> None:
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: expected a file {name}, which is not there")
        try:
            document = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'cases.json'}: not JSON: {error}") from None
        if not isinstance(document, dict):
            raise ValueError(f"{folder / 'cases.json'}: expected an object, got {type(document).__name__}")
        self.config, self.cases = document.get("config"), document.get("cases", [])
        if not isinstance(self.config, dict):
            raise ValueError(f"{folder / 'cases.json'}: expected an object as config, got {self.config!r}")
        if not isinstance(self.cases, list) or not all(isinstance(case, dict) for case in self.cases):
            raise ValueError(f"{folder / 'cases.json'}: expected a list of objects as cases, got {self.cases!r}")
        self.tensors, weights = _tensors(folder / "io.safetensors"), _tensors(folder / "model.safetensors")
        self.system = document.get("system", self.config.get("model_type"))
        if self.system not in SYSTEMS:
            raise NotImplementedError(f"{folder}: expected one of {', '.join(SYSTEMS)} as system, got {self.system!r}")
        self.model: Any = SYSTEMS[self.system](self.config, Weights(weights), mask_token_id(document))

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Every case by its name, and what judges it: an empty string if it agrees, or how it differs."""
        for name in sorted(self.tensors):
            if forward := re.fullmatch(r"(forward(?:\.block_causal(\d+))?)\.logits", name):
                yield forward[1], partial(self._forward, name, forward[2])
        if any(name.startswith("route.") for name in self.tensors):
            yield "route", self._route
        for index, case in enumerate(self.cases):
            yield f"case {index}", partial(self._generation, index, case)

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"io.safetensors: expected a tensor {name}, which is not there")
        return self.tensors[name]

    def _forward(self, name: str, block_length: str | None) -> str:
        options = {} if block_length is None else {"block_length": int(block_length)}
        return _differs("logits", self.model.forward(self.tensor("forward.input"), **options), self.tensor(name))

    def _route(self) -> str:
        if not isinstance(self.model, Llada2Moe):
            raise NotImplementedError(f"route: expected no router in {self.system}, got a recorded one")
        logits = self.tensor("route.logits")
        theirs = self.tensor("route.weights"), self.tensor("route.experts")
        dense = []  # [N, E], 0 where an expert was not chosen
        for weights, experts in (self.model.route(logits, self.tensor("route.bias")), theirs):
            dense.append(torch.zeros_like(logits).scatter(1, experts.long(), weights.to(logits.dtype)))
        others = ((dense[0] != 0) != (dense[1] != 0)).any(1)
        if others.any():
            return f"{int(others.sum())} of {len(others)} tokens have other experts"
        return _differs("weights", *dense)

    def _generation(self, index: int, case: dict[str, Any]) -> str:
        model = self.model
        generate = partial(sdar_recorded.generate, model) if isinstance(model, Sdar) else model.generate
        known = inspect.signature(generate).parameters
        options = {name: value for name, value in case.items() if name in known}
        if isinstance(said := options.get("temperature"), str):  # "1.0, its draw replaced by the most likely token"
            number = re.match(r"\d+(\.\d+)?", said)
            if number is None:
                raise ValueError(f"temperature: expected a number in front, got {said!r}")
            options["temperature"] = float(number[0])
        if (padding := self.tensors.get(f"case{index}.attention_mask")) is not None:
            options["attention_mask"] = padding
        prompt, expected = self.tensor(f"case{index}.prompt"), self.tensor(f"case{index}.sequence")
        tokens, nfe = generate(prompt, **options)
        if tokens.shape != expected.shape:
            return f"expected tokens {list(expected.shape)}, got {list(tokens.shape)}"
        if not tokens.equal(expected):
            wrong = (tokens != expected).nonzero()
            return f"{len(wrong)} of {expected.numel()} tokens differ, the first at {wrong[0].tolist()}"
        if case.get("nfe") not in (None, nfe):
            return f"expected an NFE of {case['nfe']}, got {nfe}"
        return ""


def mask_token_id(document: dict[str, Any]) -> int:
    """The mask token: a field of the recording or of the configuration, or the one that its note names; where nothing
    says it, the last of the vocabulary."""
    config = document["config"]
    vocabulary = field(config, "vocab_size")
    named = re.search(r"mask token (\d+)", str(document.get("note")))
    given = [document.get("mask_token_id"), config.get("mask_token_id"), named and int(named[1])]
    return next((token for token in given if isinstance(token, int) and 0 <= token < vocabulary), vocabulary - 1)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def _differs(what: str, ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"expected {what} {list(theirs.shape)}, got {list(ours.shape)}"
    error = float((ours.double() - theirs.double()).abs().max())
    return "" if error <= LIMIT else f"{what} differ by {error:.1e}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.replay", description="Recorded generations, replayed.")
    parser.add_argument("folder", type=Path, help="a system's folder, or a folder of systems")
    folder = parser.parse_args(arguments).folder
    agreeing = total = 0
    try:
        found = folders(folder)
    except ValueError as error:
        print(f"error: {error}")
        found = []
    for system in found:
        try:
            recording = Recording(system)
        except (ValueError, NotImplementedError) as error:
            print(f"error: {error}")
            total += 1
            continue
        for name, check in recording.checks():
            try:
                problem = check()
            except Exception as error:  # one case's failure is no other's
                problem = f"{type(error).__name__}: {error}"
            print(f"{system.name}, {name}: {problem or 'agrees'}", flush=True)
            agreeing, total = agreeing + (not problem), total + 1
    print(f"{agreeing} of {total} agree")
    return 0 if agreeing == total > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())

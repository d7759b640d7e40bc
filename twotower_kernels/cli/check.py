"""`twotower check`: of a kernel of another's whether it is an op, and without one, of ours what they promise."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twotower_kernels.options.flags import integer

NAMES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(command: argparse.ArgumentParser, device: Callable[[str], str]) -> None:
    command.add_argument(
        "kernel",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="a kernel of yours, or FILE.py:FUNCTION (default: the kernels of this package)",
    )
    command.add_argument(
        "--op", metavar="OP", help="which op it is, as in twotower_kernels: block_attention, rms_norm, ..."
    )
    command.add_argument(
        "--device",
        type=device,
        default="cpu",
        metavar="NAME",
        help="where it gets its tensors: cpu (default), cuda, cuda:1",
    )
    command.add_argument(
        "--dtype",
        action="append",
        choices=NAMES,
        help="of the inputs; may be given again (default: float32, bfloat16, float16)",
    )
    command.add_argument("--examples", type=integer(1, 1_000_000), metavar="N", help="inputs to draw (default: 200)")
    command.add_argument(
        "--seed",
        type=integer(0, 2**63 - 1),
        metavar="N",
        help="another draws other inputs (default: 0)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="where the report is written, too")


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 if all held, 1 if not."""
    if args.kernel is None:
        if args.op is not None:
            raise ValueError("--op: expected a kernel, MODULE:FUNCTION, got none")
        given = {"--dtype": args.dtype, "--examples": args.examples, "--seed": args.seed, "--json": args.json}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected a kernel, MODULE:FUNCTION, got none")
        return _own(args.device)
    testing = importlib.import_module("twotower_kernels.testing")
    if args.op is None:
        raise ValueError(f"--op: expected the op that {args.kernel} is, one of {', '.join(testing.OPS)}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: expected a GPU, PyTorch sees none")
    dtypes = [NAMES[name] for name in args.dtype] if args.dtype else None
    drawn = {name: value for name, value in (("examples", args.examples), ("seed", args.seed)) if value is not None}
    options: dict[str, Any] = dict(device=args.device, dtypes=dtypes, **drawn)
    report = testing.check(args.op, found(args.kernel), **options)
    print(report)
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return 0 if report else 1


def _own(device: str) -> int:
    own_checks = importlib.import_module("twotower_kernels.cli.own_checks")
    code: int = own_checks.run(device)
    return code


def found(name: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names; the module is looked for in this folder first.

    Raises:
        ValueError: no such thing.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"expected MODULE:FUNCTION or FILE.py:FUNCTION, got {name}")
    module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
    thing = module
    for part in attribute.split("."):
        if not hasattr(thing, part):
            raise ValueError(f"{name}: {place} has no {attribute}")
        thing = getattr(thing, part)
    if not callable(thing):
        raise ValueError(f"{name}: expected a function, got {type(thing).__name__}")
    return thing


def _of_name(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and misses another
        raise ValueError(f"{name}: no such module in {os.getcwd()} or among those installed") from None


def _of_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""What a check has tried and found, to be read by people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

PROMISES = {
    "runs": "takes every input, without an exception",
    "numbers": "results within the error budget; integers, NaN and infinities exactly",
    "padding": "what lies beyond a length is not looked at: NaN there changes nothing",
    "rows": "a row's result does not depend on what other rows hold",
    "strides": "the same on tensors that are slices of larger ones, or transposed",
    "untouched": "inputs are as before, and so is what lies around them and around what is written",
    "deterministic": "the same bits when called again",
}
SHOWN = 8  # numbers of a tensor that are written out
KEPT = 64  # and in JSON


@dataclass(frozen=True)
class Failure:
    """A promise that is broken, by the smallest input that was found to break it.

    inputs: by name, on the CPU; `kernel(**failure.inputs)` does it again. got, naive, exact: the numbers at the place
    that is worst in a result; None where the failure is of another kind.
    """

    promise: str
    why: str
    inputs: Mapping[str, Any]
    dtype: str
    place: Sequence[int] | None = None
    got: float | None = None
    naive: float | None = None
    exact: float | None = None
    count: int = 0  # of the inputs tried, so many break it

    def __str__(self) -> str:
        lines = [f"{self.promise} broken by {self.count} of the inputs; the smallest found, in {self.dtype}:"]
        lines += [f"    {name} = {described(x)}" for name, x in self.inputs.items()]
        if self.got is not None:
            numbers = (("got", self.got), ("naive", self.naive), ("exact", self.exact))
            said = "   ".join(f"{name} {x:.9g}" for name, x in numbers if x is not None)
            lines.append(f"  {said}   at {self.place}")
        return "\n".join([*lines, *(f"  {line}" for line in self.why.splitlines())])


@dataclass(frozen=True)
class Report:
    """What `check` returns: true if something was tried and all of it held.

    examples: inputs drawn. cases: those of the specification's `CASES` that the kernel takes. held: for each promise,
    of how many inputs it was asked without being broken. tried: for each argument, how many inputs gave it a value that
    is not its default. not_tried: the op's arguments that the kernel does not take. refused: what the kernel said of
    inputs that it does not serve, and of how many. batch_invariant: whether a row had the same bits alone as among
    others; nothing asks that of a kernel. None: no such input.
    """

    op: str
    kernel: str
    device: str
    dtypes: tuple[str, ...]
    examples: int
    cases: int
    held: Mapping[str, int]
    failures: Sequence[Failure] = ()
    tried: Mapping[str, int] = field(default_factory=dict)
    not_tried: Sequence[str] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    batch_invariant: bool | None = None

    def __bool__(self) -> bool:
        return not self.failures and self.held.get("numbers", 0) > 0

    def __str__(self) -> str:
        verdict = "all held" if self else "nothing was tried" if not self.failures else "BROKEN"
        lines = [f"{self.op}, {self.kernel} on {self.device}: {verdict}"]
        lines.append(
            f"{self.examples} inputs drawn in {', '.join(self.dtypes)}; {self.cases} of the specification's cases"
        )
        broken = {failure.promise: failure for failure in self.failures}
        for promise, meaning in PROMISES.items():
            held = self.held.get(promise, 0)
            said = f"held {held}" if held else "not asked"
            said = f"BROKEN by {broken[promise].count}" if promise in broken else said
            lines.append(f"  {promise:<14}{said:<14}{meaning}")
        if self.batch_invariant is not None:
            said = "yes" if self.batch_invariant else "no, as it may be"
            lines.append(f"  the same bits of a row alone and in a batch: {said}")
        if self.tried:
            lines.append("tried: " + ", ".join(f"{name} {count}" for name, count in self.tried.items()))
        if self.not_tried:
            lines.append(f"not tried, as the kernel does not take it: {', '.join(self.not_tried)}")
        lines += [f"refused {count}: {what}" for what, count in self.refused.items()]
        return "\n".join([*lines, *(f"\n{failure}" for failure in self.failures)])

    def to_json(self) -> str:
        """Everything as JSON; of tensors their shape, dtype and, of small ones, numbers."""
        facts = {name: value for name, value in vars(self).items() if name != "failures"}
        facts["ok"] = bool(self)
        facts["failures"] = [
            vars(f) | {"inputs": {name: _as_json(x) for name, x in f.inputs.items()}} for f in self.failures
        ]
        return json.dumps(facts, indent=1, default=str)


def described(value: Any) -> str:
    """A value in a line."""
    if not isinstance(value, Tensor):
        return repr(value)
    kind = f"{_dtype(value)} {list(value.shape)}"
    kind += "" if value.is_contiguous() else f", strides {list(value.stride())}"
    return f"{kind} {value.tolist()}" if 0 < value.numel() <= SHOWN else kind


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        facts = {"dtype": _dtype(value), "shape": list(value.shape)}
        return facts | ({"values": value.tolist()} if value.numel() <= KEPT else {})
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

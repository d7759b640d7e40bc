"""A GPU for machines that have none, so that what measures one runs: the CPU answers when "cuda" is asked for.

Inside, `device="cuda"` means the CPU, PyTorch says that a GPU is there, events read the clock, and a recorded graph is
the call itself, made again. It says nothing about a GPU; it shows that the program around it has no mistake.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from tests.gpu.test_capture import Recorder
from twotower_kernels.bench import gpu_model
from twotower_kernels.bench.baselines import peers
from twotower_kernels.bench.measure import gpu_clock, timing
from twotower_kernels.model.capture import CapturedModel


def _here(value: Any) -> Any:
    """The CPU for the GPU."""
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a name, nothing that is made there
            return func(*args, **(kwargs or {}))
        return func(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})


_generator = torch.Generator


class _Generator:
    """A class, since annotations name it."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _generator(_here(device))


class Event:
    """Reads the clock when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@contextmanager
def gpu_stand_in(memory: int = 2**30) -> Iterator[Recorder]:
    """Memory: bytes that are said to be free. Gives the recorder of all graphs."""
    record = Recorder()
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_device_name": lambda *_: "Stand-in",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(L2_cache_size=2**16, total_memory=memory),
        "mem_get_info": lambda *_: (memory, memory),
        "synchronize": lambda *_: None,
        "set_sync_debug_mode": lambda mode: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(peers, "ON_GPU", {}),  # kernels that need a real one
        mock.patch.object(timing, "on_gpu", partial(gpu_clock.on_gpu, device="cpu", record=record.of_its_own)),
        mock.patch.object(gpu_model, "CapturedModel", partial(CapturedModel, record=record)),
        _OnCpu(),
    ):
        yield record

"""The compiled kernels for another processor, run by an emulator: a module in the place of `twotower_kernels._C`.

A process under the emulator holds the module proper (serve.py). A call's tensors are copied, storage by storage, into
memory that both share, the kernel runs there on the same sizes and strides, and the storages are copied back. So every
test of a kernel judges the other processor's by the same numbers, and the process there needs Python and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import pickle
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

SHARED = 1 << 30  # bytes, of which only what is used takes memory
LINE = 64
ERRORS = {error.__name__: error for error in (ValueError, TypeError, MemoryError)}


class NoShortWay:
    """The entries of csrc/direct, which answer None where they do not serve. These never do."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class Emulated(ModuleType):
    """What `_C` is, elsewhere.

    command: the emulator with Python behind it, as a shell has it; library: the compiled module.
    """

    def __init__(self, command: str, library: str) -> None:
        super().__init__("twotower_kernels._C")
        self.__file__ = library
        self._one_at_a_time = threading.Lock()
        self.direct = NoShortWay()
        self._given = threading.local()  # what remask's arguments point into: they come as an address
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the process has it as long as this one)
        file.truncate(SHARED)
        self._memory = mmap.mmap(file.fileno(), SHARED)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        number = file.fileno()
        serve = str(Path(__file__).with_name("serve.py"))
        self._process = subprocess.Popen(
            [*shlex.split(command), "-S", serve, library, str(number), str(SHARED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[number],
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python asks of every module
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def set_torch(self, tensor: Any, parameter: Any, dtypes: tuple[torch.dtype, ...], *rest: Any) -> None:
        """PyTorch stays here: there, a dtype is its number."""
        self._codes = {dtype: code for code, dtype in enumerate(dtypes)}

    def is_recording(self) -> bool:
        return False

    def remask(self, address: int, size: int, owner: Any = None) -> None:
        fields = getattr(self._given, "fields", None)
        if fields is None or ctypes.addressof(fields) != address or ctypes.sizeof(fields) != size:
            return self._call("remask", (address, size))
        self._given.fields = None
        pointers = [(getattr(type(fields), name).offset, tensor) for name, tensor in fields.tensors.items()]
        return self._call("remask", (bytes(fields), *(part for pointer in pointers for part in pointer)))

    def know_remask(self) -> None:
        """From now on the arguments of `remask` are remembered where they are made."""
        remask = importlib.import_module("twotower_kernels.ops.remask")  # the package has a function of this name

        def remembered(*arguments: Any, make: Any = remask.filled) -> Any:
            self._given.fields = make(*arguments)
            return self._given.fields

        patch.object(remask, "filled", remembered).start()

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        with self._one_at_a_time:
            placed: dict[int, tuple[int, torch.UntypedStorage]] = {}  # by address: place in the shared memory
            end = 0

            def place(tensor: Tensor) -> int:
                nonlocal end
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in placed:
                    begin = -(-end // LINE) * LINE + storage.data_ptr() % LINE
                    end = begin + storage.nbytes()
                    if end > SHARED:
                        raise MemoryError(f"{name}: the tensors do not fit in the {SHARED} bytes of shared memory")
                    ctypes.memmove(self._address + begin, storage.data_ptr(), storage.nbytes())
                    placed[storage.data_ptr()] = begin, storage
                return placed[storage.data_ptr()][0] + tensor.storage_offset() * tensor.element_size()

            def sent(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                if x.dtype not in self._codes:
                    raise ValueError(f"expected a dtype that the kernels know, got {x.dtype}")
                return (
                    "tensor",
                    place(x) if x.numel() else None,
                    self._codes[x.dtype],
                    x.element_size(),
                    tuple(x.shape),
                    x.stride(),
                )

            answer = self._ask(name, [sent(x) for x in arguments])
            for begin, storage in placed.values():
                ctypes.memmove(storage.data_ptr(), self._address + begin, storage.nbytes())
            return answer

    def _ask(self, name: str, arguments: list[Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((name, torch.get_num_threads(), arguments), self._process.stdin)
            self._process.stdin.flush()
            error, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as gone:
            raise RuntimeError(f"{name}: the emulator ended with {self._process.wait()}") from gone
        if error:
            raise ERRORS.get(error, RuntimeError)(answer)
        return answer

"""Calls kernels for another process (emulated.py), with nothing but Python: under an emulator there is no PyTorch.

    python -S serve.py LIBRARY DESCRIPTOR BYTES

Tensors lie in shared memory, the file of this descriptor. What comes in are calls, (name, threads, arguments), and what
goes out (name of an error or None, result or message), both pickled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import pickle
import sys
from typing import Any

WORDS = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Tensor:
    """As much of PyTorch's as the kernels ask for (csrc/tensors.h)."""

    def __init__(self, memory: Any, base: int, at: int | None, code: int, size: int, shape: Any, strides: Any) -> None:
        self.dtype, self.shape = DTYPES[code], shape
        self._memory, self._base, self._at = memory, base, at
        self._code, self._size, self._strides = code, size, strides

    def data_ptr(self) -> int:
        return 0 if self._at is None else self._base + self._at

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def contiguous(self) -> Tensor:
        words = self._memory[self._at :][: (len(self._memory) - self._at) // self._size * self._size]
        numbers = _rows(words.cast(WORDS[self._size]), 0, self.shape, self._strides)
        copy = memoryview(bytearray(numbers))
        strides = [1]
        for length in self.shape[:0:-1]:
            strides.insert(0, strides[0] * length)
        base = ctypes.addressof(ctypes.c_char.from_buffer(copy))
        return Tensor(copy, base, 0, self._code, self._size, self.shape, tuple(strides))


def _rows(words: memoryview, at: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    if len(shape) > 1:
        return b"".join(_rows(words, at + i * strides[0], shape[1:], strides[1:]) for i in range(shape[0]))
    step = strides[0]
    if step == 0:
        return words[at : at + 1].tobytes() * shape[0]
    return words[at : at + (shape[0] - 1) * step + 1 : step].tobytes()


DTYPES = tuple(f"dtype {code}" for code in range(10))


def main(library: str, descriptor: int, size: int) -> None:
    threads = ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # the kernels look for it by name
    spec = importlib.util.spec_from_file_location("twotower_kernels._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_torch(Tensor, None, DTYPES, None, (), None, None, {})
    shared = mmap.mmap(descriptor, size)
    memory = memoryview(shared)
    base = ctypes.addressof(ctypes.c_char.from_buffer(shared))

    def received(x: Any) -> Any:
        return Tensor(memory, base, *x[1:]) if type(x) is tuple and x[:1] == ("tensor",) else x

    def remask(fields: Any, *rest: Any) -> None:
        if isinstance(fields, bytes):
            struct = ctypes.create_string_buffer(fields, len(fields))
            for offset, tensor in zip(rest[::2], rest[1::2], strict=True):
                ctypes.c_void_p.from_buffer(struct, offset).value = tensor.data_ptr()
            fields, rest = ctypes.addressof(struct), (len(fields),)
        module.remask(fields, *rest)

    while True:
        try:
            name, count, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        threads.omp_set_num_threads(count)
        try:
            call = remask if name == "remask" else getattr(module, name)
            answer = None, call(*[received(x) for x in arguments])
        except Exception as error:
            answer = type(error).__name__, str(error)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""NVRTC of any version, by its C interface alone: is a kernel's source understood by the compiler that others have?"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from twotower_kernels import cuda


class Nvrtc:
    """One library, for instance nvidia/cu13/lib/libnvrtc.so.13 of NVIDIA's wheel. (NVRTC documentation, chapter 3.)"""

    def __init__(self, library: Path) -> None:
        for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by name alone
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, f"nvrtc{name}")(*arguments)
        if status:
            raise RuntimeError(f"nvrtc{name} of {self._library._name}: error {status}")

    def compile(self, source: str, defines: Sequence[tuple[str, str]], arch: str) -> int:
        """Bytes of the cubin of csrc/cuda/`source`.cu for "sm_90a" and the like.

        Raises:
            RuntimeError: the compiler refuses; its log is in the message.
        """
        path = cuda.folder() / f"{source}.cu"
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("CreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
        options = [f"-arch={arch}", "-std=c++17", f"-I{cuda.folder()}", *(f"-D{k}={v}" for k, v in defines)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self._call("CompileProgram", program, len(options), encoded)
            self._call("GetCUBINSize", program, ctypes.byref(size))
        except RuntimeError as error:
            self._call("GetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("GetProgramLog", program, log)
            raise RuntimeError(f"{path.name} for {arch} with NVRTC {self.version}: {log.value.decode()}") from error
        finally:
            self._call("DestroyProgram", ctypes.byref(program))
        return size.value

"""The machine from Python: device memory as NumPy arrays, and the reports of errors."""

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
WRITTEN = 1  # state of a byte of device memory

_POINTER, _SIZE, _INT, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "load": (_TEXT, [_TEXT, _TEXT]),
    "unload": (None, [_TEXT]),
    "select": (None, [_TEXT]),
    "lenient": (None, [_INT]),
    "truncate": (None, [_INT]),
    "seed": (None, [ctypes.c_uint64]),
    "allocate": (_POINTER, [_SIZE]),
    "adopt": (None, [_POINTER, _SIZE]),
    "release": (None, [_POINTER]),
    "mark": (None, [_POINTER, _SIZE, _INT]),
    "reports": (_TEXT, []),
    "coverage": (_TEXT, []),
    "tensor_map": (_INT, [_POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT]),
    "launch": (_INT, [_TEXT, _POINTER, ctypes.c_uint32, _SIZE, _POINTER]),
    "parameters": (_INT, [_TEXT]),
    "parameter_bytes": (_INT, [_TEXT, _INT]),
}


class Machine:
    """One shared library: its state is the process's, so that tests run one after the other."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.library, f"machine_{name}")
            function.restype, function.argtypes = result, arguments
        self._memory: list[int] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A function of the interface, as interface.cpp has it."""
        if name not in _FUNCTIONS:
            raise AttributeError(name)
        function: Callable[..., Any] = getattr(self.library, f"machine_{name}")
        return function

    def load_files(self, code: str, paths: Iterable[Path]) -> None:
        """PTX for `code`: an architecture, or the name of a variant."""
        for path in paths:
            error = self.load(code.encode(), str(path).encode())
            assert error is None, error.decode()

    def room(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> tuple[Array, int]:
        """Device memory that holds nothing yet, and its address."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = int(self.allocate(size))
        self._memory.append(address)
        if size == 0:
            return np.empty(shape, dtype), address
        bytes_there = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return bytes_there.view(dtype).reshape(shape), address

    def put(self, array: Array) -> int:
        """The address of a copy in device memory."""
        array = np.ascontiguousarray(array)
        there, address = self.room(array.shape, array.dtype)
        there[...] = array
        self.mark(address, array.nbytes, WRITTEN)
        return address

    def free(self) -> None:
        """All device memory of `room` and `put`."""
        for address in self._memory:
            self.release(address)
        self._memory.clear()

    def take_reports(self) -> list[str]:
        """Everything that was wrong since the last call, each kind once."""
        lines: list[str] = self.reports().decode().splitlines()
        return lines

    def executed(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """Of each (file, kernel) launched so far: launches, instructions executed, and in all."""
        found = {}
        for line in self.coverage().decode().splitlines():
            file, rest = line.split(" ", 1)
            kernel, *numbers = rest.rsplit(" ", 3)
            found[file, kernel] = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
        return found

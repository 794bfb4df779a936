"""The kernels as a plain shared library, called on torch tensors: for tests, benchmarks and experiments.

No TVM is in the process; a kernel runs on the calling thread unless the library is given a parallel launcher.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from hikui.backends.kernels.build import build, compiler
from hikui.backends.kernels.symbols import SYMBOLS
from hikui.lowering.errors import HikuiError

_INT, _FLOAT, _DLTENSOR = 1, 3, 7
DTYPES = {
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Value(ctypes.Union):
    _fields_ = (("as_int", ctypes.c_int64), ("as_float", ctypes.c_double), ("as_pointer", ctypes.c_void_p))


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


Argument = torch.Tensor | float | int


class Call:
    """The arguments of a call in C form, for calls that repeat; it keeps its tensors alive."""

    def __init__(self, *arguments: Argument) -> None:
        self._keep: list[object] = [arguments]
        self._tensors: dict[int, _Tensor] = {}
        self.count = len(arguments)
        self.values = (_Any * self.count)()
        for index, (value, argument) in enumerate(zip(self.values, arguments, strict=True)):
            if isinstance(argument, torch.Tensor):
                value.type_index = _DLTENSOR
                tensor = self._tensors[index] = self._describe(argument)
                value.value.as_pointer = ctypes.addressof(tensor)
            elif isinstance(argument, float):
                value.type_index = _FLOAT
                value.value.as_float = argument
            else:
                value.type_index = _INT
                value.value.as_int = argument

    def reshape(self, argument: int, axis: int, size: int) -> None:
        """Lets a tensor claim another size than it has, for calls that must be refused."""
        self._tensors[argument].shape[axis] = size
        self._tensors[argument].strides = None

    def _describe(self, tensor: torch.Tensor) -> _Tensor:
        code, bits = DTYPES[tensor.dtype]
        dimensions = ctypes.c_int64 * tensor.dim()
        shape, strides = dimensions(*tensor.shape), dimensions(*tensor.stride())
        pointer = ctypes.POINTER(ctypes.c_int64)
        described = _Tensor(data=tensor.data_ptr(), device_type=1, ndim=tensor.dim(), code=code, bits=bits, lanes=1)
        described.shape, described.strides = ctypes.cast(shape, pointer), ctypes.cast(strides, pointer)
        self._keep += [shape, strides, described]
        return described


class Library:
    """A shared library of kernels.

    Args:
        path: as `link` made it.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.hikui_kernels_last_error.restype = ctypes.c_char_p
        self._library.hikui_kernels_isa.restype = ctypes.c_char_p
        self._library.hikui_kernels_describe.restype = ctypes.c_char_p
        self._functions = {name: getattr(self._library, f"__tvm_ffi_{name}") for name in SYMBOLS}

    def run(self, symbol: str, call: Call) -> None:
        """Calls a public function.

        Raises:
            HikuiError: the function refuses its arguments; the sentence is the kernel library's own.
        """
        result = _Any()
        if self._functions[symbol](None, ctypes.byref(call.values), ctypes.c_int32(call.count), ctypes.byref(result)):
            raise HikuiError(self._last_error())

    def __call__(self, symbol: str, *arguments: Argument) -> None:
        self.run(symbol, Call(*arguments))

    def isa(self) -> str:
        """The instruction set in use.

        Raises:
            HikuiError: none fits, or HIKUI_ISA asks for one that is not there.
        """
        name = self._library.hikui_kernels_isa()
        if name is None:
            raise HikuiError(self._last_error())
        return str(name.decode())

    def describe(self) -> dict[tuple[str, str], str]:
        """The kernel that serves each format and size class (`single`, `few`, `many`) on this CPU.

        Raises:
            HikuiError: as `isa`.
        """
        text = self._library.hikui_kernels_describe()
        if text is None:
            raise HikuiError(self._last_error())
        rows = (line.split(" ", 2) for line in text.decode().splitlines())
        return {(kind, size): kernel for kind, size, kernel in rows}

    def set_launch(self, address: int | None) -> None:
        """Gives the address of a function with the signature of TVMBackendParallelLaunch, or None for one thread."""
        self._library.hikui_kernels_set_launch(ctypes.c_void_p(address))

    def _last_error(self) -> str:
        return str(self._library.hikui_kernels_last_error().decode())


def link(triple: str, isas: Sequence[str], path: Path) -> Path:
    """Builds the kernels and links them into a shared library.

    Args:
        triple: as in `build`.
        isas: as in `build`.
        path: the library to write; its folder also receives the objects.
    """
    objects = build(triple, isas, path.parent / "objects")
    subprocess.run([*compiler(triple), "-shared", "-Wl,-z,defs", *map(str, objects.paths), "-o", str(path)], check=True)
    return path

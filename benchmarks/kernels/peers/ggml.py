"""llama.cpp's products, from the ggml libraries that the PyPI package llama-cpp-python brings.

Called through their C interface. Where a type has one, the weights go into the CPU backend's extra buffer type that
rearranges them for its fast kernels, as llama.cpp itself would have it.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernels.contestant import Prepared, Step, UnavailableError, Workload, activations

_TYPES = {"q8_0": 8, "q4_0": 2, "q4_K": 12, "q3_K": 11, "q2_K": 10, "tq2_0": 35, "tq1_0": 34, "iq1_s": 19, "q1_0": 41}
"""ggml.h's `enum ggml_type`; each number is checked against the name that the library gives it."""

_FLOAT32 = 0
_USAGE_WEIGHTS = 1
_QUANTISED_ROWS = 16
"""Rows that are really quantised, then repeated: quantising a matrix to 1 bit takes minutes."""


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TensorHead(ctypes.Structure):
    """The first members of `struct ggml_tensor`."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p))


_POINTER, _SIZE, _INT, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_BASE = {
    "ggml_init": (_POINTER, [_InitParameters]),
    "ggml_log_set": (None, [_POINTER, _POINTER]),
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _INT64, _INT64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_row_size": (_SIZE, [_INT, _INT64]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "ggml_backend_buft_alloc_buffer": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_buft_get_alloc_size": (_SIZE, [_POINTER, _POINTER]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_buffer_get_base": (_POINTER, [_POINTER]),
    "ggml_backend_buffer_set_usage": (None, [_POINTER, _INT]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_alloc": (_INT, [_POINTER, _POINTER, _POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER, _POINTER]),
    "ggml_backend_reg_dev_get": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
    "ggml_backend_get_default_buffer_type": (_POINTER, [_POINTER]),
}
_CPU = {
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_reg": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
}


class _Library:
    """The functions of both shared libraries as attributes, and one CPU backend."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            raise UnavailableError("llama-cpp-python is not installed (pip install llama-cpp-python).")
        folder = Path(found.origin).parent / "lib"
        for file, functions in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        # Without this every rearranged tensor is told of on stderr.
        self._quiet = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)(lambda level, text, data: None)
        self("ggml_log_set", self._quiet, None)
        self.backend = self("ggml_backend_cpu_init")
        registry = self("ggml_backend_cpu_reg")
        self.device = self("ggml_backend_reg_dev_get", registry, 0)
        self.plain = self("ggml_backend_get_default_buffer_type", self.backend)
        address = self("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        self.extra: list[int] = []
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(self.device)
            while value := listed[len(self.extra)]:
                self.extra.append(value)

    def __call__(self, function: str, *arguments: object) -> "int":
        return getattr(self, function)(*arguments)  # type: ignore[no-any-return]


@cache
def _library() -> _Library:
    return _Library()


@dataclass(frozen=True)
class MatMul:
    """`ggml_mul_mat` with weights of one type.

    Attributes:
        kind: the library's name of the type.
    """

    kind: str
    ours: bool = False

    @property
    def name(self) -> str:
        return f"ggml_{self.kind}"

    def prepare(self, workload: Workload) -> Prepared:
        ggml, kind = _library(), _TYPES[self.kind]
        if ctypes.string_at(ggml("ggml_type_name", kind) or b"?").decode() != self.kind:
            raise UnavailableError(f"this llama-cpp-python has no type {self.kind}")
        row = ggml("ggml_row_size", kind, workload.k)
        nbytes = row * workload.n
        few = _quantised(kind, workload.k)
        packed = np.tile(few, (-(-workload.n // _QUANTISED_ROWS), 1))[: workload.n]
        copies = workload.copies(nbytes)
        chunks = workload.chunks(copies)
        owner = _Owner(
            ggml, 2 * copies + 1, sum(ggml("ggml_graph_overhead_custom", _graph_size(c), False) for c in chunks)
        )
        x = ggml("ggml_new_tensor_2d", owner.context, _FLOAT32, workload.k, workload.m)
        owner.place(x, ggml.plain)
        values = activations(workload)
        ggml("ggml_backend_tensor_set", x, values.ctypes.data, 0, values.nbytes)
        buffer_type, output = None, None
        steps: list[Step] = []
        node = 0
        for count in chunks:
            graph = ggml("ggml_new_graph_custom", owner.context, _graph_size(count), False)
            for _ in range(count):
                weight = ggml("ggml_new_tensor_2d", owner.context, kind, workload.k, workload.n)
                node = ggml("ggml_mul_mat", owner.context, weight, x)
                buffer_type = buffer_type or owner.fastest(weight, node)
                buffer = owner.place(weight, buffer_type)
                ggml("ggml_backend_buffer_set_usage", buffer, _USAGE_WEIGHTS)
                ggml("ggml_backend_tensor_set", weight, packed.ctypes.data, 0, nbytes)
                if output is None:
                    output = owner.place(node, ggml.plain)
                else:
                    ggml("ggml_backend_tensor_alloc", output, node, ggml("ggml_backend_buffer_get_base", output))
                ggml("ggml_build_forward_expand", graph, node)
            steps.append(_Compute(owner, graph, workload.threads))

        def result() -> NDArray[np.float32]:
            y = np.empty((workload.m, workload.n), np.float32)
            ggml("ggml_backend_tensor_get", node, y.ctypes.data, 0, y.nbytes)
            return y

        return Prepared(steps, copies // len(steps), nbytes, 8 * row / workload.k, result=result)


@cache
def _quantised(kind: int, k: int) -> NDArray[np.uint8]:
    """Rows in a type's own form: uint8 [_QUANTISED_ROWS, bytes of a row]."""
    ggml = _library()
    values = np.random.default_rng(1).standard_normal((_QUANTISED_ROWS, k), np.float32) / 64
    importance = np.ones(k, np.float32)
    packed = np.empty((_QUANTISED_ROWS, ggml("ggml_row_size", kind, k)), np.uint8)
    addresses = [array.ctypes.data for array in (values, packed, importance)]
    ggml("ggml_quantize_chunk", kind, *addresses[:2], 0, _QUANTISED_ROWS, k, addresses[2])
    return packed


class _Owner:
    """A context and the buffers of its tensors, freed together."""

    def __init__(self, ggml: _Library, tensors: int, graph_bytes: int) -> None:
        self.ggml = ggml
        size = ggml("ggml_tensor_overhead") * tensors + graph_bytes
        self.context = ggml("ggml_init", _InitParameters(size, None, True))
        self._buffers: list[int] = []

    def fastest(self, weight: int, node: int) -> int:
        """The first extra buffer type in which the device can compute this node, else the plain one."""
        for candidate in self.ggml.extra:
            head = ctypes.cast(weight, ctypes.POINTER(_TensorHead)).contents
            head.buffer = probe = self.ggml("ggml_backend_buft_alloc_buffer", candidate, 0)
            takes = self.ggml("ggml_backend_dev_supports_op", self.ggml.device, node)
            head.buffer = None
            self.ggml("ggml_backend_buffer_free", probe)
            if takes:
                return candidate
        return self.ggml.plain

    def place(self, tensor: int, buffer_type: int) -> int:
        """Gives a tensor a buffer of its own and returns that."""
        size = self.ggml("ggml_backend_buft_get_alloc_size", buffer_type, tensor)
        buffer = self.ggml("ggml_backend_buft_alloc_buffer", buffer_type, size)
        self._buffers.append(buffer)
        base = self.ggml("ggml_backend_buffer_get_base", buffer)
        if self.ggml("ggml_backend_tensor_alloc", buffer, tensor, base):
            raise UnavailableError("ggml takes no memory for the tensor")
        return buffer

    def __del__(self) -> None:
        for buffer in self._buffers:
            self.ggml("ggml_backend_buffer_free", buffer)
        self.ggml("ggml_free", self.context)


class _Compute:
    """Computes a graph; keeps what it reads alive."""

    def __init__(self, owner: _Owner, graph: int, threads: int) -> None:
        self._owner = owner
        ggml = owner.ggml
        ggml("ggml_backend_cpu_set_n_threads", ggml.backend, threads)
        self._run = partial(ggml, "ggml_backend_graph_compute", ggml.backend, graph)

    def __call__(self) -> None:
        self._run()


def _graph_size(products: int) -> int:
    """A graph counts its leaves, weights and input, against its size."""
    return products + 1


def contestants() -> Sequence[MatMul]:
    """Every type that the issue of low bits is about."""
    _library()
    return [MatMul(kind) for kind in _TYPES]

"""cuBLAS's float16 product, for comparison, by ctypes."""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_uint64, c_void_p

from benchmarks.cuda.driver import Device, Memory
from hikui.lowering.errors import HikuiError

_NAMES = ("libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so")
_TRANSPOSED, _PLAIN = 1, 0
_FLOAT16, _COMPUTE_FLOAT32, _DEFAULT = 2, 68, -1


def product(device: Device) -> Callable[[Memory, Memory, Memory], None] | None:
    """A function (weight [N, K], x [K], y [N]) that puts y = W x on the device's stream; None without cuBLAS."""
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    handle = c_void_p()
    if library.cublasCreate_v2(byref(handle)) or library.cublasSetStream_v2(handle, device.stream):
        raise HikuiError(f"{name} is here but does not start.")
    one, zero = c_float(1), c_float(0)

    def run(weight: Memory, x: Memory, y: Memory) -> None:
        n, k = weight.tensor.shape
        # Column by column, as cuBLAS reads it, the stored matrix is Wᵀ.
        matrices = (
            (c_uint64(weight.address), c_int(_FLOAT16), c_int(k)),
            (c_uint64(x.address), c_int(_FLOAT16), c_int(k)),
            (c_uint64(y.address), c_int(_FLOAT16), c_int(n)),
        )
        status = library.cublasGemmEx(
            handle, c_int(_TRANSPOSED), c_int(_PLAIN), c_int(n), c_int(1), c_int(k),
            byref(one), *matrices[0], *matrices[1], byref(zero), *matrices[2], c_int(_COMPUTE_FLOAT32), c_int(_DEFAULT),
        )  # fmt: skip
        if status:
            raise HikuiError(f"cublasGemmEx fails with status {status}.")

    return run

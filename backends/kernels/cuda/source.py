"""From TIR to CUDA C++."""

from collections.abc import Iterable

import tvm

from hikui.backends.kernels.compile import lower_functions
from hikui.backends.kernels.cuda.kernels import makers

# Which architecture is named here does not change the text: nvcc is told the architectures.
_TARGET = {"kind": "cuda", "arch": "sm_75", "max_threads_per_block": 1024, "thread_warp_size": 32}


def generate(symbols: Iterable[str] | None = None) -> str:
    """CUDA C++ of kernels, each an `extern "C" __global__` function that takes pointers and then int32 sizes.

    Args:
        symbols: of `makers`; every kernel if None.
    """
    table = makers()
    functions = {name: table[name](name) for name in (table if symbols is None else symbols)}
    target = tvm.target.Target(_TARGET)
    module = lower_functions(functions, target)
    return str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source())

"""The low-bit kernels, shared by the backends: TIR over ISA building blocks, compiled to objects with a C ABI.

`build` gives the object files of one triple: those of the kernels that are wanted, one each, and the dispatcher, which
defines the public symbols of docs/architecture.md. They link into a TVM module, a custom-op library or a plain shared
library alike; `kernels.h` is their interface.
"""

from hikui.backends.kernels.build import HEADER, KernelObjects, build, compiler
from hikui.backends.kernels.symbols import SYMBOLS, kept

__all__ = ["HEADER", "SYMBOLS", "KernelObjects", "build", "compiler", "kept"]

"""The low-bit kernels, shared by the backends: TIR over ISA building blocks, compiled to objects with a C ABI.

`build` gives the object files of one triple: one an instruction set and the dispatcher, which defines the public
symbols of docs/architecture.md. They link into a TVM module, a custom-op library or a plain shared library alike;
`kernels.h` is their interface.
"""

from hikui.backends.kernels.build import HEADER, SYMBOLS, KernelObjects, build, compiler

__all__ = ["HEADER", "SYMBOLS", "KernelObjects", "build", "compiler"]

"""The low-bit products for NVIDIA GPUs: TIR with thread bindings, on the packed layout of the CPU kernels.

`kernels` is the table of what there is, `source` lowers it to CUDA C++, `build` compiles that to one fatbin, `launch`
says how each kernel is started. Nothing here needs a GPU; benchmarks/cuda checks and times where there is one.
"""

from hikui.backends.kernels.cuda.build import ARCHITECTURES, build_fatbin

__all__ = ["ARCHITECTURES", "build_fatbin"]

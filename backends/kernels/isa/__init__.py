"""The instruction sets that kernels are compiled for."""

from hikui.backends.kernels.isa import avx2, avx512vnni, dotprod, generic, i8mm, neon
from hikui.backends.kernels.isa.base import Isa

ISAS: dict[str, Isa] = {module.ISA.name: module.ISA for module in (generic, avx2, avx512vnni, neon, dotprod, i8mm)}
"""By name; of those of one triple the better ones come later."""

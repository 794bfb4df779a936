"""What decides the last bits of float sums on this machine, for the record.

torch's own loops come in a variant for each CPU capability. Its matrix products, factorisations, roots and logarithms
come from a BLAS that takes other code for each make of CPU, and no two variants sum in the same order. So the same
inputs give the same bytes on one make of CPU, and on another what lies between two roundings may fall the other way.
`benchmarks/same_bytes.py` measures what the BLAS's switch for equal results costs, and what it leaves unequal.
"""

import os
import platform
import re
from pathlib import Path

import torch

_SWITCHES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE")
"""Environment variables that choose other code for the same sums."""


def arithmetic() -> dict[str, str]:
    """BLAS, make of CPU, torch's vector code, and the switches that are set."""
    return {
        "blas": blas(torch.__config__.show()),
        "cpu": cpu_make(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in _SWITCHES if name in os.environ},
    }


def blas(configuration: str) -> str:
    """The BLAS that torch's description of its own build (`torch.__config__.show()`) names."""
    for line in configuration.splitlines():
        if "Math Kernel Library" in line:
            return line.strip(" -")
    found = re.search(r"BLAS_INFO=(\w+)", configuration)
    return found[1] if found else "unknown"


def cpu_make(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Maker and family of this machine's CPU, as Linux names them; libraries choose their code by these."""
    told: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model") if "vendor_id" in told else ("CPU implementer", "CPU part")
    return " ".join([platform.machine(), *(f"{name} {told[name]}" for name in names if name in told)])

"""CUDA kernels compiled for the host after an emulation header, and called on torch tensors."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from hikui.backends.kernels.cuda.build import cuda_source
from hikui.backends.kernels.cuda.launch import Launch

HEADER = Path(__file__).with_name("cuda_emulation.h")
FATBIN_MAGIC = (0xBA55ED50).to_bytes(4, "little")
DRIVER = Path(__file__).with_name("cuda_driver.h")

# A signature as TVM writes it: extern "C" __global__ void __launch_bounds__(256) name(int4* __restrict__ q_data, …) {
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')
_MARGIN = 256
_POISON = 0xFF
"""Bytes around a tensor: floats of them are NaN, so a read beside a tensor shows."""


@dataclass(frozen=True)
class Emulator:
    """Kernels on the host.

    Attributes:
        path: the shared library, which also stands for the CUDA driver's.
        library: the same, loaded.
    """

    path: Path
    library: ctypes.CDLL

    def run(self, launch: Launch) -> tuple[torch.Tensor, ...]:
        """Runs one kernel; gives every tensor argument after the call and checks that nothing beside them changed."""
        guarded = [_Guarded(argument) for argument in launch.arguments if isinstance(argument, torch.Tensor)]
        pointers = iter(guarded)
        values: list[ctypes._SimpleCData[int] | ctypes.c_void_p] = []
        for argument in launch.arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(next(pointers).address))
            else:
                values.append(ctypes.c_int32(argument))
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        getattr(self.library, f"emulate_{launch.symbol}")(*map(ctypes.c_uint, (*launch.grid, *launch.threads)), packed)
        return tuple(tensor.after() for tensor in guarded)


class _Guarded:
    """A copy of a tensor with poison on both sides."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._like = tensor
        self._size = tensor.numel() * tensor.element_size()
        self._bytes = torch.full((self._size + 3 * _MARGIN,), _POISON, dtype=torch.uint8)
        self._start = _MARGIN + -self._bytes.data_ptr() % _MARGIN
        self.address = self._bytes.data_ptr() + self._start
        if self._size:
            self._bytes[self._start : self._start + self._size] = tensor.contiguous().view(-1).view(torch.uint8)

    def after(self) -> torch.Tensor:
        stop = self._start + self._size
        assert (self._bytes[: self._start] == _POISON).all(), "the kernel wrote before a tensor"
        assert (self._bytes[stop:] == _POISON).all(), "the kernel wrote behind a tensor"
        return self._bytes[self._start : stop].clone().view(self._like.dtype).view(self._like.shape)


def link(source: str, directory: Path) -> Emulator:
    """Compiles CUDA C++ for the host.

    Args:
        source: as `hikui.backends.kernels.cuda.source.generate` gives it.
        directory: where files go.
    """
    # No optimisation: of so much straight code the compiler would take longer than the tests run.
    flags = ["-std=c++17", "-O0", "-fno-strict-aliasing", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
    # TVM's prelude is for nvcc; the header stands for it.
    kernels = source[source.index('extern "C" __global__') :]
    text = [f'#include "{HEADER}"', "using uint = unsigned; using uchar = unsigned char;", _HALVES, kernels]
    found = _SIGNATURE.findall(kernels)
    text += [_wrapper(name, parameters) for name, parameters in found]
    text += [f'#include "{DRIVER}"', "const EmulatedKernel emulated_kernels[] = {"]
    text += [*(f'  {{"{name}", emulate_{name}}},' for name, _ in found), "  {nullptr, nullptr}};"]
    path = directory / "kernels.cpp"
    path.write_text("\n".join(text))
    library = directory / "kernels.so"
    subprocess.run(["g++", *flags, str(path), "-o", str(library)], check=True)
    return Emulator(library, ctypes.CDLL(str(library)))


_HALVES = "struct alignas(8) half4 { half x, y, z, w; };"


def _wrapper(name: str, parameters: str) -> str:
    types = [parameter.rsplit(" ", 1)[0].replace("__restrict__", "").strip() for parameter in parameters.split(",")]
    values = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(types))
    return (
        f'extern "C" void emulate_{name}(unsigned gx, unsigned gy, unsigned tx, unsigned ty, void** arguments) {{\n'
        f"  emulated::run_grid({{gx, gy, 1}}, {{tx, ty, 1}}, [&] {{ {name}({values}); }});\n}}"
    )


@cache
def _everything(directory: Path) -> Emulator:
    directory.mkdir()
    return link(cuda_source(), directory)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Every CUDA kernel on the host; built once for all modules that import this fixture."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return _everything(tmp_path_factory.getbasetemp() / "cuda")

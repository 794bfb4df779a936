"""The library that starts CUDA kernels from C, against a driver that emulates."""

import ctypes
import os
import shutil
from ctypes import c_char_p, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch
from benchmarks.cuda.driver import Device
from torch import Tensor

from hikui.backends.kernels.cuda import ARCHITECTURES, artefact, build_fatbin
from hikui.backends.kernels.cuda.artefact import LIBRARY, build_loader
from hikui.lowering.artefact import elf
from hikui.lowering.artefact.target import TARGETS, machine_triple
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, activation_k, pack, quantize_activation, quantize_activation_static, unpack

from .cuda_emulation import FATBIN_MAGIC, Emulator, emulator

__all__ = ["emulator"]


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", c_uint64),
        ("scale", c_uint64),
        *((name, c_int32) for name in ("n", "columns", "lines", "groups")),
    )


class Activation(ctypes.Structure):
    _fields_ = (("q", c_uint64), ("scale", c_uint64), ("sums", c_uint64), ("m", c_int32), ("columns", c_int32))


class Branch(ctypes.Structure):
    _fields_ = (("b", c_uint64), ("t", c_uint64), ("rank", c_int32))


class Gpu:
    """The library on an emulated GPU."""

    def __init__(self, library: ctypes.CDLL, handle: c_void_p) -> None:
        self._library, self._handle = library, handle

    def __call__(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, f"hikui_cuda_{name}")(self._handle, *arguments)
        assert status == 0, self._library.hikui_cuda_last_error().decode()

    def refuses(self, name: str, *arguments: object) -> str:
        assert getattr(self._library, f"hikui_cuda_{name}")(self._handle, *arguments) == 1
        return str(self._library.hikui_cuda_last_error().decode())

    def put(self, tensor: Tensor) -> c_uint64:
        address, size = c_uint64(), tensor.numel() * tensor.element_size()
        self("allocate", c_size_t(size), ctypes.byref(address))
        self("upload", address, c_void_p(tensor.contiguous().data_ptr()), c_size_t(size))
        return address

    def get(self, address: c_uint64, like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        self("download", c_void_p(out.data_ptr()), address, c_size_t(out.numel() * out.element_size()))
        return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("loader") / LIBRARY
    build_loader(machine_triple(), path)
    needed = elf.read_elf(path).needs
    assert not [name for name in needed if not name.startswith("GLIBC")], "the loader needs more than libc"
    loaded = ctypes.CDLL(str(path))
    loaded.hikui_cuda_open.restype = c_void_p
    loaded.hikui_cuda_last_error.restype = c_char_p
    return loaded


def drivers() -> list[str]:
    """The emulated GPU, and the real one where the machine has it."""
    try:
        Device()
    except HikuiError:
        return ["emulated"]
    return ["emulated", "libcuda.so.1"]


@pytest.fixture(params=drivers())
def gpu(request: pytest.FixtureRequest, library: ctypes.CDLL, emulator: Emulator, tmp_path: Path) -> Gpu:
    if request.param == "emulated":
        driver, fatbin = str(emulator.path), tmp_path / "fatbin"
        fatbin.write_bytes(FATBIN_MAGIC)
    else:
        driver, fatbin = request.param, build_fatbin(ARCHITECTURES, tmp_path)
    handle = library.hikui_cuda_open(os.fsencode(fatbin), os.fsencode(driver))
    assert handle, library.hikui_cuda_last_error()
    return Gpu(library, c_void_p(handle))


def near(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value.double(), expected.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int4-g64", "int3-channel", "sign-g32", "mixed-g64-c64"])
@pytest.mark.parametrize("m", [1, 3, 9])
def test_a_site_with_its_branch(gpu: Gpu, name: str, m: int) -> None:
    n, k, rank, fmt, half = 37, 160, 8, Format.parse(name), Format("float16")
    generator = torch.Generator().manual_seed(6)
    codes = torch.full((n, k), fmt.levels[0], dtype=torch.int8)
    if fmt.is_mixed:
        codes[:, fmt.columns :] = 1
    packed = pack(fmt, codes, torch.rand(n, fmt.groups(k), generator=generator))
    assert packed.scale is not None
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    a, b = torch.randn(rank, k, generator=generator).half(), torch.randn(n, rank, generator=generator).half()

    columns = activation_k(k)
    outputs = (
        torch.zeros(m, columns, dtype=torch.int8),
        torch.zeros(m),
        torch.zeros(m, columns // 32, dtype=torch.int32),
    )
    quantised = Activation(*map(gpu.put, outputs), m, columns)
    matrix = Matrix(
        gpu.put(packed.weight),
        gpu.put(packed.scale),
        n,
        fmt.padded_k(k),
        packed.weight.shape[1],
        packed.scale.shape[1],
    )
    address, t, y = gpu.put(x), gpu.put(torch.zeros(m, rank)), gpu.put(torch.full((m, n), torch.nan))
    gpu("quantize_activation", address, c_int32(k), 8, c_uint64(0), quantised)
    gpu("linear_dense", b"float16", address, m, rank, k, gpu.put(pack(half, a).weight), c_uint64(0), t)
    branch = Branch(gpu.put(pack(half, b).weight), t, rank)
    gpu("linear_a8", fmt.kind.encode(), quantised, matrix, gpu.put(bias), branch, y)

    q, scale, _ = quantize_activation(x)
    weight = unpack(fmt, packed.weight, packed.scale, n, k)
    expected = scale.unsqueeze(1) * (q[:, :k].float() @ weight.T) + bias + x @ a.float().T @ b.float().T
    assert near(gpu.get(y, torch.empty(m, n)), expected)

    gpu("linear", fmt.kind.encode(), b"float32", address, m, k, matrix, c_uint64(0), y)
    assert near(gpu.get(y, torch.empty(m, n)), x @ weight.T)


@pytest.mark.parametrize(("bits", "static"), [(8, False), (4, False), (8, True)])
def test_quantisers(gpu: Gpu, bits: int, static: bool) -> None:
    x, step = torch.randn(2, 100, generator=torch.Generator().manual_seed(7)), torch.tensor([0.02])
    expected = quantize_activation_static(x, step) if static else quantize_activation(x, bits)
    out = Activation(*(gpu.put(torch.zeros_like(tensor)) for tensor in expected), 2, 128)
    gpu("quantize_activation", gpu.put(x), 100, bits, gpu.put(step) if static else c_uint64(0), out)
    for address, tensor in zip((out.q, out.scale, out.sums), expected, strict=True):
        assert torch.equal(gpu.get(c_uint64(address), tensor), tensor)


def test_says_what_is_wrong(gpu: Gpu, library: ctypes.CDLL, emulator: Emulator, tmp_path: Path) -> None:
    def reason(fatbin: Path, driver: bytes) -> str:
        assert library.hikui_cuda_open(os.fsencode(fatbin), driver) is None
        return str(library.hikui_cuda_last_error().decode())

    driver = os.fsencode(emulator.path)
    assert reason(tmp_path, b"libnone.so") == "No CUDA driver is here (libnone.so cannot be loaded)."
    assert reason(tmp_path / "absent", driver) == f"{tmp_path / 'absent'} cannot be read."
    (tmp_path / "wrong").write_bytes(b"none")
    assert reason(tmp_path / "wrong", driver) == "cuModuleLoadData fails: emulated failure."
    assert "has no function cuInit" in reason(tmp_path, b"libc.so.6")
    activation, matrix, somewhere = Activation(16, 16, 16, 1, 128), Matrix(16, 16, 1, 128, 16, 1), c_uint64(16)
    wrong = gpu.refuses("linear_a8", b"int9", activation, matrix, c_uint64(0), Branch(0, 0, 0), somewhere)
    assert wrong == "There is no kernel hikui_linear_a8_int9_m1."
    wide = Matrix(16, 16, 1, 256, 32, 1)
    assert "narrower" in gpu.refuses("linear_a8", b"int4", activation, wide, c_uint64(0), Branch(0, 0, 0), somewhere)
    narrow = Activation(16, 16, 16, 1, 32)
    assert "quantised to 128" in gpu.refuses("quantize_activation", somewhere, 100, 8, c_uint64(0), narrow)


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"groups": groups} for groups in (0, -1, 3, 5, 8, 2**31 - 1, -(2**31))],
        *[{name: size} for name in ("n", "columns", "lines") for size in (0, -1, 2**31 - 1, -(2**31))],
        {"weight": 0},
        {"scale": 0},
    ],
)
def test_a_matrix_that_is_none_is_refused(gpu: Gpu, wrong: dict[str, int]) -> None:
    activation, somewhere = Activation(16, 16, 16, 1, 128), c_uint64(16)
    matrix = Matrix(16, 16, 16, 128, 16, 1)
    for name, value in wrong.items():
        setattr(matrix, name, value)
    for said in (
        gpu.refuses("linear_a8", b"int4", activation, matrix, c_uint64(0), Branch(0, 0, 0), somewhere),
        gpu.refuses("linear", b"int4", b"float32", somewhere, 1, 128, matrix, c_uint64(0), somewhere),
    ):
        assert said.endswith(".") and "no kernel" not in said


def test_sizes_and_addresses_that_are_none_are_refused(gpu: Gpu) -> None:
    matrix, none, somewhere = Matrix(16, 16, 16, 128, 16, 1), c_uint64(0), c_uint64(16)
    plain, no_branch = Activation(16, 16, 16, 1, 128), Branch(0, 0, 0)
    for m, columns in ((0, 128), (-1, 128), (2**31 - 1, 128), (1, 0), (1, -128), (1, 2**31 - 1), (1, 100)):
        activation = Activation(16, 16, 16, m, columns)
        gpu.refuses("linear_a8", b"int4", activation, matrix, none, no_branch, somewhere)
        gpu.refuses(
            "linear", b"int4", b"float32", somewhere, m, columns if columns != 100 else 129, matrix, none, somewhere
        )
        gpu.refuses("quantize_activation", somewhere, 2**31 - 1 if m == 1 else 128, 8, none, activation)
    for branch in (Branch(0, 0, 4), Branch(16, 16, -4), Branch(16, 16, 2**31 - 1)):
        assert "branch" in gpu.refuses("linear_a8", b"int4", plain, matrix, none, branch, somewhere)
    assert "lacks an address" in gpu.refuses("linear_a8", b"int4", plain, matrix, none, no_branch, none)
    assert "name of its format" in gpu.refuses("linear_a8", None, plain, matrix, none, no_branch, somewhere)
    assert "lacks an address" in gpu.refuses("linear_dense", b"float16", none, 1, 16, 16, somewhere, none, somewhere)
    for m, n, k in ((0, 16, 16), (1, -1, 16), (1, 16, 2**31 - 1)):
        assert "is none" in gpu.refuses("linear_dense", b"float16", somewhere, m, n, k, somewhere, none, somewhere)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_an_artefact_for_a_gpu_carries_fatbin_and_loader(tmp_path: Path) -> None:
    files, described = artefact.write(TARGETS["jetson-orin"], tmp_path)
    assert sorted(files) == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert (tmp_path / "lib/aarch64-linux-gnu/hikui_kernels.fatbin").read_bytes()[:4] == FATBIN_MAGIC
    assert elf.read_elf(tmp_path / "lib/aarch64-linux-gnu" / LIBRARY).triple == "aarch64-linux-gnu"
    entry = described["cuda"]
    assert isinstance(entry, dict) and entry["architectures"] == ["sm_87"] and "CPU" in entry["used_by"]
    again, _ = artefact.write(TARGETS["jetson-orin"], tmp_path / "again")
    assert all((tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in again)


def test_without_the_toolkit_the_manifest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    files, described = artefact.write(TARGETS["cuda-sm80"], tmp_path)
    assert files == [] and "fatbinary is not here" in str(described)
    assert artefact.write(TARGETS["x86-64-v3"], tmp_path) == ([], {})

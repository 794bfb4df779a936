"""The library as a whole: refusals, choice of the instruction set, the C ABI inside and outside TVM, builds."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hikui.backends.kernels import SYMBOLS, build
from hikui.backends.kernels.isa import ISAS
from hikui.backends.kernels.replay import Machine
from hikui.backends.kernels.standalone import Call, Library, link
from hikui.backends.kernels.symbols import kernels_called
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import KINDS, Format, pack, quantize_activation

from .conftest import TRIPLES

TRIPLE = f"{platform.machine()}-linux-gnu"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(TRIPLE, TRIPLES[TRIPLE], tmp_path_factory.mktemp("library") / "kernels.so")


@pytest.fixture(scope="module")
def library(path: Path) -> Library:
    return Library(path)


def linear_arguments(m: int = 2, n: int = 40, k: int = 172) -> dict[str, Tensor]:
    fmt = Format("int4", 64)
    packed = pack(fmt, torch.ones(n, k, dtype=torch.int8), torch.ones(n, fmt.groups(k)))
    assert packed.scale is not None
    q, q_scale, q_sums = quantize_activation(torch.ones(m, k))
    return {
        "q": q,
        "q_scale": q_scale,
        "q_sums": q_sums,
        "weight": packed.weight,
        "scale": packed.scale,
        "bias": torch.zeros(n),
        "y": torch.zeros(m, n),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("q", torch.zeros(2, 256, dtype=torch.uint8), "q must be int8"),
        ("q", torch.zeros(2, 128, dtype=torch.int8), "q_sums is 2 rows of 8 where 2 of 4"),
        ("q", torch.zeros(256, 2, dtype=torch.int8).T, "q must be contiguous"),
        ("q_scale", torch.ones(3), "q_scale has 3 elements where 2"),
        ("weight", torch.zeros(2, 24, 16, 4, dtype=torch.uint8), "weight must be packed as [3, *, 16, 4]"),
        ("weight", torch.zeros(3, 64, 16, 4, dtype=torch.uint8), "64 weight lines in 3 groups do not fit"),
        ("scale", torch.zeros(3, 5, 16, dtype=torch.float16), "24 weight lines in 5 groups do not fit"),
        ("scale", torch.zeros(3, 3, 16), "scale must be float16"),
        ("q", torch.zeros(513, dtype=torch.int8)[1:].view(2, 256), "q must lie at a multiple of 4 bytes"),
        ("bias", torch.zeros(39), "bias has 39 elements where 40 or 0"),
        ("y", torch.zeros(3, 40), "y is 3 rows of 40 where 2 of 40"),
        ("y", torch.zeros(2, 50), "weight must be packed as [4, *, 16, 4]"),
    ],
)
def test_wrong_arguments_are_refused(library: Library, name: str, wrong: Tensor, sentence: str) -> None:
    arguments = linear_arguments()
    library("hikui_linear_a8_int4", *arguments.values())
    arguments[name] = wrong
    with pytest.raises(HikuiError) as refusal:
        library("hikui_linear_a8_int4", *arguments.values())
    text = str(refusal.value)
    assert sentence in text
    assert text.startswith("hikui_linear_a8_int4")
    assert text.endswith(".")


FORMS = [(kind, form) for kind in (*KINDS, "mixed") for form in ("a8_", "a8_branch_", "")]


def hostile_arguments(kind: str, form: str, weight: tuple[int, ...], scale: tuple[int, ...], k: int) -> list[Tensor]:
    """The tensors of a product of two rows, with a weight and scale of any shape."""
    n, padded = 17, (k + 127) // 128 * 128
    dtype = torch.int8 if kind == "int8" else torch.uint8
    packed = [torch.zeros(weight, dtype=dtype), torch.zeros(scale, dtype=torch.float16), torch.zeros(n)]
    branch = [torch.zeros(2, k), torch.zeros(1, k, 16).half(), torch.zeros(2, 4, 16).half()] if "branch" in form else []
    taken = [torch.zeros(2, k)]
    if form:
        taken = [
            torch.zeros(2, padded, dtype=torch.int8),
            torch.zeros(2),
            torch.zeros(2, padded // 32, dtype=torch.int32),
        ]
    return [*taken, *packed, *branch, torch.zeros(2, n)]


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize(
    ("weight", "scale", "k"),
    [
        ((2, 0, 16, 4), (2, 1, 16), 128),
        ((2, 0, 16, 4), (2, 1, 16), 0),
        ((2, 0, 16, 4), (2, 0, 16), 128),
        ((2, 32, 16, 4), (2, 0, 16), 128),
        ((2, 1, 16, 4), (2, 7, 16), 128),
    ],
)
def test_sizes_of_zero_are_refused_before_anything_is_divided_by_them(
    library: Library, kind: str, form: str, weight: tuple[int, ...], scale: tuple[int, ...], k: int
) -> None:
    with pytest.raises(HikuiError, match="do not fit activations of"):
        library(f"hikui_linear_{form}{kind}", *hostile_arguments(kind, form, weight, scale, k))


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("size", [2**57, 2**58 + 1, 2**59, 2**60, 2**62, 2**63 - 1, -1, -(2**63)])
def test_sizes_whose_products_wrap_are_refused(library: Library, kind: str, form: str, size: int) -> None:
    symbol, tensors = f"hikui_linear_{form}{kind}", hostile_arguments(kind, form, (2, 32, 16, 4), (2, 1, 16), 128)
    for argument, tensor in enumerate(tensors):
        for axis in range(tensor.dim()):
            call = Call(*tensors)
            call.reshape(argument, axis, size)
            with pytest.raises(HikuiError):
                library.run(symbol, call)


@pytest.mark.parametrize("size", [2**57, 2**59, 2**62, 2**63 - 1, -1, -(2**63)])
def test_the_other_kernels_refuse_such_sizes_too(library: Library, size: int) -> None:
    heads, past = torch.zeros(1, 2, 3, 8), torch.tensor([0])
    cache, codes, scales = (
        torch.zeros(1, 2, 4, 8),
        torch.zeros(1, 2, 4, 8, dtype=torch.int8),
        torch.zeros(1, 2, 4).half(),
    )
    x, q = torch.zeros(2, 128), torch.zeros(2, 128, dtype=torch.int8)
    quantised = (q, torch.zeros(2), torch.zeros(2, 4, dtype=torch.int32))
    calls: dict[str, tuple[Tensor | float, ...]] = {
        "hikui_attention": (heads, heads, heads, cache, cache, past, 1.0, heads),
        "hikui_attention_int8": (heads, heads, heads, codes, codes, scales, scales, past, 1.0, heads),
        "hikui_cache_update_int8": (codes, scales, heads, past, cache),
        "hikui_rotary": (heads, heads[0, 0], heads[0, 0], heads),
        "hikui_quantize_activation": (x, *quantised),
        "hikui_rms_norm_quantize": (x, torch.ones(128), 1e-5, x, *quantised),
        "hikui_swiglu_quantize": (x, x, x, *quantised),
        "hikui_linear_float32": (x, torch.zeros(1, 128, 16), torch.zeros(0), torch.zeros(2, 16)),
    }
    for symbol, arguments in calls.items():
        library(symbol, *arguments)
        for argument, tensor in enumerate(arguments):
            for axis in range(tensor.dim() if isinstance(tensor, Tensor) else 0):
                call = Call(*arguments)
                call.reshape(argument, axis, size)
                with pytest.raises(HikuiError):
                    library.run(symbol, call)


def test_mixed_takes_its_int4_columns_from_the_shapes(library: Library) -> None:
    fmt = Format("mixed", 64, 128)
    packed = pack(fmt, torch.ones(40, 256, dtype=torch.int8), torch.ones(40, 4))
    assert packed.scale is not None
    operands = (*quantize_activation(torch.ones(2, 256)),)
    none, y = torch.empty(0), torch.empty(2, 40)
    library("hikui_linear_a8_mixed", *operands, packed.weight, packed.scale, none, y)
    assert torch.equal(y.round(), torch.full((2, 40), 256.0))
    with pytest.raises(HikuiError, match="19 weight lines in 4 groups do not fit activations of 256 columns"):
        library("hikui_linear_a8_mixed", *operands, packed.weight[:, :19].contiguous(), packed.scale, none, y)
    with pytest.raises(HikuiError, match=r"hikui_linear_int4: x has 256 columns, more than the 192 of the weight\."):
        arguments = linear_arguments()
        library("hikui_linear_int4", torch.ones(2, 256), arguments["weight"], arguments["scale"], none, y)


def test_every_format_has_a_kernel_by_name(library: Library) -> None:
    served = library.describe()
    assert set(served) == {(kind, size) for kind in (*KINDS, "mixed") for size in ("single", "few", "many")}
    assert "generic" not in served.values()


def test_wrong_calls_are_refused(library: Library) -> None:
    row = torch.zeros(1, 8)
    with pytest.raises(HikuiError, match=r"^hikui_swiglu takes 3 arguments, not 2\.$"):
        library("hikui_swiglu", row, row)
    with pytest.raises(HikuiError, match=r"^hikui_swiglu: argument 1, up, must be a tensor\.$"):
        library("hikui_swiglu", row, 1.0, row)
    with pytest.raises(HikuiError, match=r"^hikui_rms_norm: argument 2, eps, must be a number\.$"):
        library("hikui_rms_norm", row, row[0], row, row)
    heads, cache = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8, 8)
    with pytest.raises(HikuiError, match="3 tokens after 6 do not fit a cache of 8"):
        library("hikui_attention", heads, heads, heads, cache, cache, torch.tensor([6]), 1.0, heads)
    wide = torch.zeros(1, 3, 3, 8)
    with pytest.raises(HikuiError, match="3 query heads cannot share 2 key-value heads"):
        library("hikui_attention", wide, heads, heads, cache, cache, torch.tensor([0]), 1.0, wide)


def test_wrong_quantised_caches_are_refused(library: Library) -> None:
    heads, codes, past = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8, 8, dtype=torch.int8), torch.tensor([0])
    nibbles, scale = torch.zeros(1, 2, 8, 4, dtype=torch.uint8), torch.zeros(1, 2, 8, dtype=torch.float16)

    def attend(kind: str, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor = past) -> None:
        library(f"hikui_attention_{kind}", heads, heads, heads, keys, values, scale, scale, at, 1.0, heads.clone())

    with pytest.raises(HikuiError, match="hikui_attention_int8: key_cache must be int8"):
        attend("int8", nibbles, nibbles)
    with pytest.raises(HikuiError, match="hikui_attention_int4: value_cache must be uint8"):
        attend("int4", nibbles, codes)
    with pytest.raises(HikuiError, match=r"hikui_attention_int4: key_cache must be \[1, 2, 8, 4\]"):
        attend("int4", codes.view(torch.uint8), codes.view(torch.uint8))
    with pytest.raises(HikuiError, match="hikui_attention_int4: 3 tokens after 6 do not fit a cache of 8"):
        attend("int4", nibbles, nibbles, torch.tensor([6]))
    values = torch.zeros(1, 2, 8, 8)
    with pytest.raises(HikuiError, match="hikui_cache_update_int8: 3 tokens after -1 do not fit a cache of 8"):
        library("hikui_cache_update_int8", codes, scale, heads, torch.tensor([-1]), values)
    with pytest.raises(HikuiError, match="scale is 2 rows of 7 where 2 of 8"):
        library("hikui_cache_update_int8", codes, scale[:, :, :7].contiguous(), heads, past, values)
    odd = torch.zeros(1, 2, 3, 9)
    with pytest.raises(HikuiError, match="heads of 9 cannot be stored as two codes a byte"):
        library("hikui_cache_update_int4", nibbles, scale, odd, past, torch.zeros(1, 2, 8, 9))


def test_no_rows_is_no_work(library: Library) -> None:
    q, scale, sums = quantize_activation(torch.zeros(0, 64))
    library("hikui_quantize_activation", torch.zeros(0, 64), q, scale, sums)
    library("hikui_linear_a8_int4", *linear_arguments(m=0).values())


def test_arm_board_without_dot_product_takes_plain_neon(arm: Callable[[str], Machine]) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("the CPUs are emulated ones")
    assert arm("cortex-a76").isa() == "dotprod"
    assert arm("cortex-a72").isa() == "neon"
    with pytest.raises(HikuiError, match="HIKUI_ISA asks for dotprod, which this CPU does not have"):
        arm("cortex-a72").isa("dotprod")


def test_unknown_instruction_set_is_refused(program: Callable[[str], Path]) -> None:
    with pytest.raises(HikuiError, match=f"does not hold; it holds {', '.join(TRIPLES[TRIPLE])}"):
        Machine(program(TRIPLE)).isa("avx9")


def test_best_instruction_set_is_taken(library: Library, program: Callable[[str], Path]) -> None:
    def available(isa: str) -> bool:
        try:
            return Machine(program(TRIPLE)).isa(isa) == isa
        except HikuiError:
            return False

    assert library.isa() == [isa for isa in TRIPLES[TRIPLE] if available(isa)][-1]


def test_inside_tvm_errors_are_exceptions_and_its_threads_are_used(path: Path, tmp_path: Path) -> None:
    tvm = pytest.importorskip("tvm")
    # A copy: a library that this process loaded before TVM has not seen TVM's error state.
    module = tvm.runtime.load_module(str(shutil.copy(path, tmp_path)))
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(64, 1024, generator=generator) for _ in range(2))
    arrays = [tvm.runtime.tensor(tensor.numpy()) for tensor in (gate, up, torch.full_like(gate, torch.nan))]
    module["hikui_swiglu"](*arrays)
    alone = torch.full_like(gate, torch.nan)
    Library(path)("hikui_swiglu", gate, up, alone)
    assert torch.equal(torch.from_numpy(arrays[2].numpy()), alone)
    with pytest.raises(ValueError, match="hikui_swiglu: up is 63 rows"):
        module["hikui_swiglu"](arrays[0], tvm.runtime.tensor(up[1:].numpy()), arrays[2])


@pytest.mark.parametrize(("triple", "isa"), [("x86_64-linux-gnu", "avx2"), ("aarch64-linux-gnu", "neon")])
def test_builds_are_alike_and_need_only_libc(
    triple: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    for name in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name / "cache"))
        builds.append(build(triple, (isa,), tmp_path / name / "objects"))
    first, second = builds
    assert first.symbols == SYMBOLS
    assert [path.name for path in first.paths] == [path.name for path in second.paths]
    assert [path.read_bytes() for path in first.paths] == [path.read_bytes() for path in second.paths]
    names = subprocess.run(["nm", "-P", *map(str, first.paths)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[:2] for line in names.splitlines() if len(line.split()) > 1]
    defined = {name for name, kind in symbols if kind not in "Uw"}
    needed = {name for name, kind in symbols if kind == "U"} - defined
    libc = {"aligned_alloc", "free", "getauxval", "getenv", "memcpy", "memset", "strcmp", "vsnprintf", "__tls_get_addr"}
    assert needed <= libc | {"_GLOBAL_OFFSET_TABLE_"}
    assert {f"__tvm_ffi_{symbol}" for symbol in SYMBOLS} <= defined


def test_instruction_set_of_another_triple_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="Instruction set neon belongs to aarch64-linux-gnu"):
        build("x86_64-linux-gnu", ("neon",), tmp_path)


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HikuiError, match=r"cannot be kept in the cache .*file.*; set XDG_CACHE_HOME"):
        build(TRIPLE, TRIPLES[TRIPLE], tmp_path / "objects")


def test_a_choice_of_functions_leaves_out_what_none_of_them_calls(tmp_path: Path) -> None:
    chosen = ("hikui_linear_a8_branch_int4", "hikui_linear_int8", "hikui_rms_norm_quantize", "hikui_cache_update_int4")
    objects = build(TRIPLE, TRIPLES[TRIPLE], tmp_path / "chosen", chosen)
    assert set(objects.symbols) == set(chosen)
    everything = build(TRIPLE, TRIPLES[TRIPLE], tmp_path / "all")
    named = {path.name: path for path in objects.paths}
    called = {
        "linear_a8_int4", "linear_float16", "linear_int8", "rms_norm", "quantize_activation_int8",
        "cache_store_int4", "cache_load_int4",
    }  # fmt: skip
    assert kernels_called(chosen) == called
    for isa in TRIPLES[TRIPLE]:
        held = {name.removeprefix("hikui_").removesuffix(f"__{isa}.o") for name in named if name.endswith(f"__{isa}.o")}
        prepares = {special.prepare for (kind, _), special in ISAS[isa].special.items() if kind == "int4"} - {None}
        sizes = ("", "_single", "_few", "_many", "_few_single", "_few_many")
        possible = {f"{kernel}{size}" for kernel in called for size in sizes}
        assert held - possible == prepares
        assert {kernel for kernel in called if any(f"{kernel}{size}" in held for size in sizes)} == called
    # The kernels are the very same objects; the dispatcher has the chosen public functions only.
    for path in everything.paths:
        if "__" in path.name and path.name in named:
            assert path.read_bytes() == named[path.name].read_bytes()
    library = tmp_path / "chosen.so"
    paths = [str(path) for path in objects.paths]
    subprocess.run(["gcc", "-shared", "-Wl,-z,defs", *paths, "-o", str(library)], check=True)
    exported = subprocess.run(["nm", "-D", "-P", str(library)], capture_output=True, text=True, check=True).stdout
    found = {line.split()[0].removeprefix("__tvm_ffi_") for line in exported.splitlines() if "__tvm_ffi_" in line}
    assert found == set(chosen)

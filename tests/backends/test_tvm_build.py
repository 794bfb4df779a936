"""What the backend `tvm` writes, and what it refuses to build."""

import filecmp
import math
from pathlib import Path

import pytest
import torch
from torch import fx

from hikui.backends import toolchain
from hikui.backends.kernels import SYMBOLS
from hikui.backends.tvm import TvmBackend
from hikui.backends.tvm.backend import build_library
from hikui.backends.tvm.index import ALIGNMENT, PARAMETERS, map_parameters, read_index
from hikui.backends.tvm.module import kernels_called, relax_module
from hikui.backends.tvm.parameters import write_parameters
from hikui.lowering.artefact import elf
from hikui.lowering.artefact.target import TARGETS, machine_triple, resolve
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir import sizes
from hikui.lowering.ir.packed import PackedEmbedding, is_packed, is_packed_embedding
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import no_progress
from tests.backends import every_op
from tests.passes.helpers import lower, traced


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_two_builds_give_the_same_bytes(tvm_host: Path, tmp_path: Path) -> None:
    result = TvmBackend().build(every_op.program(), TARGETS["x86-64-v3"], tmp_path, no_progress)
    assert files(tmp_path) == files(tvm_host) == list(result.files)
    _, mismatch, errors = filecmp.cmpfiles(tvm_host, tmp_path, result.files, shallow=False)
    assert mismatch == errors == []
    assert result.requirements["glibc"] == "2.28"
    assert result.requirements["libstdc++"].startswith("GLIBCXX_3.4.")


def test_binaries_are_for_the_board_and_run_on_its_glibc(tvm_board: Path) -> None:
    binaries = [tvm_board / name for name in files(tvm_board) if elf.is_elf(tvm_board / name)]
    assert {path.name for path in binaries} == {"hikui-run", "libtvm_ffi.so", "libtvm_runtime.so", "model.so"}
    for path in binaries:
        found = elf.read_elf(path)
        assert found.triple == "aarch64-linux-gnu"
        assert found.glibc() <= elf.version(toolchain.GLIBC)


def test_the_boards_runner_needs_no_cxx_library(tvm_host: Path, tvm_board: Path) -> None:
    for directory in (tvm_host, tvm_board):
        (path,) = directory.glob("bin/*/hikui-run")
        assert {need.partition("_")[0] for need in elf.read_elf(path).needs} == {"GLIBC"}


def test_the_parameters_hold_every_weight_aligned(tvm_host: Path) -> None:
    program, index = every_op.program(), read_index(tvm_host)
    mapping = map_parameters(tvm_host, index)
    assert [weight.name for weight in index.weights] == [program.weight_of(node) for node in program.weight_nodes()]
    assert index.features == TARGETS["x86-64-v3"].features
    for weight in index.weights:
        assert weight.offset % ALIGNMENT == 0
        stored = mapping[weight.offset : weight.offset + weight.nbytes]
        expected = program.store.load(weight.name).reshape(-1).view(torch.uint8)
        assert torch.equal(torch.from_numpy(stored.copy()), expected)
    assert index.parameters == (tvm_host / PARAMETERS).stat().st_size


def test_an_unknown_operator_is_named() -> None:
    program = _edited(lambda graph, logits: graph.call_function(torch.ops.aten.special_bessel_j0.default, (logits,)))
    with pytest.raises(HikuiError, match=r"no translation for the operators .*special_bessel_j0"):
        relax_module(program)


def test_a_cache_that_is_read_twice_is_refused() -> None:
    program = every_op.program()
    cache, output = program.input_nodes()[4], program.output_node
    logits, *caches = program.outputs()
    with program.graph.inserting_before(output):
        total = program.graph.call_function(torch.ops.aten.sum.default, (cache,))
        logits = program.graph.call_function(torch.ops.aten.add.Tensor, (logits, total))
    output.args = ((logits, *caches),)
    program.recompile()
    with pytest.raises(HikuiError, match="which other nodes read too"):
        relax_module(program)


def test_a_cache_written_by_hand_is_refused() -> None:
    program = every_op.program()
    output = program.output_node
    logits, *caches = program.outputs()
    with program.graph.inserting_before(output):
        caches[2] = program.graph.call_function(torch.ops.aten.mul.Tensor, (caches[2], 2.0))
    output.args = ((logits, *caches),)
    program.recompile()
    with pytest.raises(HikuiError, match="without writing it by hikui::cache_update"):
        relax_module(program)


def _edited(change: object) -> Program:
    program = every_op.program()
    assert callable(change)
    logits, *caches = program.outputs()
    with program.graph.inserting_before(program.output_node):
        changed: fx.Node = change(program.graph, logits)
    program.output_node.args = ((changed, *caches),)
    program.recompile()
    return program


def test_no_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hikui.backends.toolchain.shutil.which", lambda name: None)
    monkeypatch.setattr("hikui.backends.toolchain.util.find_spec", lambda name: None)
    with pytest.raises(HikuiError, match=r"g\+\+-aarch64-linux-gnu .*hikui\[cross\]"):
        toolchain.compilers("aarch64-linux-gnu")


def test_a_newer_glibc_than_promised_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text("int main(void) { return 0; }\n")
    monkeypatch.setattr(toolchain, "GLIBC", "2.1")
    native = toolchain.native_compiler("x86_64-linux-gnu")
    if native is None:
        pytest.skip("no g++")
    monkeypatch.setattr(toolchain, "portable_compiler", lambda triple: None)
    with pytest.raises(HikuiError, match=r"newer than 2\.1"):
        toolchain.link("x86_64-linux-gnu", tmp_path / "program", [source])
    assert not (tmp_path / "program").exists()


def test_a_runtime_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    foreign = next(triple for triple in elf.MACHINES.values() if triple != machine_triple())
    with pytest.raises(HikuiError, match=r"apache-tvm==.* cannot be fetched: .* try again with a network"):
        toolchain.runtime_libraries(foreign)
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HikuiError, match=r"cache folder .* cannot be made"):
        toolchain.runtime_libraries(foreign)


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text("int main(void) { return missing; }\n")
    with pytest.raises(HikuiError, match=r"failed for x86_64-linux-gnu: .*missing"):
        toolchain.link("x86_64-linux-gnu", tmp_path / "program", [source])


def test_a_head_and_its_embedding_lie_in_the_file_once(tmp_path: Path) -> None:
    program = lower(traced("qwen2"), "canonicalise,rtn{format=int8-g64},embedding,activation,fuse,dead_code")
    (table,) = (PackedEmbedding.of(node) for node in program.graph.nodes if is_packed_embedding(node))
    assert sum(is_packed(user) for user in table.weight.users) == 1, "the head reads it too"
    index = write_parameters(program, resolve("host"), tmp_path, no_progress)
    names = [weight.name for weight in index.weights]
    assert len(names) == len(set(names)) and program.weight_of(table.weight) in names
    rows, columns = table.rows, table.columns
    assert not any(math.prod(weight.shape) == rows * columns and weight.dtype == "float32" for weight in index.weights)
    # Every tensor is padded to whole lines of the file, and a line follows the last.
    assert index.parameters <= sizes.measure(program).total_bytes + ALIGNMENT * (len(names) + 2)


def test_a_library_holds_the_kernels_that_its_program_calls(tmp_path: Path) -> None:
    program = lower(traced("qwen2"), "canonicalise,rtn{format=int8-g64},embedding,activation,fuse,dead_code")
    target = resolve("host")
    called = kernels_called(relax_module(program))
    assert set(called) == {
        "hikui_attention",
        "hikui_embedding_int8",
        "hikui_linear_a8_int8",
        "hikui_quantize_activation",
        "hikui_rms_norm_quantize",
        "hikui_rotary",
        "hikui_swiglu_quantize",
    }
    build_library(program, target, tmp_path / "model.so")
    held = (tmp_path / "model.so").read_bytes()
    for symbol in SYMBOLS:
        assert (f"__tvm_ffi_{symbol}\0".encode() in held) == (symbol in called), symbol

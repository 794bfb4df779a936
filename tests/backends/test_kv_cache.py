"""Quantised caches through both backends, against the interpreter: fused, written out, natively and emulated."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from hikui.backends.onnxruntime import OrtRunner
from hikui.backends.tvm.native.board import Board, BoardRunner
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.target import TARGETS, machine_triple, resolve
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import no_progress
from hikui.passes.graph import hikui

from . import onnxruntime_support as support

LENGTHS = (5, 1, 3, 1, 1)
START, END = "canonicalise,pack{format=float32},", ",fuse,dead_code"
CACHES = {
    "int8": "kv_cache",
    "int4": "kv_cache{bits=4,keys=channel,values=channel}",
}
PROGRAMS = {
    **{f"{fmt} fused": ("llama", f"{START}{step}{END}") for fmt, step in CACHES.items()},
    **{f"{fmt} written out": ("bloom", f"{START}{step}{END}") for fmt, step in CACHES.items()},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    return support.lowered(*PROGRAMS[request.param])


def assert_equal_to_the_interpreter(runner: Runner, program: Program) -> npt.NDArray[np.float32]:
    found, wanted = support.in_pieces(runner, LENGTHS), support.reference(program, LENGTHS)
    assert support.relative_error(found, wanted) < 1e-5
    return found


def tvm_artefact(program: Program, directory: Path, target: str) -> Path:
    from hikui.backends.tvm import TvmBackend

    TvmBackend().build(program, resolve(target), directory, no_progress)
    return directory


def test_tvm(program: Program, tmp_path: Path) -> None:
    from hikui.backends.tvm import TvmRunner
    from hikui.backends.tvm.index import read_index

    runner = TvmRunner(tvm_artefact(program, tmp_path, "host"))
    assert read_index(tmp_path).caches == program.config.caches
    found = assert_equal_to_the_interpreter(runner, program)
    runner.reset()
    np.testing.assert_array_equal(support.in_pieces(runner, LENGTHS), found)
    board = BoardRunner(tmp_path, Board(machine_triple(), threads=1))
    try:
        assert_equal_to_the_interpreter(board, program)
    finally:
        board.close()


def test_tvm_refuses_an_unknown_form_of_cache(tmp_path: Path) -> None:
    from hikui.backends.tvm import TvmRunner
    from hikui.backends.tvm.index import INDEX

    tvm_artefact(support.lowered(*PROGRAMS["int8 fused"]), tmp_path, "host")
    index = tmp_path / INDEX
    text = index.read_text()
    assert "cache 2 8 int8\n" in text
    index.write_text(text.replace("cache 2 8 int8\n", "cache 2 8 int5\n", 1))
    with pytest.raises(HikuiError, match=f"{INDEX} is damaged"):
        TvmRunner(tmp_path)
    command = [*Board(machine_triple()).command(tmp_path), "--tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{INDEX} is damaged" in done.stderr


def test_tvm_emulated(tmp_path: Path) -> None:
    from hikui.backends import toolchain
    from hikui.backends.tvm import TvmRunner

    target = TARGETS["raspberry-pi-4"]
    if shutil.which("qemu-aarch64") is None or not Path("/usr/aarch64-linux-gnu/lib/libstdc++.so.6").exists():
        pytest.skip("qemu-user or the aarch64 libraries are not installed")
    try:
        toolchain.runtime_libraries(target.triple)
    except HikuiError as error:
        pytest.skip(str(error))
    program = support.lowered(*PROGRAMS["int4 fused"])
    runner = TvmRunner(tvm_artefact(program, tmp_path, target.name), emulate=True)
    try:
        assert_equal_to_the_interpreter(runner, program)
    finally:
        runner.close()


def test_onnxruntime(program: Program, tmp_path: Path) -> None:
    runner = OrtRunner(support.build(program, tmp_path), threads=1)
    found = assert_equal_to_the_interpreter(runner, program)
    runner.reset()
    np.testing.assert_array_equal(support.in_pieces(runner, LENGTHS), found)
    model = ir.load(tmp_path / "model.onnx")
    assert [value.name for value in model.graph.inputs] == [
        "tokens", "past", *(tensor.kind for tensor in program.config.cache_tensors())
    ]  # fmt: skip
    # Also where it is read as a whole, a quantised cache is written where it lies.
    assert '"caches_in_place": true' in (tmp_path / "model.json").read_text()


def test_onnxruntime_has_one_operator_for_attention(tmp_path: Path) -> None:
    program = support.lowered(*PROGRAMS["int8 fused"])
    support.build(program, tmp_path)
    found = support.operators(ir.load(tmp_path / "model.onnx"))
    layers = len(program.config.caches)
    assert found.count("hikui::AttentionInt8") == layers
    assert sum(node.target is hikui.attention_quantized.default for node in program.graph.nodes) == layers
    assert not [name for name in found if "CacheUpdate" in name or "GroupQuery" in name]


def test_onnxruntime_emulated(tmp_path: Path) -> None:
    from hikui.backends.onnxruntime.emulation import find_sysroot

    try:
        find_sysroot("aarch64")
    except HikuiError as error:
        pytest.skip(str(error))
    if machine_triple() != "x86_64-linux-gnu" or shutil.which("qemu-aarch64") is None:
        pytest.skip("emulating aarch64 takes an x86-64 machine with qemu-user")
    program = support.lowered(*PROGRAMS["int8 fused"])
    runner = OrtRunner(support.build(program, tmp_path, resolve("raspberry-pi-5")), emulate=True)
    try:
        assert_equal_to_the_interpreter(runner, program)
    finally:
        runner.close()

"""Artefacts that several tests read; each is built once a session."""

import shutil
from pathlib import Path

import pytest

from hikui.lowering.artefact.target import TARGETS, machine_triple, missing_features
from hikui.lowering.errors import HikuiError


def _build(target: str, directory: Path) -> Path:
    # Imported late, so that the other backend's tests do not load TVM.
    from hikui.backends.tvm import TvmBackend
    from hikui.lowering.progress import no_progress
    from tests.backends import every_op

    directory.mkdir()
    TvmBackend().build(every_op.program(), TARGETS[target], directory, no_progress)
    return directory


@pytest.fixture(scope="session")
def tvm_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of every op for x86-64 with AVX2."""
    target = TARGETS["x86-64-v3"]
    if machine_triple() != target.triple or missing_features(target):
        pytest.skip("this machine is no x86-64 with AVX2")
    return _build(target.name, tmp_path_factory.mktemp("tvm") / target.name)


@pytest.fixture
def copied(tvm_host: Path, tmp_path: Path) -> Path:
    """An artefact to be damaged."""
    return Path(shutil.copytree(tvm_host, tmp_path / "artefact"))


@pytest.fixture(scope="session", params=["raspberry-pi-4", "raspberry-pi-5"])
def tvm_board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the two kinds of aarch64 board, to be run under qemu-user."""
    from hikui.backends import toolchain

    if shutil.which("qemu-aarch64") is None or not Path("/usr/aarch64-linux-gnu/lib/libstdc++.so.6").exists():
        pytest.skip("qemu-user or the aarch64 libraries are not installed")
    try:
        toolchain.runtime_libraries(TARGETS[request.param].triple)
    except HikuiError as error:
        pytest.skip(str(error))
    return _build(request.param, tmp_path_factory.mktemp("tvm") / request.param)

"""aarch64 artefacts under qemu-user, on a core without the dot product instructions and on one with them."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hikui.backends.onnxruntime import OrtRunner, emulation
from hikui.lowering.artefact.target import machine_triple, resolve
from hikui.lowering.errors import HikuiError

from . import onnxruntime_support as support

ROOT = Path(__file__).resolve().parents[2]
SYSROOT = ROOT / "build" / "sysroot-aarch64"
BOARDS = ("raspberry-pi-4", "raspberry-pi-5")
LENGTHS = (5, 3, *[1] * 8)


@pytest.fixture(name="sysroot", scope="module")
def _sysroot() -> Path:
    if machine_triple() != "x86_64-linux-gnu" or shutil.which("qemu-aarch64") is None:
        pytest.skip("emulating aarch64 takes an x86-64 machine with qemu-user")
    done = subprocess.run([ROOT / "scripts" / "sysroot.sh", SYSROOT], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return SYSROOT


@pytest.mark.parametrize("board", BOARDS)
def test_emulated_boards_choose_the_same_tokens(board: str, sysroot: Path, tmp_path: Path) -> None:
    program = support.lowered("llama", support.QUANTISED)
    runner = OrtRunner(support.build(program, tmp_path, resolve(board)), emulate=True)
    wanted = support.reference(program, LENGTHS)
    found = support.in_pieces(runner, LENGTHS)
    assert support.relative_error(found, wanted) < 1e-5
    assert found.argmax(-1).tolist() == wanted.argmax(-1).tolist()
    with pytest.raises(HikuiError, match="do not fit the cache"):
        runner.forward(support.tokens(2), runner.context_length - 1)
    runner.reset()
    np.testing.assert_array_equal(support.in_pieces(runner, LENGTHS), found)
    runner.close()


def test_a_library_of_a_better_core_is_refused_by_name(sysroot: Path, tmp_path: Path) -> None:
    """The features of a Raspberry Pi 5 are looked for on the emulated Cortex-A72, not on this machine."""
    artefact = support.build(support.traced("gpt2"), tmp_path, resolve("raspberry-pi-5"))
    description = artefact / "model.json"
    description.write_text(description.read_text().replace("cortex-a76", "cortex-a72"))
    with pytest.raises(HikuiError, match="lacks: asimddp, asimdhp, atomics, fphp"):
        OrtRunner(artefact, emulate=True)


def test_making_the_userland_again_does_nothing(sysroot: Path) -> None:
    before = (sysroot / "stamp").stat().st_mtime_ns
    subprocess.run([ROOT / "scripts" / "sysroot.sh", sysroot], check=True)
    assert (sysroot / "stamp").stat().st_mtime_ns == before


def test_a_machine_without_apt_is_told_so(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    destination = tmp_path / "sysroot"
    command = [ROOT / "scripts" / "sysroot.sh", destination]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert (done.returncode, destination.exists()) == (3, False)
    assert "needs apt-get" in done.stderr


@pytest.mark.parametrize("tools", ["without apt", "with nothing to do"])
def test_debian_packages_are_optional(tools: str, tmp_path: Path) -> None:
    path = str(tmp_path)
    if tools == "with nothing to do":
        needed = ("g++", "make", "qemu-aarch64", "aarch64-linux-gnu-g++")
        if not all(map(shutil.which, needed)):
            pytest.skip("not everything that Debian supplies is installed here")
        path = ":".join(sorted({str(Path(str(shutil.which(name))).parent) for name in needed}))
    else:
        for name in ("bash", "uname", "sort"):
            (tmp_path / name).symlink_to(str(shutil.which(name)))
    bash = str(shutil.which("bash"))
    command = [bash, str(ROOT / "scripts" / "debian.sh")]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert ("going on without" in done.stderr) == (tools == "without apt")


def test_a_missing_userland_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HikuiError, match=r"scripts/sysroot\.sh"):
        emulation.find_sysroot("riscv64")

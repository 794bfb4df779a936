"""The benchmark for GPUs, run against a driver that emulates: it checks every kernel and reports what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.cuda.__main__ import main

from hikui.backends.kernels.cuda.kernels import KINDS, makers

from .cuda_emulation import FATBIN_MAGIC, Emulator, emulator

__all__ = ["emulator"]

ROOT = Path(__file__).resolve().parents[2]


def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--driver", "libno_such_driver.so.1"]) == 1
    assert capsys.readouterr().err == "No CUDA driver is here (libno_such_driver.so.1 cannot be loaded).\n"


def test_checks_and_times_every_kernel_without_tvm(emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "kernels.fatbin").write_bytes(FATBIN_MAGIC)
    options = ["--size", "128", "--rows", "1", "8", "--rounds", "2", "--fatbin", str(tmp_path / "kernels.fatbin")]
    report = tmp_path / "report.json"
    options += ["--driver", str(emulator.path), "--json", str(report)]
    code = (
        "import sys; sys.modules['tvm'] = None; from benchmarks.cuda.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert {row["kernel"] for row in written["checks"]} == set(makers())
    assert all(row["passes"] for row in written["checks"])
    assert [(row["m"], row["kind"]) for row in written["products"]] == [(m, kind) for m in (1, 8) for kind in KINDS]
    assert f"{len(makers())} kernels checked, 0 failed" in done.stdout and "of copy" in done.stdout


def test_checks_alone(emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels.fatbin").write_bytes(FATBIN_MAGIC)
    report = tmp_path / "report.json"
    options = ["--checks", "--fatbin", str(tmp_path / "kernels.fatbin"), "--json", str(report)]
    assert main([*options, "--driver", str(emulator.path)]) == 0
    assert set(json.loads(report.read_text())) == {"device", "capability", "checks"}
    assert capsys.readouterr().out.endswith(f"{len(makers())} kernels checked, 0 failed \n")


def test_refuses_what_is_no_fatbin(emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong").write_bytes(b"none")
    assert main(["--fatbin", str(tmp_path / "wrong"), "--driver", str(emulator.path)]) == 1
    assert capsys.readouterr().err == "cuModuleLoadData fails: emulated failure.\n"

"""Targets."""

import platform
from pathlib import Path

import pytest

from hikui.lowering.artefact.target import TARGETS, core_count, cpu_features, resolve
from hikui.lowering.errors import UsageError


def test_the_features_of_a_cpu_are_read_on_both_architectures(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu_features(x86) == {"fpu", "avx2", "fma"}
    assert cpu_features(arm) == {"fp", "asimd", "asimddp"}


def test_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert core_count(tmp_path) == 4
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
    assert core_count(tmp_path) == 2


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'raspberry-pi-5'"):
        resolve("raspberypi-5")


def test_host_is_one_of_the_targets_without_a_gpu() -> None:
    host = resolve("host")
    assert not host.cuda
    assert host in TARGETS.values() and host.triple == f"{platform.machine()}-linux-gnu"

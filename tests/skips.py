"""Skipped tests brought to account: each reason must be one that this machine really gives.

`--refuse-unexpected-skips`, which `.ci/run` sets, lets a run fail where a test was skipped for any other reason: a tool
that vanished must not take its tests with it in silence.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from hikui.models.fetched import SMOLLM2

OPTION = "--refuse-unexpected-skips"


def _no_cpu_feature(flag: str) -> Callable[[], bool]:
    def missing() -> bool:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        return flags is None or flag not in flags[1].split()

    return missing


def _no_program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is None


def _no_package(name: str) -> Callable[[], bool]:
    return lambda: find_spec(name) is None


EXPECTED: dict[str, Callable[[], bool]] = {
    r"root may write everywhere": lambda: os.geteuid() == 0,
    r"Ray is installed": lambda: find_spec("ray") is not None,
    r"Ray is not installed": _no_package("ray"),
    r"lm-eval is not installed": _no_package("lm_eval"),
    r"matplotlib is not installed": _no_package("matplotlib"),
    r"llama[-_.]cpp": _no_package("llama_cpp"),
    r"[Oo]pen[Vv][Ii][Nn][Oo]": _no_package("openvino"),
    r"no .*avx512vnni|no AVX-512 VNNI": _no_cpu_feature("avx512_vnni"),
    r"no .*avx2|x86-64 with AVX2": _no_cpu_feature("avx2"),
    r"nvcc is not installed": _no_program("nvcc"),
    r"g\+\+": _no_program("g++"),
    r"llvm-mca": _no_program("llvm-mca"),
    r"readelf": _no_program("readelf"),
    r"qemu": _no_program("qemu-aarch64"),
    r"smollm2 was not fetched": lambda: SMOLLM2.path() is None,
    r"the folder `shared`": lambda: not (Path(__file__).resolve().parents[2] / "shared").is_dir(),
    r"tell the peak of a part of a run": lambda: not os.access("/proc/self/clear_refs", os.W_OK),
}
"""Reasons for a skip, as regular expressions, each with whether it holds here."""


def unexpected(reasons: Iterable[str]) -> list[str]:
    """The reasons that nothing here gives, sorted, each once."""
    return sorted({reason for reason in reasons if not _holds(reason)})


def _holds(reason: str) -> bool:
    return any(re.search(pattern, reason) and holds() for pattern, holds in EXPECTED.items())


class Account:
    """Collects the reasons of a run, and ends it with failure where one is unexpected and that was asked for."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            self.reasons.append(str(report.longrepr[2]).removeprefix("Skipped: "))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        found = unexpected(self.reasons)
        if not found or hasattr(session.config, "workerinput") or not session.config.getoption(OPTION):
            return
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            for reason in found:
                reporter.write_line(f"UNEXPECTED SKIP: {reason}", red=True)

"""The machines that kernels are tested on: this one, and two ARM cores under qemu-user."""

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from hikui.backends.kernels.replay import Machine, Recorded, Result, link_program
from hikui.lowering.artefact.target import cpu_features

from .sanitised import sanitised_program

ARM_CPUS = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "max"}
X86_FEATURES = {"portable": set[str](), "avx2": {"avx2", "fma"}, "avx512vnni": {"avx512bw", "avx512_vnni"}}
TRIPLES = {"x86_64-linux-gnu": tuple(X86_FEATURES), "aarch64-linux-gnu": tuple(ARM_CPUS)}


@dataclass(frozen=True)
class Runner:
    """Kernels of one instruction set on a machine that has it."""

    isa: str
    machine: Machine

    def run(self, calls: list[Recorded], threads: int = 1) -> list[Result]:
        return self.machine.run(calls, self.isa, threads)


def assert_done(result: Result) -> None:
    """The kernel took its arguments and wrote nowhere beside them."""
    assert result.error == ""
    assert result.whole, "the kernel wrote beside a tensor"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds the replay program of a triple."""

    @cache
    def make(triple: str) -> Path:
        return link_program(triple, TRIPLES[triple], tmp_path_factory.mktemp("replay"))

    return make


@pytest.fixture(scope="session")
def arm(program: Callable[[str], Path]) -> Callable[[str], Machine]:
    """An ARM machine by qemu's name of its CPU."""

    def make(cpu: str) -> Machine:
        if platform.machine() == "aarch64":
            return Machine(program("aarch64-linux-gnu"))
        emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if emulator is None:
            pytest.skip("qemu-aarch64 is not installed")
        return Machine(program("aarch64-linux-gnu"), (emulator, "-cpu", cpu))

    return make


@pytest.fixture(scope="session")
def sanitised(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The portable kernels and the dispatcher, compiled to stop at any error of memory or arithmetic that C forbids."""
    return Machine(sanitised_program(tmp_path_factory.mktemp("sanitised")))


@pytest.fixture(scope="session", params=[*X86_FEATURES, *ARM_CPUS, "sanitised"])
def runner(
    request: pytest.FixtureRequest,
    program: Callable[[str], Path],
    arm: Callable[[str], Machine],
) -> Runner:
    isa = request.param
    if isa == "sanitised":
        return Runner("portable", request.getfixturevalue("sanitised"))
    if isa in ARM_CPUS:
        return Runner(isa, arm(ARM_CPUS[isa]))
    if platform.machine() != "x86_64" or not X86_FEATURES[isa] <= cpu_features():
        pytest.skip(f"this machine has no {isa}")
    return Runner(isa, Machine(program("x86_64-linux-gnu")))

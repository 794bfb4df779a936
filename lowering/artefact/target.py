"""The machines that an artefact can be made for."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from hikui.lowering.errors import HikuiError, UsageError, did_you_mean

_X86_V3 = ("avx2", "bmi2", "f16c", "fma")
_X86_VNNI = (*_X86_V3, "avx512bw", "avx512dq", "avx512f", "avx512vl", "avx512_vnni")
_ARM_V8 = ("asimd", "fp")
_ARM_V82 = (*_ARM_V8, "asimddp", "asimdhp", "atomics", "fphp")


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: what the user writes.
        triple: GNU triple of its userland.
        isas: kernel variants that the artefact carries, best last; the board picks one.
        cpu: LLVM's name of the CPU for the code that is not a kernel.
        attributes: LLVM features added to that CPU's.
        features: what the board must offer, under the names of Linux's /proc/cpuinfo.
        emulator_cpu: `-cpu` of qemu-user that stands for this machine, or None.
        description: one line for `hikui targets`.
        cuda: compute capabilities of the GPU that the artefact carries kernels for; empty for none.
    """

    name: str
    triple: str
    isas: tuple[str, ...]
    cpu: str
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    emulator_cpu: str | None
    description: str
    cuda: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "x86-64", "x86_64-linux-gnu", ("portable", "avx2", "avx512vnni"), "x86-64", (), (), None,
            "any x86-64; the kernels are chosen where they run, from plain C to AVX-512 VNNI",
        ),
        Target(
            "x86-64-v3", "x86_64-linux-gnu", ("avx2",), "x86-64-v3", (), _X86_V3, None,
            "x86-64 with AVX2 (Haswell, Zen and later)",
        ),
        Target(
            "x86-64-vnni", "x86_64-linux-gnu", ("avx2", "avx512vnni"), "x86-64-v4", ("+avx512vnni",), _X86_VNNI, None,
            "x86-64 with AVX-512 VNNI (Ice Lake, Zen 4 and later)",
        ),
        Target(
            "aarch64", "aarch64-linux-gnu", ("neon", "dotprod", "i8mm"), "generic", ("+neon",), _ARM_V8, "cortex-a72",
            "any 64-bit ARM; the kernels are chosen where they run, from ARMv8.0 to i8mm",
        ),
        Target(
            "raspberry-pi-4", "aarch64-linux-gnu", ("neon",), "cortex-a72", ("+neon",), _ARM_V8, "cortex-a72",
            "Raspberry Pi 4: Cortex-A72, ARMv8.0 without dot product",
        ),
        Target(
            "raspberry-pi-5", "aarch64-linux-gnu", ("neon", "dotprod"), "cortex-a76", ("+neon", "+dotprod"), _ARM_V82,
            "cortex-a76", "Raspberry Pi 5: Cortex-A76, ARMv8.2 with dot product",
        ),
        Target(
            "jetson-orin", "aarch64-linux-gnu", ("neon", "dotprod"), "cortex-a78ae", ("+neon", "+dotprod"), _ARM_V82,
            "cortex-a76", "Jetson Orin: Cortex-A78AE, and CUDA kernels for its GPU (sm_87)", ("87",),
        ),
        Target(
            "cuda-sm80", "x86_64-linux-gnu", ("avx2", "avx512vnni"), "x86-64-v3", (), _X86_V3, None,
            "x86-64 with AVX2, and CUDA kernels for an A100 (sm_80)", ("80",),
        ),
        Target(
            "cuda-sm90", "x86_64-linux-gnu", ("avx2", "avx512vnni"), "x86-64-v3", (), _X86_V3, None,
            "x86-64 with AVX2, and CUDA kernels for an H100 or H200 (sm_90a)", ("90a",),
        ),
    )
}  # fmt: skip


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this machine's CPU offers, as Linux names it."""
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def core_count(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may use; the threads of one core count once."""
    firsts = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text()
            firsts.add(int(re.split("[,-]", siblings.strip())[0]))
        except (OSError, ValueError):
            firsts.add(cpu)
    return len(firsts)


def machine_triple() -> str:
    """GNU triple of this machine's userland."""
    return f"{platform.machine()}-linux-gnu"


def missing_features(target: Target) -> tuple[str, ...]:
    """The features that the target needs and this machine lacks, sorted."""
    return tuple(sorted(set(target.features) - cpu_features()))


def resolve(name: str) -> Target:
    """The target of that name; `host` is the best one without a GPU that this machine can run.

    Raises:
        UsageError: no such target.
        HikuiError: `host` on a machine that no target fits.
    """
    if name == "host":
        plain = [target for target in TARGETS.values() if not target.cuda]
        fitting = [t for t in plain if t.triple == machine_triple() and not missing_features(t)]
        if not fitting:
            raise HikuiError(
                f"No target fits this machine ({platform.machine()}); name one of {', '.join(TARGETS)} with --target."
            )
        return max(fitting, key=lambda target: len(target.features))
    if name not in TARGETS:
        hint = did_you_mean(name, [*TARGETS, "host"])
        raise UsageError(f"Target '{name}' is not known; the targets are host, {', '.join(TARGETS)}.{hint}")
    return TARGETS[name]

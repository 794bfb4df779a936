"""What this machine has of what hikui uses."""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hikui.lowering.artefact.target import TARGETS, machine_triple, missing_features

_PACKAGES = ("torch", "transformers", "apache-tvm", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "numpy", "scipy")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        found: version or place; None where it is missing.
        required: hikui cannot lower for this machine without it.
    """

    name: str
    found: str | None
    needed_for: str
    remedy: str
    required: bool = False


def examine() -> list[Finding]:
    """Looks for packages, compilers and emulators; imports none of them."""
    findings = [Finding("Python", platform.python_version(), "hikui", "install Python 3.11 or later", True)]
    for name in _PACKAGES:
        findings.append(Finding(name, _installed(name), "hikui", "pip install hikui", True))
    fitting = [t.name for t in TARGETS.values() if t.triple == machine_triple() and not missing_features(t)]
    findings.append(
        Finding(
            f"targets for this CPU ({platform.machine()})", ", ".join(fitting) or None, "running artefacts here",
            "use a CPU with AVX2 and FMA, or an ARMv8 one",
        )
    )  # fmt: skip
    findings.append(
        Finding(
            "C++ compiler",
            _program("g++", "clang++"),
            "target host",
            "apt-get install g++, or pip install 'hikui[cross]'",
        )
    )
    for triple in sorted({target.triple for target in TARGETS.values()} - {machine_triple()}):
        machine = triple.partition("-")[0]
        package = f"g++-{triple.replace('_', '-')}"
        findings.append(
            Finding(
                f"{triple} compiler", _program(f"{triple}-g++"), f"targets of {triple}", f"apt-get install {package}"
            )
        )
        findings.append(
            Finding(
                f"qemu-{machine}",
                _program(f"qemu-{machine}"),
                "running foreign artefacts here",
                "apt-get install qemu-user",
            )
        )
        sysroot = Path("build") / f"sysroot-{machine}"
        findings.append(
            Finding(
                f"{machine} sysroot", str(sysroot) if (sysroot / "stamp").is_file() else None,
                "running foreign ONNX Runtime artefacts here", "make sysroot, in hikui's checkout",
            )
        )  # fmt: skip
    findings.append(
        Finding(
            "ziglang", _installed("ziglang"), "compilers for every target and old glibc", "pip install 'hikui[cross]'"
        )
    )
    return findings


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _program(*names: str) -> str | None:
    """Path and version line of the first of these programs that is installed."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        lines = answer.stdout.splitlines()
        return lines[0] if lines else path
    return None

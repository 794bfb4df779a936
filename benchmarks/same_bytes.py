"""What bytes that are equal on every make of x86-64 CPU would cost, and whether the switches give them.

    python -m benchmarks.same_bytes --calibration TEXT [--recipe gptq-qep-3bit] [--rounds 3] [--emulate Haswell]

torch's vector code and its BLAS choose by the CPU. ATEN_CPU_CAPABILITY=avx2 fixes the first, MKL_CBWR=COMPATIBLE is the
only value of the second's switch that CPUs of several makes share. First `lower` with and without them, in turn; then
which operations give other bits in an emulated CPU of another make (qemu-user) with them set. Prints both.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SWITCHES = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}


def digests() -> dict[str, str]:
    """A digest of what each operation gives on one thread, from inputs that no operation has made."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    generator = np.random.default_rng(0)

    def drawn(*shape: int) -> torch.Tensor:
        # Integers over a power of two, so that no CPU's mathematics is in them.
        return torch.from_numpy(generator.integers(-(1 << 20), 1 << 20, shape).astype(np.float32)) / (1 << 19)

    narrow, wide, other = drawn(96, 256), drawn(600, 1100), drawn(256, 192)
    definite = wide.double().T @ wide.double() + 50 * torch.eye(1100, dtype=torch.float64)
    operations: dict[str, Callable[[], torch.Tensor]] = {
        "float32 product": lambda: wide @ wide.T,
        "float64 product": lambda: wide.double().T @ wide.double(),
        "small product": lambda: narrow @ other,
        "matrix times vector": lambda: narrow @ other[:, 0],
        "batched product": lambda: torch.bmm(wide[:40].reshape(4, 10, 1100), wide[:40].reshape(4, 10, 1100).mT),
        "Cholesky factor": lambda: torch.linalg.cholesky(definite),
        "eigenvalues": lambda: torch.linalg.eigvalsh(definite[:200, :200]),
        "singular values": lambda: torch.linalg.svdvals(narrow.double()),
        "softmax": lambda: torch.softmax(narrow, -1),
        "sum": lambda: wide.sum(-1),
        "SiLU": lambda: torch.nn.functional.silu(narrow),
        **{
            f"{name} of {dtype}".replace("torch.", ""): lambda name=name, dtype=dtype: getattr(torch, name)(
                (narrow.abs() + 0.5).to(dtype)
            )
            for name in ("exp", "log", "sqrt", "rsqrt", "sin", "tanh", "erf")
            for dtype in (torch.float32, torch.float64)
        },
    }
    return {
        name: hashlib.sha256(operation().contiguous().numpy().tobytes()).hexdigest()
        for name, operation in operations.items()
    }


def lowering(arguments: list[str], output: Path, environment: dict[str, str]) -> float:
    """Seconds that `lower` takes."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "hikui.lowering.app.cli", "lower", *arguments, "--no-resume", "-o", str(output)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    return time.perf_counter() - start


def told(emulator: list[str], environment: dict[str, str]) -> dict[str, str]:
    """`digests` of another process."""
    command = [*emulator, sys.executable, "-m", "benchmarks.same_bytes", "--digests"]
    answer = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    return dict(line.split("\t") for line in answer.stdout.splitlines() if "\t" in line)


def main() -> None:
    """Prints the times of both, and the operations that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--recipe", default="gptq-qep-3bit")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--emulate", default="Haswell", help="a CPU that `qemu-x86_64 -cpu help` lists")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.digests:
        for name, digest in digests().items():
            print(f"{name}\t{digest}")
        return
    arguments = [options.model, "--recipe", options.recipe]
    if options.calibration is not None:
        arguments += ["--calibration", str(options.calibration)]
    with tempfile.TemporaryDirectory() as folder:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.rounds):
            for switched, kept in times.items():
                kept.append(lowering(arguments, Path(folder) / "artefact", SWITCHES if switched else {}))
    plain, switched = (statistics.median(times[which]) for which in (False, True))
    for which, median in ((False, plain), (True, switched)):
        spread = f"{min(times[which]):.1f}–{max(times[which]):.1f}"
        print(f"{'with' if which else 'without'} the switches: {median:.1f} s ({spread}), ×{median / plain:.2f}")
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        print("no qemu-x86_64: other makes of CPU were not looked at")
        return
    for environment in ({}, SWITCHES):
        here, there = told([], environment), told([emulator, "-cpu", options.emulate], environment)
        differing = [name for name in here if here[name] != there[name]]
        kind = "with the switches" if environment else "without"
        print(
            f"{kind}, {len(differing)} of {len(here)} operations differ from {options.emulate}: {', '.join(differing)}"
        )


if __name__ == "__main__":
    main()

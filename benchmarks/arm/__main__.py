"""Measures all integer kernels on three emulated ARM CPUs: `make bench-arm`.

Writes benchmarks/results/arm.json, a list of {name, bits, m, n, k, cpu, isa, kernel, instructions_per_mac,
cycles_per_mac (Neoverse N1), cycles_per_mac_a55 (Cortex-A55)}. Products, the preparation of activations that some
kernels need, and quantisation have rows of their own; all are divided by the product's M·N·K. Cycles are what llvm-mca
estimates for the inner loop alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arm.cycles import MODELS, UnestimatedError, cycles_per_mac, inner_loop
from hikui.backends.kernels.build import HEADER, build, compiler
from hikui.backends.kernels.isa import ternary
from hikui.backends.kernels.symbols import SYMBOLS, kept
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format

TRIPLE = "aarch64-linux-gnu"
CPUS = {"cortex-a72": "neon", "cortex-a76": "dotprod", "max": "i8mm"}
FORMATS = ("sign", "int2", "ternary", "int3", "int4", "nf4", "fp4", "int8", "mixed")
_NAMES = {"mixed": "mixed-g128-c768", "ternary": "ternary-channel"}
"""Formats that are not measured in groups of 128; lines of ternary codes fill none."""

ROWS = (1, 16)
N, K = 512, 4096
_HERE = Path(__file__).resolve().parent


class Counted(NamedTuple):
    """What a call said of itself, and its instructions."""

    isa: str
    kernel: str
    prepares: bool
    instructions: int


class Bench:
    """The program that calls kernels, and the plugin that counts.

    Args:
        folder: where both and the kernels' objects go.

    Raises:
        HikuiError: the emulator or a compiler is missing.
    """

    def __init__(self, folder: Path) -> None:
        emulator = shutil.which("qemu-aarch64")
        if emulator is None:
            raise HikuiError("qemu-aarch64 is not here; install Debian's qemu-user.")
        objects = build(TRIPLE, tuple(CPUS.values()), folder)
        self.objects = {path.name: path for path in objects.paths}
        self._program, plugin = folder / "call", folder / "count.so"
        (folder / "symbols.inc").write_text(kept(SYMBOLS))
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-static"]
        flags += [f"-I{HEADER.parent}", f"-I{folder}"]
        sources = [str(_HERE / "call.c"), *map(str, objects.paths)]
        subprocess.run([*compiler(TRIPLE), *flags, *sources, "-o", str(self._program)], check=True)
        host = shutil.which("cc") or shutil.which("gcc")
        if host is None:
            raise HikuiError("No C compiler for this machine is here, which the counting plugin needs.")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([host, *flags, str(_HERE / "count.c"), "-o", str(plugin)], check=True)
        self._emulator = (emulator, "-plugin", str(plugin))

    def count(self, cpu: str, fmt: Format, stage: str, m: int) -> Counted:
        """Instructions of one call: the difference of a process with three and one with one, halved."""
        one, three = (self._run(cpu, fmt, stage, m, times) for times in (1, 3))
        return one._replace(instructions=(three.instructions - one.instructions) // 2)

    def _run(self, cpu: str, fmt: Format, stage: str, m: int, times: int) -> Counted:
        lines, groups = fmt.weight_shape(N, K)[1], fmt.groups(K)
        split = fmt.columns // fmt.group_size(K) if fmt.columns else groups
        numbers = (times, m, N, K, lines, groups, split, fmt.group_size(K) // 32)
        run = subprocess.run(
            [*self._emulator, "-cpu", cpu, str(self._program), fmt.kind, stage, *map(str, numbers)],
            env={**os.environ, "HIKUI_ISA": CPUS[cpu]},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise HikuiError(f"Calling {fmt} kernels on {cpu} ended with {run.returncode}: {run.stderr.strip()}")
        isa, kernel, prepares = run.stdout.strip().split("\t")
        return Counted(isa, kernel, prepares == "1", int(run.stderr.split()[-1]))

    def cycles(self, isa: str, kind: str, m: int, kernel: str) -> dict[str, float | None]:
        """Cycles by multiply-accumulate on each model, None where there is no estimate; says why."""
        out: dict[str, float | None] = dict.fromkeys(MODELS)
        size = "single" if m == 1 else "many"
        if kind == "mixed":
            print(f"{kind} on {isa}: no cycles, its two segments have a loop each", file=sys.stderr)
            return out
        symbol = f"hikui_linear_a8_{kind}_{size}__{isa}"
        for model in MODELS:
            try:
                loop = inner_loop(self.objects[f"{symbol}.o"], symbol)
                # Two products with states are one with codes.
                share = 2 if kernel.endswith(ternary.NAME) else 1
                out[model] = round(cycles_per_mac(loop, model) * share, 4)
            except UnestimatedError as reason:
                print(f"{kind}, M={m}, {isa}: {reason}", file=sys.stderr)
        return out


def _row(name: str, bits: float, m: int, cpu: str, counted: Counted, cycles: dict[str, float | None]) -> dict[str, Any]:
    return {
        "name": name,
        "bits": round(bits, 4),
        "m": m,
        "n": N,
        "k": K,
        "cpu": cpu,
        "isa": counted.isa,
        "kernel": counted.kernel,
        "instructions_per_mac": round(counted.instructions / (m * N * K), 4),
        "cycles_per_mac": cycles.get("neoverse-n1"),
        "cycles_per_mac_a55": cycles.get("cortex-a55"),
    }


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every row of the result."""
    for cpu in CPUS:
        for m in ROWS:
            quantized = bench.count(cpu, Format.parse("int8-g128"), "quantize", m)
            yield _row("quantize activations", 8, m, cpu, quantized._replace(kernel="quantize"), {})
            for kind in FORMATS:
                fmt = Format.parse(_NAMES.get(kind, f"{kind}-g128"))
                bits = fmt.true_bits(N, K)
                product = bench.count(cpu, fmt, "product", m)
                yield _row(str(fmt), bits, m, cpu, product, bench.cycles(product.isa, kind, m, product.kernel))
                if product.prepares:
                    prepared = bench.count(cpu, fmt, "prepare", m)
                    yield _row(f"{fmt}: prepare activations", bits, m, cpu, prepared, {})


def main() -> None:
    """Measures, prints each row, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/arm.json"))
    options = parser.parse_args()
    rows = []
    print(f"{'name':36} {'M':>3} {'cpu':11} {'instructions':>12} {'N1 cycles':>9} {'A55':>7}  kernel")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in measure(Bench(Path(folder))):
                rows.append(row)
                n1, a55 = (
                    f"{value:.4f}" if value else "–" for value in (row["cycles_per_mac"], row["cycles_per_mac_a55"])
                )
                counted = f"{row['m']:3} {row['cpu']:11} {row['instructions_per_mac']:12.4f}"
                print(f"{row['name']:36} {counted} {n1:>9} {a55:>7}  {row['kernel']}", flush=True)
        except HikuiError as error:
            sys.exit(str(error))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

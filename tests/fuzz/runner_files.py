"""Builds and runs the fuzz target of the board runner's files with GCC alone, under the sanitisers.

python -m tests.fuzz.runner_files --runs 2000000        writes benchmarks/results/fuzz.json
"""

import argparse
import json
import platform
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.kernels.report import cpu

_SOURCE = Path(__file__).with_suffix(".cc")
_ROOT = Path(__file__).resolve().parents[2]
_RESULT = _ROOT / "benchmarks" / "results" / "fuzz.json"
_OPTIONS = (
    "-std=c++17", "-O1", "-g1", "-w", "-DHIKUI_STANDALONE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
)  # fmt: skip

INDEX_TEXT = f"""hikui-tvm 1
target host {platform.machine()}-linux-gnu -
context 32
vocabulary 61
cache 2 8
cache 2 8 int8
cache 2 8 int4
eos 2
eos 60
feature avx2
parameters 1024
weight int8 0 64 2 8 8 a
weight float16 64 4 1 2 b
weight float32 128 0 1 0 c
weight int64 192 8 0 d
end
"""
_TOKENS = b"HKTK" + struct.pack("<I5I", 4, 0, 1, 1, 3, 6) + b"abcdef"


@dataclass(frozen=True)
class Counts:
    """What the inputs ended in; a crash ends the run with an error instead."""

    runs: int
    read: int
    refused: int


def build(directory: Path) -> Path:
    """The program, and beside it the valid files that it mutates."""
    program = directory / "runner_files"
    # Not -I: one of the headers has the name of a system's.
    include = f"-iquote{_ROOT / 'backends' / 'tvm' / 'native'}"
    subprocess.run(["g++", *_OPTIONS, include, str(_SOURCE), "-o", str(program)], check=True)
    (directory / "index0").write_text(INDEX_TEXT)
    (directory / "tokens1").write_bytes(_TOKENS)
    (directory / "ids2").write_text("1,2 3\n60,2147483647")
    return program


def fuzz(program: Path, *, seed: int, runs: int) -> Counts:
    """Mutates each file in turn; the first three runs are the files themselves.

    Raises:
        RuntimeError: an input ended in a signal, or in a report of a sanitiser.
    """
    files = [str(program.parent / name) for name in ("index0", "tokens1", "ids2")]
    done = subprocess.run([str(program), str(seed), str(runs), *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"seed {seed} ended with {done.returncode}")
    return Counts(*map(int, done.stdout.split()))


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        program, start = build(Path(scratch)), time.perf_counter()
        counts = fuzz(program, seed=options.seed, runs=options.runs)
        seconds = round(time.perf_counter() - start, 1)
    result = {**counts.__dict__, "crashes": 0, "seconds": seconds, "seed": options.seed, "cpu": cpu()}
    _RESULT.write_text(json.dumps({"runner_files": result}, indent=1, sort_keys=True) + "\n")
    print(_RESULT.read_text(), end="")


if __name__ == "__main__":
    main()

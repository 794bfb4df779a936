"""Peak memory of lowering a large checkpoint, over what the interpreter takes by itself.

    python -m benchmarks.lower_memory [--preset llama-1b] [--checkpoint DIR] [--recipe int4] [--backend tvm]
        [--allowed 2]

Writes a checkpoint of random weights (or takes one), lowers it in a child process, and compares the child's largest
resident set with that of a child that only imports what lowering imports. Linux counts pages of mapped files that were
touched as resident, so this is an upper bound of what must fit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = (
    "import hikui.lowering.app.lower, hikui.backends.tvm, hikui.backends.onnxruntime, torch, transformers, onnx, tvm"
)


def peak(command: list[str]) -> tuple[int, float]:
    """Largest resident set in bytes and seconds of a command.

    Raises:
        SystemExit: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> None:
    """Prints the figures; exit status 1 where lowering takes more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--target", default="host")
    parser.add_argument("--allowed", type=float, default=2.0, help="GB above the interpreter's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            subprocess.run([sys.executable, "-m", "hikui.models.synthetic", options.preset, checkpoint], check=True)
        own, _ = peak([sys.executable, "-c", IMPORTS])
        output = Path(folder) / "artefact"
        choices = ["--recipe", options.recipe, "--backend", options.backend, "--target", options.target]
        lower = [sys.executable, "-m", "hikui.lowering.app.cli", "lower", str(checkpoint), *choices, "-o", str(output)]
        taken, seconds = peak(lower)
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    figures = {
        "checkpoint": options.preset if options.checkpoint is None else checkpoint.name,
        "recipe": options.recipe,
        "backend": options.backend,
        "interpreter_bytes": own,
        "lower_bytes": taken,
        "above_interpreter_bytes": taken - own,
        "artefact_bytes": size,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    above = (taken - own) / 1e9
    if above > options.allowed:
        raise SystemExit(f"It takes {above:.2f} GB above the interpreter's own; {options.allowed:g} GB are allowed.")


if __name__ == "__main__":
    main()

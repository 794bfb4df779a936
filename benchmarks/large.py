"""Peak memory and time of quantising a large checkpoint block by block, and where the time goes.

    python -m benchmarks.large --checkpoint DIR --calibration TEXT [--pipeline 'gptq{bits=4,group=128}'] [--blocks 2]
        [--samples 32] [--tokens 256] [--json FILE]

Write a checkpoint of Llama-2-7B's shape with `python -m hikui.models.synthetic llama-7b DIR`. Only the first blocks are
quantised, in a child process with a scratch folder, as `hikui lower` does it. Seconds are those of the caller's thread:
`weights` is loading what the texts meet, packed matrices unpacked; `forward` is the rest of what they take through the
graph, `sums` the Gram and cross matrices, `factor` Cholesky factors, `correction` the solves of error propagation,
`rounding` everything else that makes codes and packs them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("weights", "forward", "sums", "factor", "correction", "rounding")


def timed(owner: Any, name: str, phase: str, spent: dict[str, float]) -> None:
    """Replaces a function by one that books its time; what it calls that is booked elsewhere is not counted twice."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), sum(spent.values())
        try:
            return function(*args, **kwargs)
        finally:
            taken = time.perf_counter() - start
            spent[phase] += taken - (sum(spent.values()) - before)

    setattr(owner, name, wrapper)


def child(options: argparse.Namespace) -> None:
    """Quantises the first blocks and prints the figures."""
    import torch

    from hikui.lowering.app.lower import read_calibration
    from hikui.lowering.engine.streaming import Stream
    from hikui.lowering.pipeline.contract import PassContext
    from hikui.lowering.pipeline.recipe import CalibrationSettings
    from hikui.lowering.pipeline.run import Pipeline
    from hikui.lowering.pipeline.text import parse_pipeline
    from hikui.lowering.trace import trace
    from hikui.passes import PASSES
    from hikui.passes.measure import linalg
    from hikui.passes.measure.evidence import Sums
    from hikui.passes.quantise import walk
    from hikui.passes.quantise.quantiser import Packer

    spent = dict.fromkeys(PHASES, 0.0)
    timed(Stream, "_loaded", "weights", spent)
    timed(Stream, "advance", "forward", spent)
    timed(Sums, "add", "sums", spent)
    timed(Sums, "evidence", "sums", spent)
    timed(linalg, "factor_upper", "factor", spent)
    timed(walk, "correct", "correction", spent)
    timed(Packer, "pack", "rounding", spent)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        start = time.perf_counter()
        program = trace(options.checkpoint, scratch=Path(folder), context=options.context)
        traced = time.perf_counter() - start
        settings = CalibrationSettings(samples=options.samples, tokens=options.tokens)
        data = read_calibration(program, options.calibration, settings)
        said: list[str] = []
        context = PassContext(data, Path(folder), announce=said.append)
        program = Pipeline(parse_pipeline("canonicalise", PASSES)).run(program, context)
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        Pipeline(parse_pipeline(options.pipeline, PASSES)).run(program, context)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "pipeline": options.pipeline,
        "windows": f"{options.samples}x{options.tokens}",
        "threads": torch.get_num_threads(),
        "estimate": said,
        "trace_seconds": round(traced, 1),
        "seconds_per_block": round(seconds / options.blocks, 1),
        "phases": {name: round(taken / options.blocks, 1) for name, taken in spent.items()},
        "other": round((seconds - sum(spent.values())) / options.blocks, 1),
        "peak_bytes": peak,
        "peak_bytes_before": floor,
    }
    print(json.dumps(figures))


def main() -> None:
    """Prints a line of figures for each pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--pipeline", action="append", help="may be repeated; SITES stands for the first blocks")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.pipeline = options.pipeline[0]
        child(options)
        return
    first = rf"layers\.({'|'.join(map(str, range(options.blocks)))})\."
    rows = []
    for pipeline in options.pipeline or ["rtn{bits=4,group=128,SITES}", "gptq{bits=4,group=128,SITES}"]:
        chosen = pipeline.replace("SITES", f'sites="{first}"')
        given = {name: getattr(options, name) for name in ("checkpoint", "calibration", "blocks", "samples", "tokens")}
        given |= {name: value for name in ("context", "scratch") if (value := getattr(options, name)) is not None}
        command = [sys.executable, "-m", "benchmarks.large", "--child", "--pipeline", chosen]
        command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""The low-rank branch fused into the product, beside the same branch as separate calls.

    python -m benchmarks.branch --calibration TRAIN.txt [--model DIR] [--tokens 64] [--rounds 9] [--json FILE]

Lowers the recipe `int4-branch` with and without `fuse{branch}`: the largest difference in the reference interpreter,
the kernel calls of one step as each backend's own program lists them, and the time of a decoding step, in alternating
rounds.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.lower import BACKENDS, build, prepare
from hikui.lowering.app.request import Request, load_recipe
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.ir.interpreter import ReferenceRunner


def kernel_calls(artefact: Artefact) -> Counter[str]:
    """How often one step calls each kernel, read from what the backend wrote."""
    if artefact.manifest.backend == "onnxruntime":
        import onnx

        (path,) = artefact.directory.glob("*.onnx")
        return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
    import tvm

    text = tvm.runtime.load_module(str(artefact.directory / "model.so"))["as_text"]()
    calls = re.findall(r"call\s+(\S+)", text)
    return Counter(name for name in calls if not name.startswith("vm."))


def step_seconds(runner: Runner, tokens: int) -> float:
    """Mean time of a decoding step."""
    runner.reset()
    runner.forward(np.zeros(1, np.int64), 0)
    start = time.perf_counter()
    for past in range(1, tokens):
        runner.forward(np.zeros(1, np.int64), past)
    return (time.perf_counter() - start) / (tokens - 1)


def difference(one: Prepared, other: Prepared) -> float:
    """Largest relative difference of two programs' logits in the interpreter, over a prefill and four steps."""
    tokens = np.random.default_rng(0).integers(0, one.program.config.vocabulary, 20)
    rows = []
    for prepared in (one, other):
        runner = ReferenceRunner(prepared.program)
        parts = [runner.forward(tokens[:16], 0), *(runner.forward(tokens[at : at + 1], at) for at in range(16, 20))]
        rows.append(np.concatenate(parts))
    return float(np.abs(rows[0] - rows[1]).max() / np.abs(rows[0]).max())


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = load_recipe("int4-branch")
    fused = prepare(Request(options.model, recipe, calibration=options.calibration))
    unfused = prepare(
        Request(options.model, recipe.with_options({"fuse": {"branch": False}}), calibration=options.calibration)
    )
    sites = sum(node.target is torch.ops.hikui.linear_a8_branch.default for node in fused.program.graph.nodes)
    figures: dict[str, object] = {"sites": sites, "interpreter_difference": difference(fused, unfused)}
    with tempfile.TemporaryDirectory() as folder:
        for backend in BACKENDS:
            pair = {
                name: build(prepared, Path(folder) / f"{backend}-{name}", backend=backend)
                for name, prepared in (("fused", fused), ("unfused", unfused))
            }
            runners = {name: open_runner(artefact) for name, artefact in pair.items()}
            times: dict[str, list[float]] = {name: [] for name in runners}
            for _ in range(options.rounds + 1):
                for name, runner in runners.items():
                    times[name].append(step_seconds(runner, options.tokens))
            calls = {name: sum(kernel_calls(artefact).values()) for name, artefact in pair.items()}
            ratios = sorted(a / b for a, b in zip(times["fused"][1:], times["unfused"][1:], strict=True))
            figures[backend] = {
                "calls": calls,
                "fewer_calls_a_site": (calls["unfused"] - calls["fused"]) / sites,
                "step_microseconds": {name: round(1e6 * statistics.median(t[1:]), 1) for name, t in times.items()},
                "fused_over_unfused": {
                    "median": round(statistics.median(ratios), 3),
                    "least": round(ratios[0], 3),
                    "most": round(ratios[-1], 3),
                },
            }
            for runner in runners.values():
                runner.close()
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

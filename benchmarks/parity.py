"""Do all ways to run a lowered model say the same?

Lowers each model once for every backend and target, generates greedily from one prompt with each artefact and with the
reference interpreter of the lowered graph, and compares tokens and logits:

    python -m benchmarks.parity [--model DIR …] [--recipe int4] [--tokens 64] [--json FILE]

The logits are compared along the interpreter's tokens, relative to the largest logit of a step. Where a token differs,
the gap between the two highest logits of that step tells whether the tolerance explains it.

Rounding activations to int8 is not continuous: two sums that differ in the last bit can round to different codes, the
difference stays in the cache, and from then on the logits differ by what int8 itself costs. So the interpreter is also
compared with itself after its embedding is changed by about one unit in the last place, several times over: what that
does is the floor that no other program can be asked to stay below.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hikui.lowering.app.lower import build, prepare
from hikui.lowering.app.request import Request
from hikui.lowering.app.runners import is_foreign, open_runner
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program

TOLERANCE = 1e-3
CONTROLS = 4
WAYS = tuple(
    (backend, target) for target in ("host", "raspberry-pi-4", "raspberry-pi-5") for backend in ("tvm", "onnxruntime")
)
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Row:
    """One artefact beside the interpreter.

    Attributes:
        equal: how many of the greedy tokens are the interpreter's before the first that is not.
        gap: of the two highest logits where the first token differs, over the largest logit; None where all are equal.
        error: difference of the logits over the largest logit, the median of all steps.
        largest_error: of all steps.
        floor: largest error of the interpreter against itself, its embedding changed in the last place.
        close_steps: steps before the first whose error passes the tolerance.
    """

    model: str
    backend: str
    target: str
    tokens: int
    equal: int
    gap: float | None
    error: float
    largest_error: float
    floor: float
    close_steps: int
    build_seconds: float
    run_seconds: float
    text: str


def follow(runner: Runner, prompt: Sequence[int], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits [len(tokens), V] of the steps that chose `tokens`."""
    runner.reset()
    rows = [runner.forward(np.asarray(prompt, np.int64), 0)[-1]]
    for at, token in enumerate(tokens[:-1]):
        rows.append(runner.forward(np.array([token], np.int64), len(prompt) + at)[-1])
    return np.stack(rows)


def greedy(runner: Runner, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens; no token stops it."""
    runner.reset()
    out: list[int] = []
    step, past = np.asarray(prompt, np.int64), 0
    for _ in range(count):
        logits = runner.forward(step, past)[-1]
        past += step.size
        out.append(int(logits.argmax()))
        step = np.array([out[-1]], np.int64)
    return out


def errors(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Relative error of each step."""
    return np.asarray(np.abs(logits - reference).max(axis=1) / np.abs(reference).max(axis=1), np.float32)


def nudged(program: Program, seed: int) -> Program:
    """The program with every embedding changed by about one unit in the last place."""
    clone = program.clone()
    table = next(node.args[0] for node in clone.graph.nodes if node.target is torch.ops.aten.embedding.default)
    key = clone.weight_of(table)
    value = clone.store.load(key)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * 2**-23
    clone.store.put(key, value * (1 + noise))
    return clone


def compare(model: str, recipe: str, count: int, calibration: Path | None) -> list[Row]:
    """All ways for one model."""
    prepared = prepare(Request(model, recipe, calibration=calibration))
    program = prepared.program
    assert program.tokenizer is not None, "the models of this comparison have tokenizers"
    codec = TextCodec(program.tokenizer)
    prompt = codec.encode_prompt(PROMPT)
    reference = ReferenceRunner(program)
    want = greedy(reference, prompt, count)
    logits = follow(reference, prompt, want)
    floor = max(
        float(errors(follow(ReferenceRunner(nudged(program, seed)), prompt, want), logits).max())
        for seed in range(CONTROLS)
    )
    rows = []
    for backend, target in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            artefact = build(prepared, Path(folder) / "out", target=target, backend=backend)
            built = time.perf_counter()
            runner = open_runner(artefact, emulate=is_foreign(artefact))
            got = greedy(runner, prompt, count)
            error = errors(follow(runner, prompt, want), logits)
            runner.close()
            done = time.perf_counter()
        same = next((at for at in range(count) if got[at] != want[at]), count)
        gap = None
        if same < count:
            second, first = np.sort(logits[same])[-2:]
            gap = float((first - second) / np.abs(logits[same]).max())
        rows.append(
            Row(
                prepared.name, backend, artefact.manifest.target.name, count, same, gap, float(np.median(error)),
                float(error.max()), floor, next((at for at in range(count) if error[at] > TOLERANCE), count),
                built - start, done - built, codec.decode(got),
            )
        )  # fmt: skip
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row for people."""
    verdict = "equal" if row.gap is None else f"part after {row.equal}, gap {row.gap:.1e}"
    return (
        f"{row.model:20} {row.backend:12} {row.target:15} {row.tokens} tokens: {verdict}; "
        f"logits off by {row.error:.0e} (median), {row.largest_error:.0e} (largest; floor {row.floor:.0e}), "
        f"{row.close_steps} steps until a code flips; "
        f"build {row.build_seconds:.0f} s, run {row.run_seconds:.0f} s"
    )


def main() -> None:
    """Compares all ways; exit status 1 where one leaves the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="folder, or `reference` (the default)")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        row
        for model in options.model or ["reference"]
        for row in compare(model, options.recipe, options.tokens, options.calibration)
    ]
    print("\nText of the first:", rows[0].text)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    bad = [row for row in rows if row.largest_error > max(TOLERANCE, 2 * row.floor)]
    parted = [row for row in rows if (row.gap or 0.0) > max(TOLERANCE, 2 * row.floor)]
    if bad or parted:
        raise SystemExit(f"Of {len(rows)} ways, {len(bad)} leave the floor and {len(parted)} choose another token.")
    print(f"All {len(rows)} ways agree within {TOLERANCE:g}, or twice the floor where a code flips.")


if __name__ == "__main__":
    main()

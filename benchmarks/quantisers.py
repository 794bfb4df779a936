"""Every quantiser with and without error propagation, at several bits and groups, on real text.

    python -m benchmarks.quantisers --text VALID --calibration TRAIN --json FILE [--model DIR] [--documents 60]
        [--bits 4,3,2] [--groups 64,128,0] [--seeds 3] [--jobs 2] [--only METHOD|…]

Weights only: activations stay in float32 and the head is int8 in groups of 64, so that what differs is the quantiser.
Each program runs in the interpreter, per document with BOS. What a method draws from the calibration text is drawn with
several seeds; what reads no text runs once. Finished runs are kept in the JSON file, and a second start goes on.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

from hikui.lowering import driver, evaluation, protocols, sizes, text
from hikui.lowering.interpreter import ReferenceRunner
from hikui.lowering.jobs import Jobs
from hikui.lowering.passes_base import PassContext
from hikui.lowering.pipeline import Pipeline
from hikui.lowering.program import Program
from hikui.lowering.recipe import CalibrationSettings, Recipe
from hikui.lowering.trace import trace

METHODS: dict[str, list[object]] = {
    "rtn, minmax": [{"rtn": {"clip": "minmax"}}],
    "rtn, mse": [{"rtn": {}}],
    "hqq": [{"hqq": {}}],
    "awq": [{"calibrate": {"gram": True}}, {"awq": {}}, {"rtn": {"clip": "output"}}],
    "gptq": [{"gptq": {"act_order": False, "clip": "minmax"}}],
    "gptq, mse, act order": [{"gptq": {}}],
    "rotation, gptq": [{"rotate": {}}, {"gptq": {}}],
}
"""The passes of each method; the last one rounds, and error propagation is put before it."""

WITHOUT_TEXT = ("rtn, minmax", "rtn, mse", "hqq")


@dataclass(frozen=True)
class Run:
    """One program to make and measure; `group` 0 is the channel."""

    model: str
    text: str
    calibration: str
    documents: int
    method: str
    qep: bool
    bits: int
    group: int
    seed: int

    @property
    def key(self) -> str:
        """What tells it from others."""
        return json.dumps(self.named, sort_keys=True)

    @property
    def named(self) -> dict[str, object]:
        """The run with the names of its files, which say the same on every machine."""
        names = {name: Path(getattr(self, name)).name for name in ("model", "text", "calibration")}
        return {**asdict(self), **names}

    @property
    def passes(self) -> list[object]:
        """Its recipe's passes."""
        steps = []
        for step in METHODS[self.method]:
            assert isinstance(step, dict)
            ((name, options),) = step.items()
            takes = {} if name in ("calibrate", "rotate") else {"bits": self.bits, "group": self.group}
            steps.append({name: {**options, **takes}})
        if self.qep:
            steps.insert(len(steps) - 1, {"qep": {"skip": r"(^|\.)lm_head$"}})
        head = {"sites": r"(^|\.)lm_head$", "format": "int8-g64", "required": False}
        return ["canonicalise", {"override": head}, *steps]


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """The grid."""
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    for bits in map(int, options.bits.split(",")):
        for group in map(int, options.groups.split(",")):
            for method in options.only.split("|") if options.only else METHODS:
                for qep in (False, True):
                    for seed in range(options.seeds if qep or method not in WITHOUT_TEXT else 1):
                        yield Run(
                            model, str(options.text), str(options.calibration), options.documents, method, qep, bits,
                            group, seed,
                        )  # fmt: skip


class Bench:
    """A model and the documents that it is measured on, traced and encoded once a process."""

    def __init__(self, model: str, path: str, count: int) -> None:
        self.program = trace(driver.model_source(model))
        assert self.program.tokenizer is not None, "the models of this table have tokenizers"
        self._codec, config = text.TextCodec(self.program.tokenizer), self.program.config
        self._bos = config.bos_token_id
        self._documents = protocols.encode_documents(
            text.read_documents(Path(path)), self._codec, bos=self._bos, context=config.context_length, limit=count
        )
        self.reference = self.bits(self.program)

    def bits(self, program: Program) -> float:
        """Bits per character of a program."""
        runner = ReferenceRunner(program)
        return evaluation.quality(runner, self._documents, self._codec, bos=self._bos)[0].bits_per_char


bench = lru_cache(maxsize=1)(Bench)


def measure(run: Run) -> dict[str, object]:
    """Makes and measures one program."""
    there = bench(run.model, run.text, run.documents)
    steps = Recipe.model_validate({"schema": 1, "name": run.method, "passes": run.passes})
    settings = CalibrationSettings(seed=run.seed)
    data = driver.read_calibration(there.program, Path(run.calibration), settings)
    start = time.perf_counter()
    program = Pipeline(steps.build(driver.available_passes())).run(there.program, PassContext(data))
    seconds = time.perf_counter() - start
    return {
        **run.named,
        "bits_per_char": there.bits(program),
        "float_bits_per_char": there.reference,
        "true_bpw": sizes.measure(program).true_bpw,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: bits per character above float, the mean over seeds ± their standard deviation."""
    settings = sorted(
        {(int(str(row["bits"])), int(str(row["group"]))) for row in rows}, key=lambda s: (-s[0], s[1] or 1 << 20)
    )
    names = [f"{bits} bits, {f'g{group}' if group else 'channel'}" for bits, group in settings]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method in METHODS:
        for qep in (False, True):
            cells = []
            for bits, group in settings:
                found = [
                    float(str(row["bits_per_char"])) - float(str(row["float_bits_per_char"])) for row in rows
                    if (row["method"], row["qep"], row["bits"], row["group"]) == (method, qep, bits, group)
                ]  # fmt: skip
                spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
                cells.append(f"{mean(found):+.4f}{spread}" if found else "")
            if any(cells):
                lines.append(f"| {method}{', QEP' if qep else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="64,128,0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="methods, separated by |")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    kept: dict[str, dict[str, object]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    todo = [run for run in runs(options) if run.key not in kept]
    start = time.perf_counter()
    for done, (index, result) in enumerate(Jobs(options.jobs).results(measure, todo), 1):
        kept[todo[index].key] = result
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")
        partial.replace(options.json)
        left = math.ceil((time.perf_counter() - start) / done * (len(todo) - done) / 60)
        print(f"{done} of {len(todo)}, {left} min left", flush=True)
    print(table(list(kept.values())))


if __name__ == "__main__":
    main()

"""Every quantiser with and without error propagation, at several bits and groups, on real text.

    python -m benchmarks.quantisers --text VALID --calibration TRAIN --json FILE [--model DIR] [--documents 60]
        [--bits 4,3,2] [--groups 64,128,0] [--seeds 3] [--jobs 2] [--only METHOD|…] [--markdown FILE]

Weights only: activations stay in float32 and the head is int8 in groups of 64, so that what differs is the quantiser.
Each program runs in the interpreter, per document with BOS. What a method draws from the calibration text is drawn with
several seeds; what reads no text runs once. Finished runs are kept in the JSON file, and a second start goes on.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

from hikui.lowering.app.lower import read_calibration
from hikui.lowering.app.request import Request, available_passes
from hikui.lowering.artefact import text
from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.ir import sizes
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.recipe import CalibrationSettings, Recipe
from hikui.lowering.pipeline.run import Pipeline
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
        self.program = trace(Request(model).source)
        assert self.program.tokenizer is not None, "the models of this table have tokenizers"
        codec, config = text.TextCodec(self.program.tokenizer), self.program.config
        self._excerpts = protocols.document_excerpts(
            text.read_documents(Path(path)), codec, context=config.context_length, limit=count
        )
        self.reference = self.bits(self.program)

    def bits(self, program: Program) -> float:
        """Bits per character of a program."""
        runner = ReferenceRunner(program)
        return evaluation.measure(runner, self._excerpts)[0].bits_per_char


bench = lru_cache(maxsize=1)(Bench)


def measure(run: Run) -> dict[str, object]:
    """Makes and measures one program."""
    there = bench(run.model, run.text, run.documents)
    steps = Recipe.model_validate({"schema": 1, "name": run.method, "passes": run.passes})
    settings = CalibrationSettings(seed=run.seed)
    data = read_calibration(there.program, Path(run.calibration), settings)
    start = time.perf_counter()
    program = Pipeline(steps.build(available_passes())).run(there.program, PassContext(data))
    seconds = time.perf_counter() - start
    return {
        **run.named,
        "bits_per_char": there.bits(program),
        "float_bits_per_char": there.reference,
        "true_bpw": sizes.measure(program).true_bpw,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown of one model's runs: bits per character above float, the mean over seeds ± their standard deviation."""
    cells = above_float(rows)
    settings = sorted({cell[2:] for cell in cells}, key=lambda s: (-s[0], s[1] or 1 << 20))
    names = [f"{bits} bits, {f'g{group}' if group else 'channel'}" for bits, group in settings]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method in METHODS:
        for qep in (False, True):
            found = [cells.get((method, qep, *setting), []) for setting in settings]
            if any(found):
                shown = [f"{mean(each):+.4f}{_spread(each)}" if each else "" for each in found]
                lines.append(f"| {method}{', QEP' if qep else ''} | {' | '.join(shown)} |")
    return "\n".join(lines)


def above_float(rows: list[dict[str, object]]) -> dict[tuple[str, bool, int, int], list[float]]:
    """Bits per character above float of all seeds, by method, QEP, bits and group."""
    out: dict[tuple[str, bool, int, int], list[float]] = defaultdict(list)
    for row in rows:
        key = str(row["method"]), bool(row["qep"]), int(str(row["bits"])), int(str(row["group"]))
        out[key].append(float(str(row["bits_per_char"])) - float(str(row["float_bits_per_char"])))
    return dict(out)


def _spread(found: list[float]) -> str:
    return f" ± {stdev(found):.4f}" if len(found) > 1 else ""


def surprises(rows: list[dict[str, object]]) -> list[str]:
    """Where the order is not the expected one.

    Expected is that error propagation does no harm, and strong GPTQ ≤ GPTQ ≤ rounding with like scales. A difference
    counts from twice the seeds' spread of both on.
    """
    cells, out = above_float(rows), []
    chain = [("gptq, mse, act order", "gptq"), ("gptq", "rtn, minmax"), ("gptq, mse, act order", "rtn, mse")]
    pairs = [((method, True), (method, False)) for method in METHODS]
    pairs += [((better, qep), (worse, qep)) for qep in (False, True) for better, worse in chain]
    for setting in sorted({cell[2:] for cell in cells}, reverse=True):
        for better, worse in pairs:
            one, two = (cells.get((*name, *setting), []) for name in (better, worse))
            if one and two:
                noise = 2 * math.hypot(*(stdev(each) if len(each) > 1 else 0.0 for each in (one, two)))
                if mean(one) > mean(two) + noise:
                    names = [f"{method}{', QEP' if qep else ''}" for method, qep in (better, worse)]
                    where = f"{setting[0]} bits, {f'g{setting[1]}' if setting[1] else 'channel'}"
                    out.append(f"{where}: {names[0]} {mean(one):+.4f} is worse than {names[1]} {mean(two):+.4f}")
    return out


def report(rows: list[dict[str, object]]) -> str:
    """Markdown of all runs, a table a model."""
    parts = []
    for model, documents in sorted({(str(row["model"]), int(str(row["documents"]))) for row in rows}):
        own = [row for row in rows if (row["model"], row["documents"]) == (model, documents)]
        reference = float(str(own[0]["float_bits_per_char"]))
        parts.append(f"## {model}\n\nBits per character above float ({reference:.4f}), {documents} documents.\n")
        parts.append(table(own) + "\n")
        odd = surprises(own)
        parts.append("Not in the expected order:\n\n" + "\n".join(f"- {line}" for line in odd) + "\n" if odd else "")
    return "\n".join(part for part in parts if part)


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
    parser.add_argument("--markdown", type=Path, help="where the tables of all runs in the JSON file go")
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
    text_of_all = report(list(kept.values()))
    print(text_of_all)
    if options.markdown:
        options.markdown.write_text(text_of_all, "utf-8")


if __name__ == "__main__":
    main()

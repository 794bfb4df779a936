"""What each shipped recipe costs in quality, at its true size.

    python -m benchmarks.quality --text VALID.txt --calibration TRAIN.txt [--model DIR] [--documents 150] [--json FILE]

Float, int8, int4, int4 with a branch of rank 16, and the mixed recipe at its budget: by each sensitivity, and by random
choice with several seeds as the baseline that a sensitivity must beat. Each is built for this machine and the artefact
is measured, so that the kernels are in the figures; per document with BOS, up to the context length. Differences from
the float model are paired over documents.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hikui.lowering.app.lower import BACKENDS, build, prepare
from hikui.lowering.app.request import Request, load_recipe
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import text
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.ir import sizes
from hikui.lowering.pipeline.recipe import Recipe

RANDOM_SEEDS = 3


@dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        true_bpw: over all linear sites, scales, padding, branches and the head counted.
        excess: bits per character above the float model's, the mean over documents.
        excess_error: its standard error, over documents.
    """

    name: str
    bits_per_char: float
    excess: float
    excess_error: float
    true_bpw: float
    linear_bytes: int
    total_bytes: int


def variants() -> Iterator[tuple[str, Recipe]]:
    """The rows of the table; the float model comes first."""
    for name in ("float", "int8", "int4", "int4-branch"):
        yield name, load_recipe(name)
    mixed = load_recipe("mixed-5.5bit")
    for metric in ("output", "pbar", "weight"):
        yield f"mixed-5.5bit, {metric}", mixed.with_options({"sensitivity": {"metric": metric}})
    for seed in range(RANDOM_SEEDS):
        yield f"mixed-5.5bit, random {seed}", mixed.with_options({"assign": {"mode": "random", "seed": seed}})


def measure(model: str, path: Path, calibration: Path, backend: str, count: int) -> Iterator[Row]:
    """One row a variant."""
    reference: np.ndarray | None = None
    for name, recipe in variants():
        prepared = prepare(Request(model, recipe, calibration=calibration))
        program = prepared.program
        assert program.tokenizer is not None, "the models of this table have tokenizers"
        codec, config = text.TextCodec(program.tokenizer), program.config
        excerpts = protocols.document_excerpts(
            text.read_documents(path), codec, context=config.context_length, limit=count
        )
        with tempfile.TemporaryDirectory() as folder:
            runner = open_runner(build(prepared, Path(folder) / "artefact", backend=backend))
            found = [evaluation.measure(runner, [excerpt])[0] for excerpt in excerpts]
            runner.close()
        bits = np.array([one.nats for one in found]) / math.log(2)
        characters = np.array([one.characters for one in found])
        each = bits / characters
        reference = each if reference is None else reference
        difference = each - reference
        taken = sizes.measure(program)
        yield Row(
            name,
            float(bits.sum() / characters.sum()),
            float(difference.mean()),
            float(difference.std(ddof=1) / math.sqrt(len(each))),
            taken.true_bpw,
            taken.linear_bytes,
            taken.total_bytes,
        )


def main() -> None:
    """Prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print("| recipe | bits/char | above float | true bits per weight | linear sites, MB | all weights, MB |")
    print("|---|---|---|---|---|---|")
    for row in measure(options.model, options.text, options.calibration, options.backend, options.documents):
        rows.append(row)
        print(
            f"| {row.name} | {row.bits_per_char:.4f} | {row.excess:+.4f} ± {row.excess_error:.4f} | {row.true_bpw:.3f} "
            f"| {row.linear_bytes / 1e6:.2f} | {row.total_bytes / 1e6:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""What an artefact will be, before it is made: `hikui lower --dry-run`."""

from dataclasses import dataclass
from pathlib import Path

from hikui.lowering.app.lower import make_backend, prepare, resume_folder, tokenizer_nbytes
from hikui.lowering.app.request import Execution, Request
from hikui.lowering.artefact.target import resolve
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import BLOCK, FORMAT, SENSITIVITY


@dataclass(frozen=True)
class Prediction:
    """What passes up to the last one that keeps to a budget say of the artefact.

    Attributes:
        block_bpw: true bits per weight of the sites in blocks.
        weight_bytes: of all weights.
        artefact_bytes: with runtime, program and tokenizer; about.
        cost: the sum of what sites cost, by the measure of the recipe, as if they did not touch each other.
        formats: how many sites have each format.
    """

    block_bpw: float
    weight_bytes: int
    artefact_bytes: int
    cost: float
    formats: dict[str, int]


def predict(
    request: Request, output: Path, *, target: str = "host", backend: str = "tvm", execution: Execution = Execution()
) -> Prediction:
    """Runs a recipe up to its last pass that keeps to a budget, and counts.

    What is measured on the way is kept beside the output, and `make_artefact` with the same request goes on from there.

    Raises:
        HikuiError: the model, the recipe or the text is at fault, or the budget cannot be met.
        UsageError: the recipe has no pass that keeps to a budget.
    """
    from hikui.passes.graph import float_sites, matrix_shape
    from hikui.passes.precision.rest import rest_nbytes

    board, builder = resolve(target), make_backend(backend)
    beside = builder.nbytes_beside_weights(board)
    prepared = prepare(
        request,
        execution,
        finished=resume_folder(output) if execution.resume else None,
        beside=beside,
        only_assign=True,
    )
    program = prepared.program
    sites = [node for node in float_sites(program) if FORMAT in node.meta]
    taken = {node: Format.parse(node.meta[FORMAT]).nbytes(*matrix_shape(node)) for node in sites}
    inside = [node for node in sites if BLOCK in node.meta]
    weights = sum(n * k for n, k in map(matrix_shape, inside))
    nbytes = sum(taken.values()) + rest_nbytes(program, sites, _tables(prepared.passes))
    counts: dict[str, int] = {}
    for node in sites:
        counts[node.meta[FORMAT]] = counts.get(node.meta[FORMAT], 0) + 1
    return Prediction(
        8 * sum(taken[node] for node in inside) / weights if weights else 0.0,
        nbytes,
        nbytes + beside + tokenizer_nbytes(program),
        sum(float(node.meta.get(SENSITIVITY, {}).get(node.meta[FORMAT], 0.0)) for node in sites),
        dict(sorted(counts.items())),
    )


def _tables(passes: tuple[object, ...]) -> Format:
    """The format that tables will have which no head shares, as the budget reckons with."""
    return next((Format.parse(step.tables) for step in reversed(passes) if hasattr(step, "tables")), Format("int8"))

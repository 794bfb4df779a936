"""The whole way from a checkpoint to an artefact; this room alone knows both passes and backends."""

import hashlib
import os
import resource
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Unpack

from hikui.lowering.app.assemble import Prepared, assemble, checkpoint_folders
from hikui.lowering.app.notices import model_notices, tell_of_text
from hikui.lowering.app.opened import require_working
from hikui.lowering.app.request import Execution, Model, Request, RequestOptions, available_passes
from hikui.lowering.artefact import manifest as artefacts
from hikui.lowering.artefact import text
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.artefact.staging import StagedFolder
from hikui.lowering.artefact.target import Target, resolve
from hikui.lowering.engine.resume import Resume, run_key
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation.error_table import is_float
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline import calibration as calibrations
from hikui.lowering.pipeline.contract import Calibration, Pass, PassContext, PassResult
from hikui.lowering.pipeline.debug_dump import DebugDump
from hikui.lowering.pipeline.recipe import CalibrationSettings, Recipe
from hikui.lowering.pipeline.run import Callback, InputUnchanged, Pipeline
from hikui.lowering.progress import Progress, log_warning, no_progress
from hikui.models import calibration

if TYPE_CHECKING:
    from hikui.lowering.artefact.backend import Backend

BACKENDS = ("tvm", "onnxruntime")

_REFERENCE_BYTES = 16
"""Of the reference numbers, for each token of the vocabulary: four rows of logits."""

_TEXT_BYTES = 12
"""Of the table of the tokens' texts: a place and some bytes."""


def make_backend(name: str) -> "Backend":
    """The backend of that name.

    Raises:
        UsageError: there is none.
    """
    if name == "tvm":
        from hikui.backends.tvm import TvmBackend

        return TvmBackend()
    if name == "onnxruntime":
        from hikui.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    raise UsageError(f"There is no backend '{name}'; the backends are {', '.join(BACKENDS)}.")


class _KeepCanonical:
    """Keeps the float program, which the report compares with: graphs are small and weights are shared.

    Args:
        floats: keep the last program without a packed matrix too, with what passes have folded into its weights.
    """

    def __init__(self, floats: bool) -> None:
        self.program: Program | None = None
        self.floats: Program | None = None
        self._keep_floats = floats

    def before(self, step: Pass, program: Program) -> None:
        """Nothing is kept before a pass."""

    def after(self, step: Pass, result: PassResult, seconds: float) -> None:
        if step.names_sites and self.program is None:
            self.program = result.program
        if self._keep_floats and is_float(result.program):
            self.floats = result.program


def prepare(
    request: Request,
    execution: Execution = Execution(),
    *,
    scratch: Path | None = None,
    finished: Path | None = None,
    keep_floats: bool = False,
    beside: int = 0,
    only_assign: bool = False,
) -> Prepared:
    """Traces a model and runs a recipe's passes on it.

    Args:
        request: what is asked for.
        execution: how it is done.
        scratch: folder for tensors that passes make; None keeps them in memory.
        finished: folder for finished work; None keeps none.
        keep_floats: keep the last program whose sites were all float.
        beside: bytes of the artefact to come that are neither weights nor tokenizer, where a size is asked for.
        only_assign: stop behind the last pass that keeps to a budget.

    Raises:
        HikuiError: the model, the recipe or the calibration text is at fault, in one sentence.
        UsageError: no pass keeps to a budget, and only these were asked for.
    """
    chosen = request.loaded_recipe()
    known = available_passes()
    passes = _passes(chosen, known, only_assign)
    path = None if request.calibration is None else Path(request.calibration)
    if path is not None:
        text.read_documents(path)
    calibrates = any(step.calibrates for step in passes)
    notices: list[str] = []

    def warn(sentence: str) -> None:
        # Tied sites may find the same fault, and one sentence on it is enough.
        if sentence not in notices:
            notices.append(sentence)
            execution.warn(sentence)

    execution.progress("trace", 0, 1)
    traced, fidelity = request.compared(scratch=scratch)
    execution.progress("trace", 1, 1)
    if request.target_size is not None:
        chosen = request.loaded_recipe(beside + tokenizer_nbytes(traced))
        passes = _passes(chosen, known, only_assign)
    data = read_calibration(traced, path, chosen.calibration) if calibrates or path is not None else None
    for notice in model_notices(traced, request.source, checkpoint_folders(traced)):
        warn(notice)
    if data is not None and calibrates:
        tell_of_text(data, path, chosen.calibration, traced, execution.announce, warn)
    keep = _KeepCanonical(keep_floats)
    callbacks: list[Callback] = [keep]
    if execution.debug_dump is not None:
        callbacks.append(DebugDump(execution.debug_dump, traced))
    if execution.check_inputs:
        callbacks.append(InputUnchanged())
    pipeline = Pipeline(passes, callbacks)
    resolved = chosen.resolved(known)
    kept, settings = Resume(), chosen.calibration
    if finished is not None:
        # Passes say themselves what theirs depends on, so that another budget need not measure anew.
        kinds = [type(step) for step in chosen.build(known)]
        read = f"{settings.samples} windows to measure on, {settings.training} to learn from"
        windows = (*data.chunks, *data.long) if data else ()
        kept = Resume(finished / run_key(traced, read, windows, kinds))
        if not only_assign:
            _forget(finished, kept, pipeline.scopes())
    context = PassContext(
        None if data is None else Calibration(data.chunks[: settings.samples], data.source),
        scratch,
        execution.progress,
        resume=kept,
        memory=execution.memory,
        jobs=execution.jobs,
        announce=execution.announce,
        warn=warn,
        training=_to_learn_from(data, settings),
    )
    lowered = pipeline.run(traced, context)
    return Prepared(
        request.name,
        chosen,
        resolved,
        traced,
        keep.program,
        lowered,
        pipeline.passes,
        tuple(pipeline.records),
        None if data is None else _calibration_entry(data, path, chosen.calibration),
        keep.floats,
        tuple(notices),
        fidelity,
    )


def _to_learn_from(data: Calibration | None, settings: CalibrationSettings) -> Calibration | None:
    """The windows of passes that learn; None where they are those that are measured on."""
    if data is None or not settings.training:
        return None
    return Calibration((*data.chunks[: settings.training], *data.long), data.source)


def _passes(recipe: Recipe, known: dict[str, type[Pass]], only_assign: bool) -> list[Pass]:
    """A recipe's passes, or those up to the last one that keeps to a budget."""
    passes = recipe.build(known)
    if not only_assign:
        return passes
    last = max((index for index, step in enumerate(passes) if step.budget), default=None)
    if last is None:
        raise UsageError(
            f"Recipe {recipe.name} has no pass that keeps to a budget, so there is nothing to predict; `hikui inspect` "
            "tells what an artefact takes."
        )
    return passes[: last + 1]


def _forget(folder: Path, kept: Resume, scopes: list[str]) -> None:
    """Removes what other runs have left in the folder of finished work."""
    assert kept.folder is not None, "something is kept"
    for place, wanted in ((folder, [kept.folder.name]), (kept.folder, scopes)):
        for other in sorted(place.iterdir()) if place.is_dir() else []:
            if other.name not in wanted:
                shutil.rmtree(other, ignore_errors=True)


def build(
    prepared: Prepared,
    output: str | Path,
    *,
    target: str | Target = "host",
    backend: str = "tvm",
    progress: Progress = no_progress,
) -> Artefact:
    """Writes the artefact of a prepared model for one target and backend; see `lower`."""
    board = resolve(target) if isinstance(target, str) else target
    builder = make_backend(backend)
    with StagedFolder(Path(output), artefacts.MANIFEST) as staged:
        for notice in assemble(staged.content, prepared, board, builder, progress):
            log_warning(notice)
        require_working(staged.content)
    return Artefact.load(staged.destination)


def read_calibration(program: Program, path: Path | None, settings: CalibrationSettings) -> Calibration:
    """Draws the calibration windows of a program from a text file.

    Without one, from the text that comes with hikui; of a model without a tokenizer the tokens are drawn at random.

    Raises:
        HikuiError: the text cannot be read, or cannot be turned into tokens.
    """
    if path is None and program.tokenizer is None:
        return calibrations.random_tokens(
            program.config,
            samples=settings.windows,
            tokens=settings.tokens,
            seed=settings.seed,
            long=settings.long,
        )
    documents = text.read_documents(calibration.path() if path is None else path)
    if program.tokenizer is None:
        raise HikuiError(
            f"The model has no tokenizer, so {path} cannot be turned into tokens; give one with --tokenizer."
        )
    return calibrations.draw(
        documents,
        text.TextCodec(program.tokenizer).encode_prompt,
        program.config,
        samples=settings.windows,
        tokens=settings.tokens,
        seed=settings.seed,
        source=(calibration.path() if path is None else path).name,
        long=settings.long,
    )


def lower(
    model: Model,
    output: str | Path,
    *,
    target: str | Target = "host",
    backend: str = "tvm",
    execution: Execution = Execution(),
    **options: Unpack[RequestOptions],
) -> Artefact:
    """Lowers a model to an artefact.

    Args:
        model: a Hugging Face folder or id, a GGUF file, a transformers model, `reference` for the model that comes with
            hikui, or `smollm2` for the one that `hikui fetch smollm2` brings.
        output: the artefact's folder. It is whole or absent, whatever happens; only an artefact is ever replaced.
        target: a target's name (`hikui targets`), or `host`.
        backend: `tvm` or `onnxruntime`.
        execution: how the work is done.
        **options: `recipe`, `calibration`, `context`, `target_bpw`, `target_size`, `target_latency`, `speeds`,
            `tokenizer`, `trust_remote_code`, as in `Request`.

    Raises:
        HikuiError: one sentence that says what is wrong and the way out.
    """
    return make_artefact(Request(model, **options), output, target=target, backend=backend, execution=execution)


def make_artefact(
    request: Request,
    output: str | Path,
    *,
    target: str | Target = "host",
    backend: str = "tvm",
    execution: Execution = Execution(),
) -> Artefact:
    """As `lower`, with what is asked for in one object."""
    board = resolve(target) if isinstance(target, str) else target
    builder = make_backend(backend)
    finished = resume_folder(Path(output))
    with StagedFolder(Path(output), artefacts.MANIFEST) as staged:
        prepared = prepare(
            request,
            execution,
            scratch=staged.scratch,
            finished=finished if execution.resume else None,
            beside=0 if request.target_size is None else builder.nbytes_beside_weights(board),
        )
        for notice in assemble(staged.content, prepared, board, builder, execution.progress):
            execution.warn(notice)
        if request.target_size is not None and (taken := folder_nbytes(staged.content)) > request.target_size * 1e6:
            execution.warn(
                f"The artefact takes {taken / 1e6:.2f} MB, more than the {request.target_size:g} MB asked for: what is "
                "beside the chosen formats is larger than was reckoned; ask for as much less."
            )
        require_working(staged.content)
    shutil.rmtree(finished, ignore_errors=True)
    return Artefact.load(staged.destination)


def tokenizer_nbytes(program: Program) -> int:
    """Bytes that a model's tokens take in an artefact: the tokenizer, a table of texts, and reference numbers."""
    logits = _REFERENCE_BYTES * program.config.vocabulary
    if program.tokenizer is None:
        return logits
    with TemporaryDirectory() as scratch:
        text.copy_tokenizer(program.tokenizer, Path(scratch) / artefacts.TOKENIZER)
        return folder_nbytes(Path(scratch)) + logits + _TEXT_BYTES * program.config.vocabulary


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files in a folder and those inside it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resume_folder(output: Path) -> Path:
    """Where a run that makes `output` keeps what it has finished."""
    whole = Path(os.path.abspath(output))
    return whole.parent / f".{whole.name}.resume"


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _calibration_entry(data: Calibration, path: Path | None, settings: CalibrationSettings) -> dict[str, str | int]:
    """What the manifest says of it; tokens that no text gave are hashed themselves."""
    if path is None and data.source == calibration.path().name:
        path = calibration.path()
    windows = (*data.chunks, *data.long)
    tokens = b"".join(chunk.numpy().tobytes() for chunk in windows)
    return {
        "text": data.source,
        "sha256": hashlib.sha256(tokens).hexdigest() if path is None else artefacts.sha256(path),
        "samples": len(windows),
        "tokens": sum(int(chunk.shape[1]) for chunk in windows),
        "seed": settings.seed,
    }

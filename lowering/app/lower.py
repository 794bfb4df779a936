"""The whole way from a checkpoint to an artefact; only this and the command line know both passes and backends."""

import os
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from hikui.lowering.app.assemble import Prepared, assemble
from hikui.lowering.artefact import manifest as artefacts
from hikui.lowering.artefact import text
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.artefact.staging import StagedFolder
from hikui.lowering.artefact.target import Target, resolve
from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.engine.resume import Resume, run_key
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation.error_table import is_float
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline import calibration as calibrations
from hikui.lowering.pipeline import recipe as recipes
from hikui.lowering.pipeline.contract import Calibration, Pass, PassContext, PassResult
from hikui.lowering.pipeline.debug_dump import DebugDump
from hikui.lowering.pipeline.recipe import CalibrationSettings, Recipe
from hikui.lowering.pipeline.run import Callback, Pipeline
from hikui.lowering.progress import Announce, Progress, no_announcement, no_progress
from hikui.lowering.trace import trace

if TYPE_CHECKING:
    from hikui.lowering.artefact.backend import Backend

__all__ = ["Prepared", "available_passes", "build", "load_recipe", "lower", "make_backend", "prepare"]

BACKENDS = ("tvm", "onnxruntime")
REFERENCE_MODEL = "reference"


def available_passes() -> dict[str, type[Pass]]:
    """The passes of hikui and of installed third parties (entry points of the group `hikui.passes`), by name."""
    from hikui.passes import available

    return {kind.name: kind for kind in available()}


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


def model_source(model: str | Path | nn.Module) -> str | Path | nn.Module:
    """What `trace` takes: the shipped model's folder for `reference`, else what was given."""
    if model == REFERENCE_MODEL and not Path(REFERENCE_MODEL).exists():
        from hikui.models import reference

        return reference.path()
    return model


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
        if step.name == "canonicalise" and self.program is None:
            self.program = result.program
        if self._keep_floats and is_float(result.program):
            self.floats = result.program


def prepare(
    model: str | Path | nn.Module,
    recipe: str | Path | Recipe,
    *,
    calibration: str | Path | None = None,
    context: int | None = None,
    target_bpw: float | None = None,
    tokenizer: str | Path | None = None,
    debug_dump: str | Path | None = None,
    scratch: Path | None = None,
    resume: Path | None = None,
    memory: int | None = None,
    jobs: Jobs | None = None,
    keep_floats: bool = False,
    progress: Progress = no_progress,
    announce: Announce = no_announcement,
) -> Prepared:
    """Traces a model and runs a recipe's passes on it.

    The arguments are those of `lower`; `scratch` is a folder for tensors that passes make, None keeps them in memory;
    `resume` is one for finished work, None keeps none; `keep_floats` keeps the last program whose sites were all float.

    Raises:
        HikuiError: the model, the recipe or the calibration text is at fault, in one sentence.
    """
    chosen = load_recipe(recipe, target_bpw)
    passes = chosen.build(available_passes())
    path = None if calibration is None else Path(calibration)
    if path is not None:
        text.read_documents(path)
    elif step := next((step for step in passes if step.calibrates), None):
        raise HikuiError(
            f"Recipe {chosen.name}: pass {step.name} measures the model on real text and none was given; give some "
            "with --calibration TEXT_FILE."
        )
    progress("trace", 0, 1)
    traced = trace(model_source(model), context=context, scratch=scratch, tokenizer=tokenizer)
    progress("trace", 1, 1)
    data = None if path is None else read_calibration(traced, path, chosen.calibration)
    keep = _KeepCanonical(keep_floats)
    dumps: list[Callback] = [] if debug_dump is None else [DebugDump(Path(debug_dump), traced)]
    pipeline = Pipeline(passes, (keep, *dumps))
    chunks = () if data is None else data.chunks
    resolved = chosen.resolved(available_passes())
    kept = Resume() if resume is None else _resumed(resume, run_key(traced, resolved, chunks))
    context_of_passes = PassContext(
        data, scratch, progress, resume=kept, memory=memory, jobs=jobs or Jobs(), announce=announce
    )
    lowered = pipeline.run(traced, context_of_passes)
    return Prepared(
        _model_name(model),
        chosen,
        resolved,
        traced,
        keep.program,
        lowered,
        pipeline.passes,
        tuple(pipeline.records),
        None if data is None or path is None else _calibration_entry(data, path, chosen.calibration),
        keep.floats,
    )


def _resumed(folder: Path, key: str) -> Resume:
    """Where the finished work of a run is; what other runs have left there is removed."""
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name != key:
            shutil.rmtree(other, ignore_errors=True)
    return Resume(folder / key)


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
        assemble(staged.content, prepared, board, builder, progress)
    return Artefact.load(staged.destination)


def read_calibration(program: Program, path: Path, settings: CalibrationSettings) -> Calibration:
    """Draws the calibration windows of a program from a text file."""
    documents = text.read_documents(path)
    if program.tokenizer is None:
        raise HikuiError(
            f"The model has no tokenizer, so {path} cannot be turned into tokens; give one with --tokenizer."
        )
    return calibrations.draw(
        documents,
        text.TextCodec(program.tokenizer).encode,
        program.config,
        samples=settings.samples,
        tokens=settings.tokens,
        seed=settings.seed,
        source=path.name,
    )


def lower(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    recipe: str | Path | Recipe = "int4",
    target: str | Target = "host",
    backend: str = "tvm",
    calibration: str | Path | None = None,
    context: int | None = None,
    target_bpw: float | None = None,
    tokenizer: str | Path | None = None,
    debug_dump: str | Path | None = None,
    resume: bool = True,
    memory: int | None = None,
    jobs: Jobs | None = None,
    progress: Progress = no_progress,
    announce: Announce = no_announcement,
) -> Artefact:
    """Lowers a model to an artefact.

    Args:
        model: a Hugging Face folder or id, a transformers model, or `reference` for the model that comes with hikui.
        output: the artefact's folder. It is whole or absent, whatever happens; only an artefact is ever replaced.
        recipe: a shipped recipe's name, a recipe file, or a recipe.
        target: a target's name (`hikui targets`), or `host`.
        backend: `tvm` or `onnxruntime`.
        calibration: text that calibrating passes read; documents are separated by `<|endoftext|>`.
        context: context length; by default the model's own, at most 2048.
        target_bpw: budget for the recipe's `assign` pass in bits per weight.
        tokenizer: folder with a tokenizer, instead of the model's own.
        debug_dump: folder for the program's text and its diff after each pass.
        resume: keep what is finished in a hidden folder beside the output until all is, and go on from there after a
            kill; what another model, recipe, text or version of hikui has left there is not used.
        memory: bytes that passes may take; by default what the machine has free. A pass that needs more refuses.
        jobs: how independent work is spread.
        progress: called with what is being done.
        announce: told what passes are about to need.

    Raises:
        HikuiError: one sentence that says what is wrong and the way out.
    """
    board = resolve(target) if isinstance(target, str) else target
    builder = make_backend(backend)
    finished = resume_folder(Path(output))
    with StagedFolder(Path(output), artefacts.MANIFEST) as staged:
        prepared = prepare(
            model,
            recipe,
            calibration=calibration,
            context=context,
            target_bpw=target_bpw,
            tokenizer=tokenizer,
            debug_dump=debug_dump,
            scratch=staged.scratch,
            resume=finished if resume else None,
            memory=memory,
            jobs=jobs,
            progress=progress,
            announce=announce,
        )
        assemble(staged.content, prepared, board, builder, progress)
    shutil.rmtree(finished, ignore_errors=True)
    return Artefact.load(staged.destination)


def resume_folder(output: Path) -> Path:
    """Where a run that makes `output` keeps what it has finished."""
    whole = Path(os.path.abspath(output))
    return whole.parent / f".{whole.name}.resume"


def load_recipe(name: str | Path | Recipe, target_bpw: float | None = None) -> Recipe:
    """A recipe by name, from a file, or as it is; with another budget where one is given."""
    chosen = name if isinstance(name, Recipe) else recipes.load(name, available_passes())
    return chosen if target_bpw is None else chosen.with_options({"assign": {"target_bpw": target_bpw}})


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _model_name(model: str | Path | nn.Module) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)


def _calibration_entry(data: Calibration, path: Path, settings: CalibrationSettings) -> dict[str, str | int]:
    return {
        "text": path.name,
        "sha256": artefacts.sha256(path),
        "samples": len(data.chunks),
        "tokens": sum(int(chunk.shape[1]) for chunk in data.chunks),
        "seed": settings.seed,
    }

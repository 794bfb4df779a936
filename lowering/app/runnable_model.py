"""What `hikui eval` and `hikui compare` measure: an artefact, or a model in the interpreter, through one interface."""

from dataclasses import dataclass
from pathlib import Path

from hikui.lowering.app import lower as driver
from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import text
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import Artefact, is_artefact, read_manifest
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir import sizes
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.pipeline.recipe import Recipe
from hikui.lowering.progress import Progress, no_progress
from hikui.lowering.trace import trace


@dataclass(frozen=True)
class RunnableModel:
    """Something that runs, with what an evaluation says about it.

    Attributes:
        kind: how it runs, in words.
        eos: the tokens that end a text.
        linear_bytes: of the linear sites, the head among them.
        total_bytes: of the whole artefact, or of all weights where there is none.
        prepared: the programs behind it, where a recipe was run.
    """

    kind: str
    runner: Runner
    codec: TextCodec
    bos: int | None
    eos: tuple[int, ...]
    true_bpw: float
    linear_bytes: int
    total_bytes: int
    prepared: Prepared | None = None


def open_runnable_model(
    model: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    calibration: Path | None = None,
    context: int | None = None,
    target_bpw: float | None = None,
    tokenizer: Path | None = None,
    emulate: bool = False,
    keep_floats: bool = False,
    progress: Progress = no_progress,
) -> RunnableModel:
    """Opens an artefact, or a model for the interpreter, through a recipe's passes where one is given.

    `keep_floats` is what `driver.prepare` takes, for a table of layers.

    Raises:
        UsageError: options for a model were given with an artefact.
        HikuiError: it cannot be opened, or has no tokenizer.
    """
    if is_artefact(Path(model)):
        if recipe is not None or calibration is not None or target_bpw is not None or context is not None:
            raise UsageError(f"{model} is an artefact, whose recipe and context are fixed; give a model to try others.")
        artefact = Artefact.load(model)
        taken = artefact.manifest.sizes
        return RunnableModel(
            f"artefact, {artefact.manifest.backend} for {artefact.manifest.target.name}",
            open_runner(artefact, emulate=emulate),
            artefact.codec() if tokenizer is None else TextCodec(tokenizer),
            artefact.manifest.model.bos_token_id,
            artefact.manifest.model.eos_token_ids,
            taken.true_bpw,
            taken.linear_bytes,
            taken.total_bytes,
        )
    prepared = None
    if recipe is None:
        kind = "interpreter, float"
        program = trace(driver.model_source(model), context=context, tokenizer=tokenizer)
    else:
        prepared = driver.prepare(
            model,
            recipe,
            calibration=calibration,
            context=context,
            target_bpw=target_bpw,
            tokenizer=tokenizer,
            keep_floats=keep_floats,
            progress=progress,
        )
        kind, program = f"interpreter, recipe {prepared.recipe.name}", prepared.program
    if program.tokenizer is None:
        raise HikuiError(f"{model} has no tokenizer, so no text can be measured; give one with --tokenizer.")
    measured = sizes.measure(program)
    return RunnableModel(
        kind,
        ReferenceRunner(program),
        text.TextCodec(program.tokenizer),
        program.config.bos_token_id,
        program.config.eos_token_ids,
        round(measured.true_bpw, 6),
        measured.linear_bytes,
        measured.total_bytes,
        prepared,
    )


def context_length(model: str | Path, context: int | None = None) -> int:
    """The context that `open_runnable_model` will have, without reading weights or running passes.

    Raises:
        HikuiError: the model cannot be opened.
    """
    if is_artefact(Path(model)):
        return read_manifest(Path(model)).model.context_length
    return trace(driver.model_source(model), context=context, finite=False).config.context_length

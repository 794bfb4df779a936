"""What `hikui eval` and `hikui compare` measure: an artefact, or a model in the interpreter, through one interface."""

from dataclasses import dataclass, replace
from pathlib import Path

from hikui.lowering.app.assemble import Prepared, checkpoint_folders
from hikui.lowering.app.lower import prepare
from hikui.lowering.app.notices import model_notices
from hikui.lowering.app.request import Execution, Request
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import text
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import Artefact, is_artefact, read_manifest
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir import sizes
from hikui.lowering.ir.interpreter import ReferenceRunner


@dataclass(frozen=True)
class RunnableModel:
    """Something that runs, with what an evaluation says about it.

    Attributes:
        kind: how it runs, in words.
        eos: the tokens that end a text.
        block_bpw, true_bpw, all_bpw: bits per weight of the linear sites in blocks, of all of them, and of everything
            stored; see `lowering/ir/sizes.py`.
        linear_bytes: of the linear sites, the head among them.
        total_bytes: of the whole artefact, or of all weights where there is none.
        prepared: the programs behind it, where a recipe was run.
    """

    kind: str
    runner: Runner
    codec: TextCodec
    eos: tuple[int, ...]
    block_bpw: float
    true_bpw: float
    all_bpw: float
    linear_bytes: int
    total_bytes: int
    prepared: Prepared | None = None


def open_runnable_model(
    request: Request, execution: Execution = Execution(), *, emulate: bool = False, keep_floats: bool = False
) -> RunnableModel:
    """Opens an artefact, or a model for the interpreter, through a recipe's passes where the request has one.

    Args:
        request: its model may be an artefact's folder.
        execution: how the passes are run.
        emulate: run an artefact for another architecture under qemu-user.
        keep_floats: keep the last program whose sites were all float, for a table of layers.

    Raises:
        UsageError: options for a model were given with an artefact.
        HikuiError: it cannot be opened, or has no tokenizer.
    """
    if isinstance(request.model, str | Path) and is_artefact(Path(request.model)):
        return _artefact(request, emulate)
    prepared = None
    if request.recipe is None:
        kind = "interpreter, float"
        program, _ = request.compared()
        if program.tokenizer is not None:
            for notice in model_notices(program, request.source, checkpoint_folders(program)):
                execution.warn(notice)
    else:
        prepared = prepare(request, execution, keep_floats=keep_floats)
        kind, program = f"interpreter, recipe {prepared.recipe.name}", prepared.program
    if program.tokenizer is None:
        raise HikuiError(f"{request.name} has no tokenizer, so no text can be measured; give one with --tokenizer.")
    measured = sizes.measure(program)
    bits = measured.bits()
    return RunnableModel(
        kind,
        ReferenceRunner(program),
        text.TextCodec(program.tokenizer),
        program.config.eos_token_ids,
        bits["block_bpw"],
        bits["true_bpw"],
        bits["all_bpw"],
        measured.linear_bytes,
        measured.total_bytes,
        prepared,
    )


def _artefact(request: Request, emulate: bool) -> RunnableModel:
    if replace(request, tokenizer=None, trust_remote_code=False) != Request(request.model, None):
        raise UsageError(
            f"{request.model} is an artefact, whose recipe and context are fixed; give a model to try others."
        )
    artefact = Artefact.load(Path(str(request.model)))
    taken = artefact.manifest.sizes
    return RunnableModel(
        f"artefact, {artefact.manifest.backend} for {artefact.manifest.target.name}",
        open_runner(artefact, emulate=emulate),
        artefact.codec()
        if request.tokenizer is None
        else TextCodec(ModelTokenizer(Path(request.tokenizer), request.trust_remote_code)),
        artefact.manifest.model.eos_token_ids,
        taken.block_bpw,
        taken.true_bpw,
        taken.all_bpw,
        taken.linear_bytes,
        taken.total_bytes,
    )


def context_length(request: Request) -> int:
    """The context that `open_runnable_model` will have, without reading weights or running passes.

    Raises:
        HikuiError: the model cannot be opened.
    """
    if isinstance(request.model, str | Path) and is_artefact(Path(request.model)):
        return read_manifest(Path(request.model)).model.context_length
    return request.traced(finite=False).config.context_length

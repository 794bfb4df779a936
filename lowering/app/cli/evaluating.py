"""`hikui eval`: quality, size and speed on a text, zero-shot tasks, and where the error comes from."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import debug, emit, progress, table, warn

if TYPE_CHECKING:
    from hikui.lowering.app.runnable_model import RunnableModel
    from hikui.lowering.evaluation.error_table import ErrorTable
    from hikui.lowering.evaluation.harness import HarnessReport
    from hikui.lowering.evaluation.protocols import Excerpt, Protocol
    from hikui.lowering.evaluation.quality import Quality
    from hikui.lowering.progress import Progress

LAYER_TEXTS = 8
"""Documents or windows that the table of layers reads, where no number is given."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="An artefact, or a model, which then runs in the interpreter.", metavar="MODEL_OR_DIR")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to predict, documents separated by <|endoftext|>.", metavar="FILE", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot tasks through lm-eval: .jsonl or .yaml files, or folders of them, separated by commas.",
            metavar="FILES",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another model or artefact to compare with on the same tokens.", metavar="MODEL", show_default=False
        ),
    ] = None,
    documents: options.Documents = None,
    window: options.Window = None,
    stride: options.Stride = None,
    limit: options.TaskLimit = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MOST,
            help="Go on from prompts greedily, by so many tokens, and say how much that repeats.",
            metavar="TOKENS",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts for --samples, one a line; by default eight that come with hikui.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the error of each linear site; needs --recipe.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Run a model through this recipe first, in the interpreter.",
            metavar="FILE_OR_NAME",
            show_default=False,
        ),
    ] = None,
    calibration: options.CalibrationText = None,
    context: options.Context = None,
    target_bpw: options.TargetBpw = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    emulate: options.Emulate = False,
) -> None:
    """Measure quality, size and speed on a text, or zero-shot tasks."""
    _refuse_idle(text, tasks, samples, prompts, against, window, stride, limit, layers, recipe)
    from hikui.lowering.app.notices import text_notices
    from hikui.lowering.app.request import Execution, Request
    from hikui.lowering.app.runnable_model import context_length, open_runnable_model
    from hikui.lowering.artefact.text import read_text
    from hikui.lowering.evaluation import harness, protocols
    from hikui.lowering.evaluation import quality as evaluation
    from hikui.lowering.evaluation.samples import read_prompts

    asked = read_prompts(prompts) if samples is not None else []
    content = read_text(text) if text is not None else ""
    files = harness.read_tasks([name for name in tasks.split(",") if name]) if tasks is not None else []
    request = Request(model, recipe, calibration, context, target_bpw, tokenizer, trust_remote_code)
    if window is not None:
        # A recipe may run for hours before anything is read.
        bound = window if recipe is None else context_length(request)
        protocols.check_windows(window, stride or window, bound)
    with progress() as step, evaluation.PeakMemory() as peak:
        runnable = open_runnable_model(
            request,
            Execution(check_inputs=debug.get(), progress=step, warn=warn),
            emulate=emulate,
            keep_floats=layers,
        )
        report: dict[str, object] = {"model": model, "runs_as": runnable.kind}
        if text is not None:
            protocol, excerpts = protocols.read(
                content, runnable.codec, context=runnable.runner.context_length,
                window=window, stride=stride, limit=documents,
            )  # fmt: skip
            rates = evaluation.speed(runnable.runner, excerpts[0].ids[: min(64, protocol.context // 2)])
            own, _ = evaluation.measure(runnable.runner, excerpts, progress=step)
            report |= _quality(own, protocol, excerpts)
            for notice in text_notices(excerpts):
                warn(notice)
    report |= {
        "block_bpw": runnable.block_bpw,
        "true_bpw": runnable.true_bpw,
        "all_bpw": runnable.all_bpw,
        "linear_bytes": runnable.linear_bytes,
        "total_bytes": runnable.total_bytes,
        "peak_memory_bytes": peak.nbytes,
    }
    if text is not None:
        report |= {
            "prompt_tokens": rates.prompt_tokens,
            "first_token_seconds": rates.first_token_seconds,
            "tokens_per_second": rates.tokens_per_second,
        }
        if against is not None:
            with progress() as step:
                other = open_runnable_model(
                    Request(against, None, tokenizer=tokenizer, trust_remote_code=trust_remote_code),
                    Execution(progress=step, warn=warn),
                    emulate=emulate,
                )
                report["against"] = _against(against, runnable, other, excerpts, step)
                other.runner.close()
    if files:
        with progress() as step:
            scores = harness.run_tasks(
                runnable.runner,
                runnable.codec,
                files,
                eos=runnable.eos,
                limit=limit,
                trust_remote_code=trust_remote_code,
                progress=step,
            )
        report["tasks"] = _tasks(scores)
    if samples is not None:
        with progress() as step:
            report["samples"] = _samples(runnable, asked, samples, step)
    if layers:
        with progress() as step:
            report["layers"] = _layers(runnable, excerpts[: None if documents else LAYER_TEXTS], step)
    runnable.runner.close()
    if as_json:
        emit(report)
    else:
        _show(report)


def _refuse_idle(
    text: Path | None,
    tasks: str | None,
    samples: int | None,
    prompts: Path | None,
    against: str | None,
    window: int | None,
    stride: int | None,
    limit: int | None,
    layers: bool,
    recipe: str | None,
) -> None:
    """Refuses options that would have no effect."""
    from hikui.lowering.errors import UsageError

    if text is None and tasks is None and samples is None:
        raise UsageError("There is nothing to measure; give --text FILE, --tasks FILES, --samples TOKENS, or several.")
    for name, given, needed, there in (
        ("--against", against is not None, "--text", text is not None),
        ("--window", window is not None, "--text", text is not None),
        ("--layers", layers, "--text", text is not None),
        ("--layers", layers, "--recipe", recipe is not None),
        ("--stride", stride is not None, "--window", window is not None),
        ("--limit", limit is not None, "--tasks", tasks is not None),
        ("--prompts", prompts is not None, "--samples", samples is not None),
    ):
        if given and not there:
            raise UsageError(f"{name} has no effect without {needed}; give that too.")


def _quality(own: "Quality", protocol: "Protocol", excerpts: "list[Excerpt]") -> dict[str, object]:
    return {
        "protocol": str(protocol),
        "protocol_fields": protocol.fields(),
        f"{protocol.unit}s": own.documents,
        "tokens": own.tokens,
        "characters": own.characters,
        "unknown_tokens": sum(excerpt.unknown for excerpt in excerpts),
        "lost_characters": sum(excerpt.lost for excerpt in excerpts),
        "perplexity": own.perplexity,
        "perplexity_error": own.perplexity_error,
        "bits_per_char": own.bits_per_char,
        "bits_per_char_error": own.bits_per_char_error,
        "each": [asdict(score) for score in own.each],
    }


def _against(
    name: str, runnable: "RunnableModel", other: "RunnableModel", excerpts: "list[Excerpt]", step: "Progress"
) -> dict[str, object]:
    """The other model on the same tokens, and what lies between the two."""
    from hikui.lowering.evaluation import quality as evaluation

    compared, theirs = evaluation.measure(runnable.runner, excerpts, against=other.runner, progress=step)
    assert theirs is not None, "two models were measured"
    difference = evaluation.paired(compared.each, theirs.each)
    return {
        "model": name,
        "runs_as": other.kind,
        "perplexity": theirs.perplexity,
        "bits_per_char": theirs.bits_per_char,
        "block_bpw": other.block_bpw,
        "true_bpw": other.true_bpw,
        "all_bpw": other.all_bpw,
        "linear_bytes": other.linear_bytes,
        "total_bytes": other.total_bytes,
        "divergence": compared.divergence,
        "agreement": compared.agreement,
        "difference": difference.bits_per_char,
        "difference_error": difference.error,
        "each": [asdict(score) for score in theirs.each],
    }


def _tasks(scores: "HarnessReport") -> dict[str, object]:
    return {
        "prefix": scores.prefix,
        "truncated_requests": scores.truncated,
        "scores": [
            {
                "task": score.name,
                "documents": score.documents,
                **{
                    key: value
                    for name, figure in score.figures.items()
                    for key, value in ((name, figure.value), (f"{name}_error", figure.error))
                },
            }
            for score in scores.tasks
        ],
    }


def _samples(runnable: "RunnableModel", prompts: list[str], tokens: int, step: "Progress") -> dict[str, object]:
    from hikui.lowering.evaluation.samples import continuations

    found = continuations(runnable.runner, runnable.codec, prompts, tokens, stop=runnable.eos, progress=step)
    return {
        "repeated": sum(sample.repeated for sample in found) / len(found),
        "loops": sum(sample.loop_from is not None for sample in found),
        "texts": [asdict(sample) for sample in found],
    }


def _layers(runnable: "RunnableModel", excerpts: "list[Excerpt]", step: "Progress") -> dict[str, object]:
    from hikui.lowering.engine.workers import Workers
    from hikui.lowering.errors import HikuiError
    from hikui.lowering.evaluation.error_table import error_table

    prepared = runnable.prepared
    assert prepared is not None, "--layers goes with --recipe, which makes programs"
    if prepared.origin is None or prepared.floats is None:
        raise HikuiError(
            f"Recipe {prepared.recipe.name} has no pass canonicalise, so there are no sites to compare; add it."
        )
    context = runnable.runner.context_length
    texts = [excerpt.ids[:context] for excerpt in excerpts]
    with Workers() as workers:
        found: ErrorTable = error_table(prepared.floats, prepared.program, texts, workers=workers, progress=step)
    return asdict(found)


def _show(content: dict[str, object], indent: str = "") -> None:
    for key, value in content.items():
        if key in ("each", "protocol_fields"):
            continue
        if isinstance(value, dict):
            typer.echo(f"{indent}{key}:")
            _show(value, indent + "  ")
        elif key == "texts":
            assert isinstance(value, list)
            for sample in value:
                loops = "" if sample["loop_from"] is None else f", loops from token {sample['loop_from']}"
                typer.echo(f"{indent}repeated {sample['repeated']:.3f}{loops}:\n{sample['prompt']}{sample['text']}\n")
        elif isinstance(value, list | tuple):
            typer.echo(f"{indent}{key}:")
            _show_rows(value)
        else:
            typer.echo(f"{indent}{key:<20} {_text(value)}")


def _show_rows(rows: list[dict[str, object]] | tuple[dict[str, object], ...]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table([[_text(row.get(column, "")) for column in columns] for row in rows], columns)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 0.1 else _long(value)


def _long(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)

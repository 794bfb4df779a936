"""`hikui compare`: recipes and artefacts of one model side by side."""

import math
from pathlib import Path
from typing import Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import emit, progress, table, warn


def compare(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="Text to predict, documents separated by <|endoftext|>.", metavar="FILE")],
    recipes: Annotated[
        str, typer.Option(help="Names or files, separated by commas.", metavar="NAMES", show_default=False)
    ] = "",
    artefacts: Annotated[
        str,
        typer.Option(help="Artefacts of the same model, separated by commas.", metavar="DIRS", show_default=False),
    ] = "",
    calibration: options.CalibrationText = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of the calibration windows, for the spread.", metavar="NUMBERS")
    ] = "0",
    target_bpw: Annotated[
        str,
        typer.Option(
            "--target-bpw",
            help="Budgets for recipes with an `assign` pass, in bits per weight: a row for each.",
            metavar="NUMBERS",
            show_default=False,
        ),
    ] = "",
    documents: options.Documents = None,
    window: options.Window = None,
    stride: options.Stride = None,
    context: options.Context = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for table, picture and every finished run, which a later call takes up.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Measure everything anew, whatever the folder holds.")
    ] = False,
    jobs: options.JobCount = 1,
    engine: options.Engine = "processes",
    as_json: options.Json = False,
) -> None:
    """Compare recipes and artefacts: quality over true bits."""
    from hikui.lowering.app.compare import report as comparison_report
    from hikui.lowering.app.compare import runs as comparison_runs
    from hikui.lowering.app.compare import table as comparison
    from hikui.lowering.engine.jobs import Jobs
    from hikui.lowering.errors import UsageError

    if stride is not None and window is None:
        raise UsageError("--stride has no effect without --window; give that too.")
    reading = comparison_runs.Reading(
        text, calibration, documents, window, stride, context, tokenizer, trust_remote_code
    )
    with progress() as step:
        found = comparison.compare(
            model,
            reading,
            recipes=_parts(recipes),
            artefacts=_parts(artefacts),
            seeds=[int(number) for number in _numbers(seeds, "--seeds")],
            budgets=_numbers(target_bpw, "--target-bpw"),
            output=output,
            resume=not no_resume,
            jobs=Jobs(jobs, engine),
            progress=step,
            warn=warn,
        )
    if output is not None and not comparison_report.save(found, output):
        typer.echo("No picture was drawn: matplotlib is not installed; install hikui[plot] for one.", err=True)
    if as_json:
        emit(comparison.as_json(found))
        return
    table([comparison_report.cells(row) for row in found.rows], comparison_report.HEADER)
    typer.echo(comparison_report.legend(found))


def _parts(names: str) -> list[str]:
    return [part for name in names.split(",") if (part := name.strip())]


def _numbers(written: str, option: str) -> list[float]:
    from hikui.lowering.errors import UsageError

    try:
        numbers = [float(part) for part in _parts(written)]
    except ValueError:
        raise UsageError(f"{option} is '{written}'; give numbers separated by commas.") from None
    seeds = option == "--seeds"
    if seeds and not all(0 <= number <= options.MOST and number == int(number) for number in numbers):
        raise UsageError(f"{option} is '{written}'; seeds are whole numbers from 0 to {options.MOST}.")
    if not seeds and not all(math.isfinite(number) and number > 0 for number in numbers):
        raise UsageError(f"{option} is '{written}'; give finite numbers above 0.")
    return numbers

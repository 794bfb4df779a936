"""`hikui sensitivity`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import announce, progress, table, warn

_FORMATS = "int2-g64,int3-g64,int4-g64"


def sensitivity(
    model: options.Model,
    formats: Annotated[
        str, typer.Option(help="Two formats or more, separated by commas.", metavar="FORMATS")
    ] = _FORMATS,
    by: Annotated[
        Literal["trial", "output", "pbar", "weight"],
        typer.Option(
            help="trial: what the model's next tokens lose with one site rounded; or the error of outputs or weights."
        ),
    ] = "trial",
    texts: Annotated[int, typer.Option(min=1, max=options.MOST, help="Windows of text that trial reads.")] = 4,
    columns: Annotated[
        int,
        typer.Option(
            min=0,
            max=options.MOST,
            help="Also say how the costs are shared out among columns, so many together; not of trials.",
            metavar="N",
        ),
    ] = 0,
    calibration: options.CalibrationText = None,
    context: options.Context = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the table as JSON here; a run that is killed goes on where it stopped.",
            metavar="FILE.json",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw a heat map, blocks by sites.", metavar="FILE.svg|.png", show_default=False),
    ] = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    memory: options.Memory = None,
    jobs: options.JobCount = 1,
    engine: options.Engine = "processes",
    as_json: options.Json = False,
) -> None:
    """Measure what each linear site costs in each format, and what a budget of bits would buy."""
    form = None if plot is None else _form(plot)
    from hikui.lowering.app.lower import resume_folder
    from hikui.lowering.app.request import Execution, Request
    from hikui.lowering.app.sensitivity.table import measure
    from hikui.lowering.engine.jobs import Jobs

    request = Request(
        model,
        None,
        calibration=calibration,
        context=context,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    with progress() as step:
        found = measure(
            request,
            formats.split(","),
            by,
            texts=texts,
            columns=columns,
            execution=Execution(
                memory=options.nbytes(memory), jobs=Jobs(jobs, engine), progress=step, announce=announce, warn=warn
            ),
            kept=None if output is None else resume_folder(output),
        )
    if output is not None:
        _write(output, found.as_json().encode())
    if plot is not None and form is not None:
        from hikui.lowering.app.sensitivity.picture import draw

        _write(plot, draw(found, form))
    if as_json:
        typer.echo(found.as_json(), nl=False)
        return
    typer.echo(f"{found.model}: {found.unit}" + (f"; {found.tokens} tokens of {found.text}" if found.text else ""))
    rows = [(site.name, *(f"{site.costs[name]:.3g}" for name in found.formats)) for site in found.sites]
    table(rows, ("site", *found.formats))
    if columns:
        typer.echo(f"\nThe share of a site's groups of {columns} columns that has half of what it costs:")
        halves = [(site.name, *(f"{site.half_in(name):.3g}" for name in found.formats)) for site in found.sites]
        table(halves, ("site", *found.formats))
    typer.echo("\nThe least sum of costs at each number of bits, over the sites in blocks:")
    table(
        [
            (
                f"{choice.bpw:.3f}",
                f"{choice.cost:.4g}",
                ", ".join(f"{n} × {name}" for name, n in choice.formats.items()),
            )
            for choice in found.front
        ],
        ("bits per weight", "sum", "sites"),
    )


def _form(plot: Path) -> str:
    """The form of a picture, by the name of its file.

    Raises:
        UsageError: it has another, or nothing here can draw it.
    """
    from hikui.lowering.errors import UsageError

    form = plot.suffix.lower().removeprefix(".")
    if form not in ("svg", "png"):
        raise UsageError(f"--plot {plot} is neither .svg nor .png; name a file of one of these.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(f"--plot {plot} needs matplotlib; install hikui[plot], or leave it out.") from None
    return form


def _write(path: Path, content: bytes) -> None:
    from hikui.lowering.errors import HikuiError
    from hikui.lowering.files import write_whole

    try:
        write_whole(path, lambda place: Path(place).write_bytes(content))
    except OSError as error:
        raise HikuiError(f"{path} cannot be written: {error.strerror or error}; name another place.") from error

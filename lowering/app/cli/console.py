"""What a command writes, and where: results on stdout, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer

debug = ContextVar("debug", default=False)
"""Whether `--debug` was given: passes are then held to leaving the program alone that they are given."""


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for a terminal, nothing else where; gives the function to call with label, done and total."""
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def step(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield step


def announce(sentence: str) -> None:
    """A sentence on stderr for whoever watches a terminal."""
    if sys.stderr.isatty():
        typer.echo(sentence, err=True)


def warn(sentence: str) -> None:
    """A sentence on stderr that is to be read whoever watches."""
    typer.echo(f"hikui: warning: {sentence}", err=True)


def emit(content: object) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Columns on stdout, aligned by spaces; the last one may be long."""
    lines = [[str(cell) for cell in row] for row in ((header, *rows) if header else rows)]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


def size(nbytes: int) -> str:
    """Bytes for people: 10.5 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

"""Puts the commands together."""

import warnings
from typing import Annotated

import typer

from hikui import __version__
from hikui.lowering.app.cli import (
    benching,
    building,
    comparing,
    evaluating,
    fetching,
    graphs,
    machine,
    measuring,
    running,
)


def application() -> typer.Typer:
    """The command line as a Typer application."""
    app = typer.Typer(
        name="hikui",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in (
        building.lower, running.run, evaluating.evaluate, comparing.compare, running.verify, running.inspect,
        graphs.opt, graphs.explain, graphs.passes, measuring.sensitivity, machine.targets, machine.doctor,
        fetching.fetch, benching.bench,
    ):  # fmt: skip
        app.command("eval" if command is evaluating.evaluate else command.__name__)(command)
    return app


def quieten() -> None:
    """Keeps the libraries' warnings off stderr, where one sentence is to stand."""
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hikui {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings; goes with any command.")
    ] = False,
) -> None:
    """Lowers large language models to low-bit artefacts that many small machines run."""

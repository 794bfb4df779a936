"""`hikui targets` and `hikui doctor`: machines, this one among them."""

from typing import Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import emit, table


def targets(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List instead which kernel serves which format on which instruction set.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the targets."""
    if kernels:
        _kernels(as_json)
        return
    from hikui.lowering.artefact.target import TARGETS, resolve
    from hikui.lowering.errors import HikuiError

    try:
        host = resolve("host").name
    except HikuiError:
        host = None
    if as_json:
        emit(
            [
                {
                    "name": target.name,
                    "triple": target.triple,
                    "isas": target.isas,
                    "features": target.features,
                    "description": target.description,
                    "host": target.name == host,
                }
                for target in TARGETS.values()
            ]
        )
        return
    rows = [
        (target.name, target.triple, target.description + (" – this machine (`host`)" if target.name == host else ""))
        for target in TARGETS.values()
    ]
    table(rows)


def _kernels(as_json: bool) -> None:
    from hikui.backends.kernels.cuda import kernels as cuda
    from hikui.backends.kernels.fields import SEGMENTS
    from hikui.backends.kernels.isa import ISAS
    from hikui.backends.kernels.isa.base import SIZES
    from hikui.backends.kernels.table import ACTIVATIONS, is_fallback, served

    found = [
        (kind, activations, isa.name, served(isa, kind, activations))
        for kind in SEGMENTS
        for activations in ACTIVATIONS
        for isa in ISAS.values()
    ]
    found += [(kind, activations, "cuda", cuda.served(activations)) for kind in SEGMENTS for activations in ACTIVATIONS]
    if as_json:
        emit(
            [
                {"format": kind, "activations": activations, "isa": isa, "rows": size, "kernel": name,
                 "fallback": is_fallback(name)}
                for kind, activations, isa, names in found
                for size, name in zip(SIZES, names, strict=True)
            ]
        )  # fmt: skip
        return
    typer.echo("Kernels for 1 / 2 to 15 / 16 and more rows of activations; one name where they are the same.\n")
    alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for kind, activation, isa, names in found:
        alike.setdefault((kind, isa, names), []).append(activation)
    rows = []
    for (kind, isa, names), activations in alike.items():
        text = names[0] if len(set(names)) == 1 else " / ".join(names)
        rows.append((kind, ", ".join(activations), isa, text + (" (fallback)" if any(map(is_fallback, names)) else "")))
    table(rows, ("format", "activations", "instruction set", "kernel"))


def doctor(as_json: options.Json = False) -> None:
    """Say what is installed here, what is missing, and how to get it."""
    from hikui.lowering.app.doctor import examine

    findings = examine()
    if as_json:
        emit([{"name": f.name, "found": f.found, "needed_for": f.needed_for, "remedy": f.remedy} for f in findings])
    else:
        table(
            [("ok" if f.found else "--", f.name, f.found or f"missing: {f.remedy} ({f.needed_for})") for f in findings]
        )
    if any(finding.required and finding.found is None for finding in findings):
        raise typer.Exit(1)

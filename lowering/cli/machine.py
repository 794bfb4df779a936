"""`hikui targets` and `hikui doctor`: machines, this one among them."""

import typer

from hikui.lowering.cli import options
from hikui.lowering.cli.console import emit, table


def targets(as_json: options.Json = False) -> None:
    """List the targets."""
    from hikui.lowering.errors import HikuiError
    from hikui.lowering.target import TARGETS, resolve

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


def doctor(as_json: options.Json = False) -> None:
    """Say what is installed here, what is missing, and how to get it."""
    from hikui.lowering.doctor import examine

    findings = examine()
    if as_json:
        emit([{"name": f.name, "found": f.found, "needed_for": f.needed_for, "remedy": f.remedy} for f in findings])
    else:
        table(
            [("ok" if f.found else "--", f.name, f.found or f"missing: {f.remedy} ({f.needed_for})") for f in findings]
        )
    if any(finding.required and finding.found is None for finding in findings):
        raise typer.Exit(1)

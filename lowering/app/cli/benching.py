"""`hikui bench`: the kernels on this machine."""

from typing import Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import emit, progress, table


def bench(
    rows: Annotated[
        int, typer.Option(help="Output features of the matrix, a multiple of 16.", min=16, max=1 << 17)
    ] = 4096,
    columns: Annotated[int, typer.Option(help="Input features of the matrix.", min=128, max=1 << 17)] = 4096,
    as_json: options.Json = False,
) -> None:
    """Time the low-bit products on this machine, and say which kernel each uses."""
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from hikui.backends import measurement
    from hikui.backends.kernels.standalone import Library, link
    from hikui.lowering.artefact.target import resolve
    from hikui.lowering.errors import UsageError

    if rows % 16:
        raise UsageError(f"--rows {rows} is not a multiple of 16.")
    target = resolve("host")
    with progress() as step, tempfile.TemporaryDirectory() as folder:
        step("kernels", 0, 1)
        library = Library(link(target.triple, target.isas, Path(folder) / "kernels.so"))
        isa = library.isa()
        uses = measurement.describe(library)
        step("kernels", 1, 1)
        timings = []
        for done, use in enumerate(uses):
            step("products", done, len(uses))
            timings.append(measurement.measure(library, use, rows, columns))
        step("products", len(uses), len(uses))
    if as_json:
        emit({"isa": isa, "rows": rows, "columns": columns, "products": [asdict(timing) for timing in timings]})
        return
    typer.echo(f"{isa}, one thread, {rows}×{columns}, groups of {measurement.GROUP}, int8 activations\n")
    cells = [(t.format, t.m, f"{t.gmacs:.1f}", f"{t.gbs:.1f}", _kernel(t.kernel)) for t in timings]
    table(cells, ("format", "M", "GMAC/s", "GB/s", "kernel"))


def _kernel(name: str) -> str:
    """The library calls its portable kernel `generic`."""
    return f"{name} (fallback)" if name.startswith("generic") else name

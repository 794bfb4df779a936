"""`hikui lower`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import announce, debug, emit, progress, size, warn

if TYPE_CHECKING:
    from hikui.lowering.app.prediction import Prediction


def lower(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The artefact's folder; it is whole or absent.", metavar="DIR")
    ],
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a file.", metavar="FILE_OR_NAME")] = "int4",
    target: Annotated[str, typer.Option(help="What it is for; `hikui targets` lists them.")] = "host",
    backend: Annotated[str, typer.Option(help="tvm or onnxruntime.")] = "tvm",
    calibration: options.CalibrationText = None,
    context: options.Context = None,
    target_bpw: options.TargetBpw = None,
    target_size: options.TargetSize = None,
    target_latency: options.TargetLatency = None,
    speeds: options.Speeds = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only choose formats under the budget, and predict size and cost; lowering goes on from there.",
        ),
    ] = False,
    debug_dump: options.DumpFolder = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start anew, and keep nothing to go on from after a kill.")
    ] = False,
    memory: options.Memory = None,
    jobs: options.JobCount = 1,
    engine: options.Engine = "processes",
    as_json: options.Json = False,
) -> None:
    """Lower a model to an artefact."""
    from hikui.lowering.app.lower import make_artefact, peak_memory
    from hikui.lowering.app.prediction import predict
    from hikui.lowering.app.request import Execution, Request
    from hikui.lowering.engine.jobs import Jobs
    from hikui.lowering.errors import UsageError

    if speeds is not None and target_latency is None and not dry_run:
        raise UsageError("--speeds has no effect without --target-latency or --dry-run; leave it out, or give one.")
    request = Request(
        model,
        recipe,
        calibration,
        context,
        target_bpw,
        tokenizer,
        trust_remote_code,
        target_size,
        target_latency,
        speeds,
    )
    with progress() as step:
        execution = Execution(
            resume=not no_resume,
            memory=options.nbytes(memory),
            jobs=Jobs(jobs, engine),
            debug_dump=debug_dump,
            check_inputs=debug.get(),
            progress=step,
            announce=announce,
            warn=warn,
        )
        if dry_run:
            predicted = predict(request, output, target=target, backend=backend, execution=execution)
        else:
            artefact = make_artefact(request, output, target=target, backend=backend, execution=execution)
    if dry_run:
        _show(predicted, as_json)
        return
    manifest = artefact.manifest
    sizes = manifest.sizes
    if as_json:
        emit(
            {
                "directory": str(output),
                "backend": manifest.backend,
                "target": manifest.target.name,
                "recipe": manifest.provenance.recipe,
                **sizes.model_dump(),
                "peak_memory_bytes": peak_memory(),
            }
        )
        return
    typer.echo(
        f"{output}: {manifest.backend} for {manifest.target.name}, {sizes.true_bpw:.3f} bits per weight "
        f"({sizes.block_bpw:.3f} in blocks, {sizes.all_bpw:.3f} of everything stored; {size(sizes.linear_bytes)} of "
        f"linear sites), {size(sizes.total_bytes)} in all"
    )


def _show(predicted: "Prediction", as_json: bool) -> None:
    if as_json:
        emit(asdict(predicted))
        return
    typer.echo(
        f"{predicted.block_bpw:.3f} bits per weight in blocks, {size(predicted.weight_bytes)} of weights, an artefact "
        f"of about {size(predicted.artefact_bytes)}; the costs of its sites add up to {predicted.cost:.4g}"
    )
    typer.echo(", ".join(f"{count} × {name}" for name, count in predicted.formats.items()))
    if predicted.milliseconds is not None:
        inside, every = predicted.milliseconds
        typer.echo(f"the products of a token: about {every:.3g} ms on one thread, {inside:.3g} of them in blocks")

"""`hikui opt`, `hikui explain` and `hikui passes`: the graph and what changes it."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import announce, debug, emit, progress, table, warn

if TYPE_CHECKING:
    from hikui.lowering.app.request import Request
    from hikui.lowering.ir.program import Program
    from hikui.lowering.pipeline.contract import Pass, PassResult


def opt(
    model: options.ModelOrProgram,
    pipeline: Annotated[str, typer.Option(help="Passes, such as 'canonicalise,rtn{bits=4,group=64}'.")] = "",
    print_ir: Annotated[
        bool, typer.Option("--print-ir", help="Print the program after the last pass; `opt` reads it again.")
    ] = False,
    print_ir_after: Annotated[
        list[str] | None,
        typer.Option("--print-ir-after", help="Print it after this pass; may be repeated.", metavar="PASS"),
    ] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Print what each pass did and how long it took.")] = False,
    calibration: options.CalibrationText = None,
    context: options.Context = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    debug_dump: options.DumpFolder = None,
    weights: options.ProgramWeights = None,
    seed: options.WeightSeed = None,
    save_weights: options.WeightsFile = None,
) -> None:
    """Run passes on a model, or on a program that --print-ir wrote, and look at the result; nothing is built."""
    from hikui.lowering.app.lower import read_calibration
    from hikui.lowering.app.notices import tell_of_text
    from hikui.lowering.app.program_file import save_weights as write_weights
    from hikui.lowering.app.request import Request, available_passes
    from hikui.lowering.errors import UsageError
    from hikui.lowering.ir.printer import to_text
    from hikui.lowering.pipeline.contract import PassContext
    from hikui.lowering.pipeline.debug_dump import DebugDump
    from hikui.lowering.pipeline.recipe import CalibrationSettings
    from hikui.lowering.pipeline.run import InputUnchanged, Pipeline
    from hikui.lowering.pipeline.text import parse_pipeline

    available = available_passes()
    steps = parse_pipeline(pipeline, available.values()) if pipeline.strip() else []
    wanted = set(print_ir_after or ())
    if unknown := sorted(wanted - {step.name for step in steps}):
        raise UsageError(f"--print-ir-after {unknown[0]}: the pipeline has no such pass.")
    with progress() as report:
        report("trace", 0, 1)
        request = Request(model, context=context, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        program = _program(request, weights=weights, seed=seed)
        report("trace", 1, 1)
        for sentence in program.cautions:
            warn(sentence)
        data = None
        if calibration is not None or any(step.calibrates for step in steps):
            data = read_calibration(program, calibration, CalibrationSettings())
            tell_of_text(data, calibration, CalibrationSettings(), program, announce, warn)
        dumps = [] if debug_dump is None else [DebugDump(debug_dump, program)]
        checks = [InputUnchanged()] if debug.get() else []
        runner = Pipeline(steps, [_PrintAfter(wanted), *dumps, *checks])
        program = runner.run(program, PassContext(data, None, report))
    if print_ir:
        typer.echo(to_text(program), nl=False)
    if save_weights is not None:
        write_weights(program, save_weights)
    if timing:
        # Behind a program these lines are comments, so that the whole can be read back.
        mark = "// " if print_ir or wanted else ""
        rows = [
            (
                mark + record.step,
                "changed" if record.modified else "unchanged",
                f"{record.seconds:.2f} s",
                "; ".join(record.notes),
            )
            for record in runner.records
        ]
        table(rows, (f"{mark}pass", "", "time", "notes"))


def _program(request: "Request", *, weights: Path | None, seed: int | None) -> "Program":
    """The program of a model, or of a text."""
    from hikui.lowering.app.program_file import is_program, read_program
    from hikui.lowering.errors import UsageError
    from hikui.lowering.huggingface.tokenizer import ModelTokenizer

    model = str(request.model)
    if is_program(model):
        if request.context is not None:
            raise UsageError(f"--context has no effect on {model}: a program's text states its context.")
        folder, trusted = request.tokenizer, request.trust_remote_code
        tokenizer = None if folder is None else ModelTokenizer(Path(folder), trusted)
        return read_program(Path(model), weights=weights, seed=seed, tokenizer=tokenizer)
    for option, value in (("--weights", weights), ("--seed", seed)):
        if value is not None:
            raise UsageError(f"{option} has no effect on {model}: a model has its own weights, a program's text none.")
    return request.traced()


class _PrintAfter:
    """Prints the program after the passes that were named."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def before(self, step: "Pass", program: "Program") -> None:
        """Nothing is printed before a pass."""

    def after(self, step: "Pass", result: "PassResult", seconds: float) -> None:
        from hikui.lowering.ir.printer import to_text

        if step.name in self._names:
            typer.echo(f"// after {step}")
            typer.echo(to_text(result.program), nl=False)


def passes(
    as_json: options.Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema of recipes with these passes.")] = False,
) -> None:
    """List the passes and their options."""
    from hikui.lowering.app.request import available_passes
    from hikui.lowering.pipeline.recipe import json_schema

    if schema:
        emit(json_schema(available_passes()))
        return

    rows = []
    for name, kind in available_passes().items():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "summary": summary, "options": {f.name: f.default for f in fields(kind)}})
    if as_json:
        emit(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']:<14} {row['summary']}")
        assert isinstance(row["options"], dict), "options are a mapping"
        for option, default in row["options"].items():
            typer.echo(f"{'':<16} {option} = {default!r}")


def explain(
    model: options.Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Also run this recipe, and say what its fusions did.", metavar="FILE_OR_NAME", show_default=False
        ),
    ] = None,
    calibration: options.CalibrationText = None,
    context: options.Context = None,
    tokenizer: options.TokenizerFolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Say what hikui finds in a model, and which patterns do not hold, where and why."""
    from hikui.lowering.app.lower import prepare
    from hikui.lowering.app.request import Execution, Request, available_passes
    from hikui.lowering.ir.program import BLOCK, GROUP, SITE
    from hikui.lowering.pipeline.contract import PassContext
    from hikui.lowering.pipeline.run import Pipeline
    from hikui.lowering.pipeline.text import parse_pipeline
    from hikui.passes.graph import matrix_shape, sites
    from hikui.passes.rewrite.explain import explain as find

    available = available_passes()
    request = Request(
        model,
        recipe,
        calibration=calibration,
        context=context,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    with progress() as report:
        prepared = None
        if recipe is None:
            report("trace", 0, 1)
            traced, _ = request.compared()
            report("trace", 1, 1)
            for sentence in traced.cautions:
                warn(sentence)
        else:
            prepared = prepare(request, Execution(check_inputs=debug.get(), progress=report, warn=warn))
            traced = prepared.traced
        named = Pipeline(parse_pipeline("canonicalise", available.values())).run(traced, PassContext())
        findings = find(named)
        if prepared is None:
            runner = Pipeline(parse_pipeline("fuse", available.values()))
            runner.run(named, PassContext())
            records = tuple(runner.records)
        else:
            records = prepared.records
    notes = [{"pass": record.step, "notes": list(record.notes)} for record in records if record.notes]
    rows = [
        (node.meta[SITE], node.meta.get(GROUP, ""), node.meta.get(BLOCK), matrix_shape(node)) for node in sites(named)
    ]
    if as_json:
        emit(
            {
                "architecture": traced.config.architecture,
                "sites": [dict(zip(("site", "group", "block", "shape"), row, strict=True)) for row in rows],
                "findings": [asdict(finding) for finding in findings],
                "passes": notes,
            }
        )
        return
    blocks = len({block for _, _, block, _ in rows if block is not None})
    typer.echo(f"{traced.config.architecture}: {len(rows)} linear sites in {blocks} blocks")
    table(
        [(name, group, "" if block is None else block, f"{n}×{k}") for name, group, block, (n, k) in rows],
        ("site", "tied group", "block", "shape"),
    )
    typer.echo("\nWhat is not taken further:" if findings else "\nEvery product is a site and every pattern is known.")
    for finding in findings:
        typer.echo(f"  {finding}")
    for note in notes:
        typer.echo(f"\n{note['pass']}")
        for line in note["notes"]:
            typer.echo(f"  {line}")

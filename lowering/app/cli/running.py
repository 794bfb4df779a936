"""`hikui run`, `hikui verify` and `hikui inspect`: what is done with an artefact."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hikui.lowering.app.cli import options
from hikui.lowering.app.cli.console import emit, size, table, warn

if TYPE_CHECKING:
    from hikui.lowering.artefact.manifest import Manifest


def run(
    directory: options.ArtefactFolder,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_new_tokens: options.NewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    seed: options.DrawSeed = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the token that ends a text.")] = False,
    as_json: options.Json = False,
    emulate: options.Emulate = False,
) -> None:
    """Generate text with an artefact."""
    from hikui.lowering.app.runners import load
    from hikui.lowering.artefact.generate import Sampling

    sampling = Sampling(temperature, top_k, seed)
    with load(directory, emulate=emulate) as model:
        text, result = model.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, ignore_eos=ignore_eos)
    if result.full:
        warn(
            f"The text ends after {len(result.tokens)} tokens because the cache is full: it holds "
            f"{model.artefact.manifest.model.context_length}, the prompt among them."
        )
    if as_json:
        emit(
            {
                "prompt": prompt,
                "tokens": result.tokens,
                "text": text,
                "cache_full": result.full,
                "first_token_seconds": result.first_token_seconds,
                "tokens_per_second": result.tokens_per_second,
            }
        )
        return
    typer.echo(prompt + text)


def verify(
    directory: options.ArtefactFolder,
    as_json: options.Json = False,
    emulate: options.Emulate = False,
    public_key: Annotated[
        Path | None, typer.Option(help="Public key of minisign that the manifest must be signed with.")
    ] = None,
) -> None:
    """Check an artefact: files, libraries, this machine's features, and the numbers that it and its own runner give.

    That proves that the folder is whole and computes what the lowered graph says. Who made it only a signature proves,
    which `minisign -Sm DIR/manifest.json` makes.
    """
    from hikui.lowering.app.runners import is_foreign, open_board_runner, open_runner
    from hikui.lowering.artefact import verify as checks
    from hikui.lowering.artefact.manifest import Artefact

    artefact = Artefact.load(directory)
    signed = [] if public_key is None else [checks.check_signature(artefact, public_key)]
    done = [*signed, checks.check_files(artefact), checks.check_modes(artefact), checks.check_libraries(artefact)]
    if is_foreign(artefact) and not emulate:
        triple = artefact.manifest.target.triple
        done.append(
            checks.Check("numbers", None, f"not checked: it is for {triple}; --emulate runs it under qemu-user")
        )
    else:
        done.append(checks.check_numbers(artefact, lambda: open_runner(artefact, emulate=emulate)))
        # A foreign artefact has just been run by its own runner, under qemu-user.
        if not is_foreign(artefact):
            done.append(checks.check_numbers(artefact, lambda: open_board_runner(artefact), "runner"))
    if as_json:
        emit([{"check": check.name, "passed": check.passed, "detail": check.detail} for check in done])
        return
    for check in done:
        typer.echo(f"{'--' if check.passed is None else 'ok'}  {check.name:<10} {check.detail}")
    if public_key is None:
        typer.echo("This says that the folder is whole and what it computes, not who made it.")


def inspect(
    directory: options.ArtefactFolder,
    bits: Annotated[
        bool, typer.Option("--bits", help="Show what every stored bit is for, and what others' formats would take.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show what an artefact holds: model, target, sizes, bits of each site."""
    from hikui.lowering.artefact.manifest import read_manifest

    manifest = read_manifest(directory)
    if bits:
        _show_bits(manifest, as_json)
        return
    if as_json:
        emit(manifest.model_dump(mode="json", by_alias=True))
        return
    model, sizes, made = manifest.model, manifest.sizes, manifest.provenance
    typer.echo(f"{made.model} ({model.architecture}), context {model.context_length}, vocabulary {model.vocabulary}")
    typer.echo(
        f"{manifest.backend} for {manifest.target.name} ({manifest.target.triple}, {', '.join(manifest.target.isas)})"
    )
    typer.echo(f"recipe {made.recipe}: {made.pipeline}")
    needs = [*manifest.target.features, *(f"{name} {least}" for name, least in sorted(manifest.requires.items()))]
    typer.echo(f"needs {', '.join(needs)}")
    typer.echo(
        f"bits per weight: {sizes.block_bpw:.3f} in blocks, {sizes.true_bpw:.3f} with the head, {sizes.all_bpw:.3f} of "
        f"everything stored; {size(sizes.linear_bytes)} of linear sites, "
        f"{size(sizes.weight_bytes)} of weights, {size(sizes.total_bytes)} in {len(manifest.files)} files"
    )
    if sizes.cache_bytes is not None:
        typer.echo(f"key-value cache of {size(sizes.cache_bytes)} in {model.cache_format}")
    for name, count in sorted(Counter(site.format for site in manifest.sites.values()).items()):
        typer.echo(f"{count} sites of {name}")
    rows = [
        (name, site.format, f"{site.out_features}×{site.in_features}", site.rank or "", f"{site.true_bits:.3f}")
        for name, site in manifest.sites.items()
    ]
    table(rows, ("site", "format", "shape", "rank", "bits"))


def _show_bits(manifest: "Manifest", as_json: bool) -> None:
    """Every stored bit by what it is for, and the same shapes in others' formats."""
    from hikui.lowering.errors import HikuiError
    from hikui.lowering.formats.rivals import RIVALS, rival_bits
    from hikui.lowering.ir.sizes import KINDS_OF_BYTES

    sizes = manifest.sizes
    if sizes.kinds is None:
        raise HikuiError("The artefact is older than this count; lower the model again.")
    inside = [site for site in manifest.sites.values() if site.in_block]
    shapes = [(site.out_features, site.in_features) for site in inside]
    rivals = rival_bits(shapes)
    if as_json:
        emit({"kinds": sizes.kinds, "parameters": sizes.parameters, "block_bpw": sizes.block_bpw, "rivals": rivals})
        return
    rows = [
        (KINDS_OF_BYTES.get(kind, kind), size(nbytes), f"{8 * nbytes / sizes.parameters:.4f}")
        for kind, nbytes in sizes.kinds.items()
    ]
    rows.append(("everything", size(sizes.weight_bytes), f"{sizes.all_bpw:.4f}"))
    table(rows, ("what is stored", "bytes", "bits a parameter of the model"))
    typer.echo(f"\n{sizes.block_bpw:.3f} bits a weight in blocks; the same matrices in others' formats, all counted:")
    stored = {rival.name: rival.stored for rival in RIVALS}
    table(
        [(name, f"{value:.3f}", stored[name]) for name, value in rivals.items()],
        ("", "bits a weight", "what is counted"),
    )

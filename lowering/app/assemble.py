"""Fills the folder of an artefact: what the backend builds, and everything that goes beside it."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hikui import __version__
from hikui.lowering.app.outliers import OutlierWatch
from hikui.lowering.artefact import manifest as artefacts
from hikui.lowering.artefact import report, text
from hikui.lowering.artefact.arithmetic import arithmetic
from hikui.lowering.artefact.target import Target
from hikui.lowering.artefact.verify import TOLERANCE, allowed_difference, difference
from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import LEAST_SCALE
from hikui.lowering.ir import dialect, sizes
from hikui.lowering.ir.finite import require_finite_logits
from hikui.lowering.ir.interpreter import Observer, ReferenceRunner
from hikui.lowering.ir.program import ModelConfig, Program
from hikui.lowering.ir.store import FileTensor
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass
from hikui.lowering.pipeline.recipe import Recipe
from hikui.lowering.pipeline.run import StepRecord
from hikui.lowering.progress import Progress
from hikui.lowering.trace import Fidelity

if TYPE_CHECKING:
    from hikui.lowering.artefact.backend import Backend

_TOOLS = (
    "apache-tvm", "gguf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript",
    "safetensors", "scipy", "tokenizers", "torch", "transformers",
)  # fmt: skip
_ROOM = 64_000_000
"""Bytes that libraries, tokenizer and the compilers' temporary files may take beside the weights."""

_LOST_ROWS = 0.5
"""Share of a cache's rows without a scale from which on it is refused: single tokens may well have no values."""

_REFERENCE_PROMPT, _REFERENCE_STEPS = 6, 3
_REFERENCE_TEXT = "Once upon a time there was a little house at the edge of a wood, and in it lived an old man."


@dataclass(frozen=True)
class Prepared:
    """A model after its recipe's passes, ready for any backend and target.

    Attributes:
        name: the model's, for reports.
        recipe: what was asked for.
        resolved: the same with every option of every pass spelled out, as YAML.
        traced: the program before the passes.
        origin: the float program in canonical form, or None where the recipe has no `canonicalise`.
        program: the lowered program.
        passes: as they ran.
        records: what they did.
        calibration: what they were calibrated on, for the manifest.
        floats: the last program in which every site was still float: what the packed matrices stand for, transforms
            such as rotations folded in; None where it was not kept.
        notices: sentences that a user should read before the numbers are believed.
        fidelity: what the traced program was compared with the model itself on.
    """

    name: str
    recipe: Recipe
    resolved: str
    traced: Program
    origin: Program | None
    program: Program
    passes: tuple[Pass, ...]
    records: tuple[StepRecord, ...]
    calibration: dict[str, str | int] | None
    floats: Program | None = None
    notices: tuple[str, ...] = ()
    fidelity: Fidelity | None = None


def assemble(
    directory: Path, prepared: Prepared, target: Target, backend: "Backend", progress: Progress
) -> tuple[str, ...]:
    """Fills an empty folder; the manifest comes last. Gives what backend and numbers have to say of it.

    Raises:
        HikuiError: there is too little room, or the backend cannot build the program.
    """
    program, config = prepared.program, prepared.program.config
    taken = sizes.measure(program)
    inside = {site.name for site in taken.sites if site.in_block}
    require_room(directory, taken.total_bytes)
    built = backend.build(program, target, directory, progress)
    progress("reference numbers", 0, 1)
    give_back()
    watch = OutlierWatch()
    reference = reference_numbers(program, watch)
    reference.save(directory / artefacts.REFERENCE)
    noise = rounding_noise(program, reference) if _rounds(program) else 0.0
    give_back()
    progress("reference numbers", 1, 1)
    outliers = watch.sentence(any(step.evens_columns for step in prepared.passes))
    notices = (*built.notices, *(() if outliers is None else (outliers,)))
    if program.tokenizer is not None:
        text.copy_tokenizer(program.tokenizer, directory / artefacts.TOKENIZER)
    (directory / artefacts.RECIPE).write_text(prepared.resolved, "utf-8")
    sites = report.site_reports(program, taken, prepared.origin, progress)
    name, chosen = prepared.name, prepared.recipe
    summary = {
        "model": f"{name} ({config.architecture})",
        "recipe": f"{chosen.name}: {chosen.description}" if chosen.description else chosen.name,
        "backend": backend.name,
        "target": f"{target.name} ({target.triple})",
        "context": config.context_length,
    }
    report.write(
        directory, title=f"{name}, {chosen.name}", summary=summary, sizes=taken, sites=sites, steps=prepared.records,
        notices=(*prepared.notices, *notices),
    )  # fmt: skip
    progress("hashes", 0, 1)
    files = artefacts.inventory(directory)
    manifest = artefacts.Manifest(
        schema_version=artefacts.SCHEMA_VERSION,
        backend=backend.name,
        target=artefacts.TargetEntry(
            name=target.name,
            triple=target.triple,
            isas=target.isas,
            features=target.features,
            emulator_cpu=target.emulator_cpu,
        ),
        model=artefacts.ModelEntry(
            architecture=config.architecture,
            context_length=config.context_length,
            vocabulary=config.vocabulary,
            layers=len(config.caches),
            cache_format=config.cache_format,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        ),
        program=dict(built.entry),
        requires=dict(built.requirements),
        sites={
            site.name: artefacts.SiteEntry(
                format=site.format,
                out_features=site.out_features,
                in_features=site.in_features,
                rank=site.rank,
                bytes=site.bytes,
                true_bits=site.true_bits,
                in_block=site.name in inside,
            )
            for site in sites
        },
        sizes=artefacts.SizesEntry(
            linear_bytes=taken.linear_bytes,
            weight_bytes=taken.total_bytes,
            total_bytes=sum(entry.bytes for entry in files.values()),
            cache_bytes=config.cache_bytes,
            parameters=taken.parameters,
            kinds=taken.kinds,
            **taken.bits(),
        ),
        metrics=_metrics(program, sites, noise),
        provenance=artefacts.Provenance(
            hikui=__version__,
            model=name,
            checkpoint=checkpoint_hashes(prepared.traced),
            stored=stored_kinds(prepared.traced),
            recipe=chosen.name,
            pipeline=",".join(map(str, prepared.passes)),
            calibration=prepared.calibration,
            trace=None if prepared.fidelity is None else artefacts.TraceEntry(**asdict(prepared.fidelity)),
            toolchain=toolchain(),
            arithmetic=arithmetic(),
        ),
        files=files,
    )
    (directory / artefacts.MANIFEST).write_text(manifest.to_json(), "utf-8")
    progress("hashes", 1, 1)
    return notices


def require_room(directory: Path, weights: int) -> None:
    """Checks before the long work that an artefact with so many bytes of weights fits; LLVM ends the process if not.

    Raises:
        HikuiError: there is too little room for it, or for what the compilers write meanwhile.
    """
    for place, need in ((directory, weights + _ROOM), (Path(gettempdir()), _ROOM)):
        free = shutil.disk_usage(place).free
        if free < need:
            raise HikuiError(
                f"{place} has room for {free / 1e6:.0f} MB, and {need / 1e6:.0f} MB are needed; make room or choose "
                f"another {'-o' if place == directory else 'TMPDIR'}."
            )


def reference_numbers(program: Program, observe: Observer | None = None) -> artefacts.Reference:
    """What the lowered program gives in the interpreter for the start of a fixed sentence.

    Raises HikuiError where they are not finite.

    Plain text rather than arbitrary tokens, because models are calmer on what they know: fewer activations lie on the
    edge between two roundings. Without a tokenizer the tokens are drawn with a fixed seed.
    """
    config = program.config
    count = min(_REFERENCE_PROMPT + _REFERENCE_STEPS, config.context_length)
    prompt = min(_REFERENCE_PROMPT, count)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, count)
    if program.tokenizer is not None:
        known = text.TextCodec(program.tokenizer).encode_prompt(_REFERENCE_TEXT)[:count]
        tokens[: len(known)] = known
    runner = ReferenceRunner(program, keep_weights=False, observe=observe)
    rows = [runner.forward(tokens[:prompt], 0)]
    rows += [runner.forward(tokens[at : at + 1], at) for at in range(prompt, count)]
    logits = np.concatenate(rows)
    require_finite_logits(
        program, torch.from_numpy(tokens)[None], torch.from_numpy(logits), "The lowered program gives"
    )
    refuse_vanished_caches(config, runner.caches, count)
    return artefacts.Reference(tokens, prompt, logits[prompt - 1 :])


def rounding_noise(program: Program, reference: artefacts.Reference) -> float:
    """How far a program with rounded activations is from itself when its sums are added in another order.

    The interpreter takes the same tokens at once and three at a time, which should make no difference; where the last
    bit of a sum rounds an activation the other way, it does. A model whose first token has activations far above all
    others (SmolLM2) moves by .13 of the largest logit so, and its float program by 2e-6. Each step reads all weights,
    so there are few.

    Returns:
        The largest difference of a logit from the reference's, relative to the largest.
    """
    runner = ReferenceRunner(program, keep_weights=False)
    largest, count = 0.0, reference.tokens.size
    for step in (count, 3):
        runner.reset()
        parts = [runner.forward(reference.tokens[at : at + step], at) for at in range(0, count, step)]
        largest = max(largest, difference(np.concatenate(parts)[reference.prompt - 1 :], reference))
    return largest


def refuse_vanished_caches(config: ModelConfig, caches: Sequence[Tensor], tokens: int) -> None:
    """Looks whether a quantised cache holds anything: a half-precision scale has nothing below 2⁻²⁴.

    Args:
        config: the program's.
        caches: after so many tokens of real text, in the order of `ModelConfig.cache_tensors`.
        tokens: as said.

    Raises:
        HikuiError: the scales of most of a layer's keys or values are lost.
    """
    for tensor, cache in zip(config.cache_tensors(), caches, strict=True):
        side, is_scale, layer = tensor.kind.partition("_scale_")
        if not is_scale:
            continue
        lost = float((cache[..., :tokens].float().abs() < LEAST_SCALE).float().mean())
        if lost > _LOST_ROWS:
            raise HikuiError(
                f"The {side}s of layer {layer} are so small that half-precision scales hold "
                f"{100 * (1 - lost):.0f} % of them; lower without kv_cache."
            )


def checkpoint_folders(program: Program) -> list[Path]:
    """The folders of the files that the weights of a freshly traced program are read from.

    None for a GGUF that was given by itself: what lies beside it is no part of the checkpoint.
    """
    files = _checkpoint_files(program)
    return sorted({path.parent for path, alone in files.items() if not alone})


def checkpoint_hashes(program: Program) -> dict[str, str]:
    """sha256 of the files that the weights of a freshly traced program are read from, and of their config, by name."""
    paths = set(_checkpoint_files(program))
    configs = {config for folder in checkpoint_folders(program) if (config := folder / "config.json").is_file()}
    return {path.name: artefacts.sha256(path) for path in sorted(paths | configs)}


def stored_kinds(program: Program) -> dict[str, int] | None:
    """How many tensors of each type the weights of a freshly traced program are in a GGUF; None for another checkpoint.

    A tensor that several parameters share counts once.
    """
    sources = (program.store.source(key) for key in program.store.keys())
    kinds = {source.stored: source.kind for source in sources if isinstance(source, GgufTensor)}
    return dict(sorted(Counter(kinds.values()).items())) or None


def _checkpoint_files(program: Program) -> dict[Path, bool]:
    """The files that weights are read from, and whether each was given by itself."""
    found = {}
    for key in program.store.keys():
        source = program.store.source(key)
        for path in _files(source):
            found[path] = isinstance(source, GgufTensor) and source.alone
    return found


def _files(source: Any) -> Iterable[Path]:
    """The files behind a tensor source, however it is wrapped."""
    if isinstance(source, FileTensor):
        return (source.path,)
    inner = (getattr(source, name, None) for name in ("source", "qzeros", "scales", "g_idx"))
    return tuple(path for part in inner if part is not None for path in _files(part))


def toolchain() -> dict[str, str]:
    """Versions of the packages that decide what is written; build tags such as `+cpu` are left out."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _rounds(program: Program) -> bool:
    return any(node.target in dialect.ROUNDING_OPS for node in program.graph.nodes)


def _metrics(program: Program, sites: Sequence[report.SiteReport], noise: float) -> dict[str, float]:
    found = {artefacts.REFERENCE_TOLERANCE: allowed_difference(noise) if _rounds(program) else TOLERANCE}
    errors = [site.weight_error for site in sites if site.weight_error is not None]
    return {**found, "largest_weight_error": max(errors)} if errors else found

"""Measures what each linear site reads, on real text, one block of the model at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.checkpoint.container import read_safetensors
from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.ir.program import SITE, STATISTICS, Program
from hikui.lowering.ir.store import TensorSource
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import blocks, float_sites, groups, is_measured, matrix_shape
from hikui.passes.measure.evidence import SAMPLE, TOKEN_WEIGHT, Sums, token_weights
from hikui.passes.measure.footprint import estimate
from hikui.passes.measure.resumable_traversal import ResumableTraversal

_KINDS = frozenset({"mean_square", "max_abs", "mean_abs"})


@dataclass(frozen=True)
class Calibrate(Pass):
    """Measures the mean square and the mean and largest magnitude of every input column of every site.

    Tied sites share one set of statistics, kept in the store under `statistics/<group>/…`: `mean_square`, `max_abs` and
    `mean_abs` float32 [K], `tokens` int64 []; with `gram` also `gram` float32 [K, K], summed in float64, and `sample`
    float32 [tokens, K], the activation of up to 512 evenly spaced tokens. Where `guide` has weighed the tokens, `gram`
    is E[w·x·xᵀ].

    Attributes:
        gram: also measure E[x·xᵀ] and keep a sample, which the whitened branch and the exact output error need;
            4 K² + 2048 K bytes a group.
    """

    name: ClassVar[str] = "calibrate"
    calibrates: ClassVar[bool] = True
    gram: bool = False

    def requires(self, program: Program) -> None:
        """Raises HikuiError where there is no unpacked site."""
        if not float_sites(program):
            raise HikuiError("There is no unpacked linear site to measure; run `canonicalise` first, and `rtn` later.")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Runs the calibration text through the program; the numbers do not depend on the order of the sites.

        Raises:
            HikuiError: no calibration text was given, an activation is NaN or infinite, or there is too little memory.
        """
        work = program.clone()
        with Workers(context.workers) as workers:
            note = _Measuring(self, program, work, context, workers).run()
        return PassResult(program, False) if note is None else PassResult(work, True, [note])

    def ensures(self, program: Program) -> None:
        """Every unpacked site has statistics."""
        for node in float_sites(program):
            if not is_measured(node):
                raise VerificationError(f"Site {node.meta[SITE]} was not measured.")


class _Measuring(ResumableTraversal):
    """One pass through the model; `work` gets the statistics."""

    def __init__(
        self, options: Calibrate, program: Program, work: Program, context: PassContext, workers: Workers
    ) -> None:
        super().__init__(options.name, program, work, context, workers)
        self._wanted = _KINDS | ({"gram", "sample"} if options.gram else set())
        self._blocks = blocks(float_sites(work))
        self._new = False
        need = estimate(
            work,
            self._blocks,
            self._texts,
            streams=1,
            matrices=int(options.gram),
            spare=0,
            corrected=False,
            workers=workers.count,
        )
        widths = [matrix_shape(members[0])[1] for block in self._blocks for members in block]
        stored = sum(4 * k * (k + SAMPLE) for k in widths) if options.gram else 0
        if context.resume or context.scratch is not None:
            self._expect(replace(need, disk=need.disk + stored))
        else:
            self._expect(replace(need, memory=need.memory + stored))

    def run(self) -> str | None:
        """Measures block by block; returns a note, or None where nothing is new."""
        resume, count, done = self._context.resume, len(self._blocks), 0
        finished, total = self._finished(count), sum(map(len, self._blocks))
        with self._stream(self._work) as stream:
            streams = {"float": stream}
            if 0 < finished < count:
                self._go_on(finished - 1, streams)
            for index, block in enumerate(self._blocks):
                kept = resume.scope(f"block-{index}")
                for members in block:
                    name = next(name for name, tied in groups(members).items() if tied)
                    found = kept.load(name) if index < finished else None
                    if found is None:
                        found = self._measured(stream, members)
                        kept.save(name, found)
                    self._store(name, members, found, kept)
                    done += 1
                    self._context.progress(self._name, done, total)
                if index >= finished:
                    self._keep(index, count, streams)
        if not self._new:
            return None
        assert self._context.calibration is not None
        name, tokens = self._context.calibration.source, sum(text.shape[1] for text in self._texts)
        return f"{total} activations measured on {tokens} tokens{f' of {name}' if name else ''}"

    def _measured(self, stream: Stream, members: list[fx.Node]) -> dict[str, Tensor]:
        """Brings the stream to tied sites and measures what they read."""
        sums: list[Sums] = []

        def observe(number: int, args: tuple[object, ...], _: object) -> None:
            x = args[0]
            assert isinstance(x, Tensor)
            if not sums:
                weights = token_weights(self._work, members[0], self._texts) if "gram" in self._wanted else None
                sums.append(Sums(x.shape[-1], self._wanted, self._workers, weights))
            sums[0].add(x)

        stream.advance(members[0], {members[0]: observe})
        (measured,) = sums
        if not measured.finite:
            raise HikuiError(
                f"Site {members[0].meta[SITE]} reads NaN or infinite activations on the calibration text, so nothing "
                "can be measured there; calibrate on another text, or look at the weights before it."
            )
        evidence = measured.evidence()
        every = {kind: getattr(evidence, kind) for kind in sorted(self._wanted)}
        out = {kind: tensor.float() for kind, tensor in every.items()}
        return out | {"tokens": torch.tensor(measured.tokens, dtype=torch.int64)}

    def _store(self, name: str, members: list[fx.Node], measured: dict[str, Tensor], kept: Resume) -> None:
        """Keeps the statistics of a group: those that lie in a file already are read from there."""
        store, keys = self._work.store, {}
        files: Mapping[str, TensorSource] = read_safetensors(kept.path(name)) if kept else {}
        for kind, tensor in measured.items():
            key = keys[kind] = f"statistics/{name}/{kind}"
            if key in store and torch.equal(store.load(key), tensor):
                continue
            self._new = True
            if kind in files:
                store.alias(key, files[kind])
            else:
                store.put(key, tensor)
        for node in members:
            held = node.meta.get(STATISTICS, {})
            now = keys | {kind: key for kind, key in held.items() if kind == TOKEN_WEIGHT}
            self._new |= held != now
            node.meta[STATISTICS] = now

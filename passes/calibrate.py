"""Measures what each linear site reads, on real text, one block of the model at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.passes_base import Pass, PassContext, PassResult
from hikui.lowering.program import SITE, STATISTICS, Program
from hikui.lowering.resume import Resume
from hikui.lowering.streaming import Stream
from hikui.lowering.workers import Workers
from hikui.passes.evidence import Sums
from hikui.passes.footprint import estimate, refuse_what_cannot_fit
from hikui.passes.graph import blocks, float_sites, groups

_KINDS = frozenset({"mean_square", "max_abs", "mean_abs"})


@dataclass(frozen=True)
class Calibrate(Pass):
    """Measures the mean square and the mean and largest magnitude of every input column of every site.

    Tied sites share one set of statistics, kept in the store under `statistics/<group>/…`: `mean_square`, `max_abs` and
    `mean_abs` float32 [K], `tokens` int64 [], and `gram` float64 [K, K].

    Attributes:
        gram: also measure E[x·xᵀ], which the whitened branch and the exact output error need; K² float64 a group.
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
        if context.calibration is None:
            raise HikuiError(
                "It measures the model on real text and none was given; give some with --calibration TEXT_FILE."
            )
        work = program.clone()
        with Workers(context.workers) as workers:
            new = self._measure(work, context, workers)
        if not new:
            return PassResult(program, False)
        tokens = sum(chunk.shape[1] for chunk in context.calibration.chunks)
        source = f" of {context.calibration.source}" if context.calibration.source else ""
        measured = len(groups(float_sites(work)))
        return PassResult(work, True, [f"{measured} activations measured on {tokens} tokens{source}"])

    def _measure(self, work: Program, context: PassContext, workers: Workers) -> bool:
        """Measures block by block; returns whether anything is new."""
        assert context.calibration is not None
        texts, walk = context.calibration.chunks, blocks(float_sites(work))
        footprint = estimate(
            work, walk, texts, streams=1, matrices=int(self.gram), spare=0, corrected=False, workers=workers.count
        )
        context.announce(f"{self.name} needs {footprint}")
        refuse_what_cannot_fit(footprint, context)
        resume, new, done, total = context.resume, False, 0, sum(map(len, walk))
        finished = next((i for i in range(len(walk)) if resume.load(f"finished-{i}") is None), len(walk))
        with Stream(work, texts, workers, scratch=context.scratch) as stream:
            if 0 < finished < len(walk):
                stream.restore(resume.scope(f"stream-{finished - 1}"))
            for index, block in enumerate(walk):
                kept = resume.scope(f"block-{index}")
                for members in block:
                    name = next(name for name, tied in groups(members).items() if tied)
                    found = kept.load(name) if index < finished else None
                    new |= self._store(work, name, members, found or self._group(stream, members, workers, name, kept))
                    done += 1
                    context.progress("calibrate", done, total)
                if resume and index >= finished:
                    if index + 1 < len(walk):
                        stream.save(resume.scope(f"stream-{index}"))
                    resume.save(f"finished-{index}", {"done": torch.tensor(1)})
                    if index:
                        resume.scope(f"stream-{index - 1}").drop()
        return new

    def _group(
        self, stream: Stream, members: list[fx.Node], workers: Workers, name: str, kept: Resume
    ) -> dict[str, Tensor]:
        """Brings the stream to tied sites and measures what they read."""
        sums: list[Sums] = []

        def observe(number: int, args: tuple[object, ...], _: object) -> None:
            x = args[0]
            assert isinstance(x, Tensor)
            if not sums:
                sums.append(Sums(x.shape[-1], _KINDS | ({"gram"} if self.gram else set()), workers))
            sums[0].add(x)

        stream.advance(members[0], {members[0]: observe})
        (measured,) = sums
        if not measured.finite:
            raise HikuiError(
                f"Site {members[0].meta[SITE]} reads NaN or infinite activations on the calibration text; the model "
                "itself is broken there."
            )
        evidence = measured.evidence()
        every = {kind: getattr(evidence, kind) for kind in (*sorted(_KINDS), "gram")}
        out = {kind: tensor for kind, tensor in every.items() if tensor is not None}
        out["tokens"] = torch.tensor(measured.tokens, dtype=torch.int64)
        kept.save(name, out)
        return out

    def _store(self, program: Program, name: str, members: list[fx.Node], measured: dict[str, Tensor]) -> bool:
        """Keeps the statistics of a group; returns whether they say anything new."""
        new = False
        keys = {}
        for kind, tensor in measured.items():
            key = keys[kind] = f"statistics/{name}/{kind}"
            if key not in program.store or not torch.equal(program.store.load(key), tensor):
                program.store.put(key, tensor)
                new = True
        for node in members:
            new |= node.meta.get(STATISTICS) != keys
            node.meta[STATISTICS] = dict(keys)
        return new

    def ensures(self, program: Program) -> None:
        """Every unpacked site has statistics."""
        for node in float_sites(program):
            if STATISTICS not in node.meta:
                raise VerificationError(f"Site {node.meta[SITE]} was not measured.")

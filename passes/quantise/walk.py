"""The walk through a model that quantises behind what is already quantised.

Sites are visited in the order in which activations reach them: in a usual block q, k and v, then o, then gate and up,
then down. At each tied group the float activation X and the quantised one X̂ are both at hand; the group is corrected
and rounded on them, and X̂ goes on through the rounded matrices. After each block what is finished can be kept on disk.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.graph import blocks, matrix_shape
from hikui.passes.measure.evidence import OwnEvidence, Sums, token_weights
from hikui.passes.measure.footprint import estimate
from hikui.passes.measure.resumable_traversal import ResumableTraversal
from hikui.passes.patterns.sums import Term, added_to
from hikui.passes.quantise.correction import correct, settings


class Replacement(Protocol):
    """Puts something smaller in the place of float matrices."""

    @property
    def name(self) -> str:
        """Of the pass, for messages."""

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The sites that it takes, in graph order."""

    @property
    def wants(self) -> Set[str]:
        """Which statistics it needs of what a site reads."""

    @property
    def reads_float(self) -> bool:
        """Whether those are to be of the float model's activations."""

    def spare(self, tied: Sequence[fx.Node]) -> int:
        """How many K×K float64 matrices it holds for tied sites beside what is measured."""

    def put(
        self,
        tied: Sequence[fx.Node],
        evidence: OwnEvidence | None = None,
        weights: Mapping[str, Tensor] | None = None,
        resume: Resume | None = None,
    ) -> list[str]:
        """Replaces tied sites; returns notes on them.

        Args:
            tied: the sites.
            evidence: of what they read, which may be used up; None where all of them are in `resume`.
            weights: by site, float32 [n, k] to start from instead of the stored matrix.
            resume: where finished sites are kept.
        """


class Walk(ResumableTraversal):
    """One pass of a quantiser through a model.

    Args:
        replacement: of the sites.
        program: the program before the pass, for the float activations.
        work: its clone, which is changed.
        context: has the calibration text.
        workers: threads.

    Raises:
        HikuiError: there is no calibration text, or what must be in memory at once does not fit.
    """

    def __init__(
        self, replacement: Replacement, program: Program, work: Program, context: PassContext, workers: Workers
    ) -> None:
        super().__init__(replacement.name, program, work, context, workers)
        self._replacement = replacement
        self._blocks = blocks(list(replacement.nodes))
        self._total = sum(map(len, self._blocks))
        self._done = 0
        corrected = any(CORRECTION in node.meta for node in replacement.nodes)
        residual = any(CORRECTION in node.meta and settings(node).residual for node in replacement.nodes)
        self._reads_float = replacement.reads_float
        self._needs_float = corrected or self._reads_float
        self._counterparts = {node.name: node for node in program.graph.nodes}
        footprint = estimate(
            work,
            self._blocks,
            self._texts,
            streams=1 + corrected,
            matrices=("gram" in replacement.wants or corrected) + corrected + residual,
            spare=max((replacement.spare(group) for block in self._blocks for group in block), default=0),
            corrected=corrected,
            workers=workers.count,
        )
        self._expect(footprint)

    def run(self) -> list[str]:
        """Quantises every group; returns the notes."""
        notes: list[str] = []
        count = len(self._blocks)
        finished = self._finished(count)
        with ExitStack() as stack:
            float_stream = stack.enter_context(self._stream(self._program)) if self._needs_float else None
            stream = None if self._reads_float else stack.enter_context(self._stream(self._work))
            both = {"float": float_stream, "quantised": stream}
            streams = {name: each for name, each in both.items() if each is not None}
            for index in range(finished):
                kept = self._context.resume.scope(f"block-{index}")
                for group in self._blocks[index]:
                    notes += self._replacement.put(group, resume=kept)
                    self._step()
            if 0 < finished < count:
                self._go_on(finished - 1, streams)
            for index in range(finished, count):
                kept = self._context.resume.scope(f"block-{index}")
                for group in self._blocks[index]:
                    notes += self._quantise(group, float_stream, stream, kept)
                    self._step()
                self._keep(index, count, streams)
        return notes

    def _step(self) -> None:
        self._done += 1
        self._context.progress(self._replacement.name, self._done, self._total)

    def _quantise(
        self, group: list[fx.Node], float_stream: Stream | None, stream: Stream | None, kept: Resume
    ) -> list[str]:
        """Brings both streams to a group, and corrects and rounds it there."""
        first = group[0]
        corrected = [node for node in group if CORRECTION in node.meta]
        counterpart = self._counterparts[first.name]
        source = counterpart.args[0]
        assert isinstance(source, fx.Node), "a site reads an activation"
        sums: list[Sums] = []
        beside: dict[fx.Node, list[tuple[Term, Term]]] = {}

        def observe(number: int, args: tuple[object, ...], _: object) -> None:
            x = args[0]
            assert isinstance(x, Tensor)
            if not sums:
                wanted, cross = self._replacement.wants, bool(corrected)
                weights = token_weights(self._work, first, self._texts) if "gram" in wanted or cross else None
                if corrected and float_stream is not None and stream is not None:
                    beside.update(self._beside(corrected, float_stream, stream))
                columns = sum(matrix_shape(node)[0] for node in beside)
                sums.append(Sums(x.shape[-1], wanted, self._workers, weights, cross=cross, beside=columns))
            reference = float_stream.value(number, source) if corrected and float_stream is not None else None
            off = None
            if beside:
                assert float_stream is not None and stream is not None, "there is something to be compared"
                off = torch.cat([_off(terms, number, float_stream, stream) for terms in beside.values()], -1)
            sums[0].add(x, reference, off)

        if float_stream is not None:
            float_stream.advance(counterpart, {counterpart: observe} if stream is None else None)
        if stream is not None:
            stream.advance(first, {first: observe})
        (measured,) = sums
        if not measured.finite:
            raise HikuiError(
                f"Site {first.meta[SITE]} reads NaN or infinite activations on the calibration text, so nothing "
                "can be measured there; `hikui eval` of the float model shows whether its numbers are finite."
            )
        evidence = measured.evidence()
        weights: dict[str, Tensor] = {}
        if corrected:
            assert evidence.gram is not None, "it was measured with the cross term"
            parts = measured.beside().split([matrix_shape(node)[0] for node in beside]) if beside else ()
            owed = {node.meta[SITE]: part for node, part in zip(beside, parts, strict=True)}
            weights = correct(self._work, corrected, evidence.gram, measured.cross(), self._workers, owed)
        return self._replacement.put(group, evidence, weights, kept)

    def _beside(
        self, corrected: list[fx.Node], float_stream: Stream, stream: Stream
    ) -> dict[fx.Node, list[tuple[Term, Term]]]:
        """What sites are added to that is known by now, in the float model and in the quantised one."""
        found = {}
        for node in corrected:
            if settings(node).residual:
                pairs = zip(added_to(self._counterparts[node.name]), added_to(node), strict=True)
                known = [(a, b) for a, b in pairs if float_stream.has(a.node) and stream.has(b.node)]
                if known:
                    found[node] = known
        return found


def _off(terms: list[tuple[Term, Term]], number: int, float_stream: Stream, stream: Stream) -> Tensor:
    """What a site's output would have to be more by for the sums to be the float model's: float32 [tokens, n]."""
    total: Tensor | None = None
    for exact, quantised in terms:
        off = (float_stream.value(number, exact.node) - stream.value(number, quantised.node)) / exact.factor
        off = off.reshape(-1, off.shape[-1])
        total = off if total is None else total + off
    assert total is not None, "a site is there for what it is added to"
    return total

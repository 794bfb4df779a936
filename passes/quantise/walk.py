"""The walk through a model that quantises behind what is already quantised.

Sites are visited in the order in which activations reach them: in a usual block q, k and v, then o, then gate and up,
then down. At each tied group the float activation X and the quantised one X̂ are both at hand; the group is corrected
and rounded on them, and X̂ goes on through the rounded matrices. After each block what is finished can be kept on disk.
"""

from contextlib import ExitStack
from typing import Generic

from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.graph import blocks
from hikui.passes.measure.evidence import Sums, token_weights
from hikui.passes.measure.footprint import estimate
from hikui.passes.measure.resumable_traversal import ResumableTraversal
from hikui.passes.quantise.correction import correct
from hikui.passes.quantise.packer import Packer, preparations
from hikui.passes.quantise.rounder import Prepared, Rounder


class Walk(ResumableTraversal, Generic[Prepared]):
    """One pass of a quantiser through a model.

    Args:
        rounder: rounds.
        program: the program before the pass, for the float activations.
        work: its clone, which is changed.
        context: has the calibration text.
        workers: threads.

    Raises:
        HikuiError: there is no calibration text, or what must be in memory at once does not fit.
    """

    def __init__(
        self, rounder: Rounder[Prepared], program: Program, work: Program, context: PassContext, workers: Workers
    ) -> None:
        super().__init__(rounder.name, program, work, context, workers)
        self._rounder = rounder
        chosen = rounder.chosen(work)
        self._packer = Packer(rounder, work, chosen, workers)
        self._blocks = blocks(chosen)
        self._total = sum(map(len, self._blocks))
        self._done = 0
        corrected = any(CORRECTION in node.meta for node in chosen)
        self._reads_float = rounder.reads_float
        self._needs_float = corrected or rounder.reads_float
        self._counterparts = {node.name: node for node in program.graph.nodes}
        held = max((preparations(rounder, group) for block in self._blocks for group in block), default=0)
        footprint = estimate(
            work,
            self._blocks,
            self._texts,
            streams=1 + (corrected and not rounder.reads_float),
            matrices=("gram" in rounder.wants() or corrected) + corrected,
            spare=rounder.spare_matrices + held,
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
                    for node in group:
                        notes += self._packer.pack(node, None, resume=kept)
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
        self._context.progress(self._rounder.name, self._done, self._total)

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

        def observe(number: int, args: tuple[object, ...], _: object) -> None:
            x = args[0]
            assert isinstance(x, Tensor)
            if not sums:
                wanted, cross = self._rounder.wants(), bool(corrected)
                weights = token_weights(self._work, first, self._texts) if "gram" in wanted or cross else None
                sums.append(Sums(x.shape[-1], wanted, self._workers, weights, cross=cross))
            reference = float_stream.value(number, source) if corrected and float_stream is not None else None
            sums[0].add(x, reference)

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
            weights = correct(self._work, corrected, evidence.gram, measured.cross(), self._workers)
        notes: list[str] = []
        for node in group:
            site = node.meta[SITE]
            notes += self._packer.pack(node, evidence, resume=kept, weight=weights.pop(site, None))
        return notes

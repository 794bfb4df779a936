"""Learned clipping: scales for which the output of each block is nearest to that of the float model.

After OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137), section 3.2, learnable weight clipping, in the block-wise
minimisation of section 3.1. Its learnable equivalent transformation is not part of this pass: `smooth`, `awq` and
`rotate` have theirs.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format, Packed, pack
from hikui.lowering.ir.program import CORRECTION, SITE, WEIGHT, Program
from hikui.lowering.pipeline.contract import PassContext, PassResult
from hikui.passes.gradients.block_training import BlockSpan, require_gradients, spans
from hikui.passes.graph import blocks, matrix_shape, weight_of
from hikui.passes.matrices import load_finite
from hikui.passes.measure.footprint import Footprint, estimate, value_nbytes
from hikui.passes.measure.resumable_traversal import ResumableTraversal
from hikui.passes.quantise.columns import Orders
from hikui.passes.quantise.learned.block_learning import BlockLearning, Schedule
from hikui.passes.quantise.learned.learned_scales import LearnedScales
from hikui.passes.quantise.packer import Packer
from hikui.passes.quantise.packing import replace_with_packed
from hikui.passes.quantise.quantiser import DataFreeQuantiser
from hikui.passes.quantise.rounding import Rounded, round_matrix

_BYTES_A_WEIGHT = 28
"""Of a matrix while it is learned on: itself, ŵ and the slope in float32, and what rounding it anew makes."""


@dataclass(frozen=True)
class LearnedClip(DataFreeQuantiser):
    """Learns the scale of every row and group, block by block, for the least error of the block's output.

    A block's output behind the quantised blocks before it, with its matrices rounded, is compared with what it is in
    the float model; AdamW descends on the clipping strengths, and the best scales that were met are kept, those of the
    least weight error among them. Sites outside of the blocks are rounded for the least weight error.

    Attributes:
        epochs: how often all texts are gone through for a block.
        lr: AdamW's step size at first; it falls to zero linearly.
        batch: texts for each step.
        seed: of the order of the texts.
    """

    name: ClassVar[str] = "learned_clip"
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    epochs: int = 10
    lr: float = 0.05
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("epochs", self.epochs), ("batch", self.batch)):
            if value < 1:
                raise UsageError(f"learned_clip cannot take {option}={value}; give 1 or more.")
        if not self.lr > 0:
            raise UsageError(f"learned_clip cannot learn at a rate of {self.lr:g}; lr is above 0.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError also where a site is to be corrected, or gradients cannot pass a block."""
        super().requires(program)
        for node in self.chosen(program):
            if CORRECTION in node.meta:
                raise HikuiError(
                    f"Site {node.meta[SITE]} is marked by `qep`, and learned_clip learns on the float matrices; its "
                    "target is the float model's output already, so leave the site out of `qep` with skip."
                )
        require_gradients(self.spans(program), self.name)

    def spans(self, program: Program) -> list[BlockSpan]:
        """The blocks whose scales it learns."""
        return spans(program, [node for node in self.chosen(program) if self.format_of(node).is_integer])

    def quantise(self, weight: Tensor, fmt: Format, prepared: None) -> Rounded:
        """Rounds rows of a site outside of the blocks; see `Rounder.quantise`."""
        return round_matrix(weight, fmt)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Learns one block after the other; one block's float matrices are in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit the format; or there is no
                calibration text, or not enough memory.
        """
        work = program.clone()
        if not self.chosen(work):
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            notes = _Learning(self, program, work, context, workers).run()
        work.recompile()
        return PassResult(work, True, notes)


class _Learning(ResumableTraversal):
    """One pass through the model; `program` gives the targets, `work` is changed."""

    def __init__(
        self, options: LearnedClip, program: Program, work: Program, context: PassContext, workers: Workers
    ) -> None:
        super().__init__(options.name, program, work, context, workers)
        self._options = options
        self._float_spans = options.spans(program)
        self._expect(_footprint(options, program, self._float_spans, self._texts, workers.count))

    def run(self) -> list[str]:
        """Rounds what is not learned, then learns the blocks; returns the notes."""
        notes = self._round_others()
        resume, learned = self._context.resume, self._options.spans(self._work)
        orders = Orders(self._work, [(node, self._options.format_of(node)) for span in learned for node in span.sites])
        options, finished = self._options, self._finished(len(learned))
        schedule = Schedule(options.epochs, options.lr, options.batch, options.seed)
        with ExitStack() as stack:
            float_stream = stack.enter_context(self._stream(self._program))
            stream = stack.enter_context(self._stream(self._work))
            streams = {"float": float_stream, "quantised": stream}
            for index, (original, span) in enumerate(zip(self._float_spans, learned, strict=True)):
                self._progress(index, 0)
                kept = resume.scope(f"block-{index}")
                if index < finished:
                    errors = resume.need(f"finished-{index}")["errors"]
                    notes += self._pack(span, None, self._gathers(span, orders), kept)
                    notes.append(_summary(span, errors))
                    if index + 1 == finished < len(learned):
                        self._go_on(index, streams)
                    continue
                float_stream.advance(original.after)
                stream.advance(span.nodes[0])
                gathers = self._gathers(span, orders)
                scales = [self._start(node, order) for node, (_, order) in zip(span.sites, gathers, strict=True)]
                learning = BlockLearning(
                    self._work, span, scales, stream, original, float_stream, self._texts, self._workers
                )
                best, errors = learning.learn(schedule, index, partial(self._progress, index))
                rounded = [each.rounded(scale) for each, scale in zip(scales, best, strict=True)]
                notes += self._pack(span, rounded, gathers, kept)
                notes.append(_summary(span, errors))
                if index + 1 < len(learned):
                    stream.advance(span.after)
                self._keep(index, len(learned), streams, {"errors": errors})
        self._progress(len(learned), 0)
        return notes

    def _progress(self, block: int, epochs: int) -> None:
        each = self._options.epochs
        self._context.progress(self._options.name, block * each + epochs, len(self._float_spans) * each)

    def _round_others(self) -> list[str]:
        """Packs the sites that have a float format, or that no block holds."""
        learned = {node.meta[SITE] for span in self._float_spans for node in span.sites}
        others = [node for node in self._options.chosen(self._work) if node.meta[SITE] not in learned]
        packer = Packer(self._options, self._work, others, self._workers)
        notes = []
        for node in others:
            if self._options.format_of(node).is_integer:
                notes.append(f"{node.meta[SITE]}: outside of the blocks, rounded for the least error of the weights")
            notes += packer.pack(node, None, resume=self._context.resume.scope("others"))
        return notes

    def _gathers(self, span: BlockSpan, orders: Orders) -> list[tuple[fx.Node, Tensor] | tuple[None, None]]:
        """What each site of a mixed format will read, and the order of its columns."""
        formats = [(node, self._options.format_of(node)) for node in span.sites]
        return [orders.gather(node, fmt) if fmt.is_mixed else (None, None) for node, fmt in formats]

    def _start(self, node: fx.Node, order: Tensor | None) -> LearnedScales:
        site = node.meta[SITE]
        weight = load_finite(self._work, weight_of(node), site)
        try:
            return LearnedScales(weight, self._options.format_of(node), order)
        except OverflowError as error:
            raise HikuiError(f"Site {site}: {error}; leave it out with skip, or choose a float format.") from error

    def _pack(
        self,
        span: BlockSpan,
        rounded: list[Rounded] | None,
        gathers: Sequence[tuple[fx.Node, Tensor] | tuple[None, None]],
        kept: Resume,
    ) -> list[str]:
        """Puts a block's packed matrices in their places: what was learned, or else what an earlier run has kept."""
        notes = []
        for index, (node, (x, _)) in enumerate(zip(span.sites, gathers, strict=True)):
            site, fmt = node.meta[SITE], self._options.format_of(node)
            if rounded is None:
                found = kept.need(site)
                packed = Packed(found["weight"], found["scale"])
            else:
                packed = pack(fmt, *rounded[index])
                assert packed.scale is not None, "the format is of integers"
                kept.save(site, {"weight": packed.weight, "scale": packed.scale})
            notes += [f"{site}: {note}" for note in fmt.notes(*matrix_shape(node))]
            replace_with_packed(self._work, node, fmt, packed, x)
        return notes


def _summary(span: BlockSpan, errors: Tensor) -> str:
    first, last = errors.tolist()
    return f"{span.name}: mean square error of the output {last:.4g}, {first:.4g} with the scales of least weight error"


def _footprint(
    options: LearnedClip, program: Program, learned: list[BlockSpan], texts: Sequence[Tensor], workers: int
) -> Footprint:
    """What it needs at once: a block's matrices, the gradients and values of a text for each worker, both streams."""
    chosen = options.chosen(program)
    base = estimate(program, blocks(chosen), texts, streams=2, matrices=0, spare=0, corrected=False, workers=workers)
    widest = max(text.shape[1] for text in texts)
    peak, site = base.memory, base.site
    for span in learned:
        sizes = [n * k for n, k in map(matrix_shape, span.sites)]
        other = {
            operand
            for node in span.nodes
            for operand in node.all_input_nodes
            if WEIGHT in operand.meta and node not in span.sites
        }
        values = 2 * sum(value_nbytes(node, widest) for node in span.nodes)
        held = (_BYTES_A_WEIGHT + 4 * workers) * sum(sizes) + sum(value_nbytes(node, 1) for node in other)
        if held + workers * values + base.activations > peak:
            peak, site = held + workers * values + base.activations, span.sites[0].meta[SITE]
    return Footprint(peak, base.disk, site, 0, base.activations)

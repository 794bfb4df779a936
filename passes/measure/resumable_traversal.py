"""A way through a model with real text, block by block, that a killed run takes up where it was."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.measure.footprint import Footprint, refuse_what_cannot_fit

_DONE: Mapping[str, Tensor] = {"done": torch.tensor(1)}


class ResumableTraversal:
    """What passes share that follow the float and the quantised activations side by side.

    Args:
        name: the pass's, for messages.
        program: the program before the pass, for the float activations.
        work: its clone, which is changed.
        context: has the calibration text.
        workers: threads.

    Raises:
        HikuiError: there is no calibration text.
    """

    def __init__(self, name: str, program: Program, work: Program, context: PassContext, workers: Workers) -> None:
        if context.calibration is None:
            raise HikuiError(
                "It follows real text through the model and none was given; give some with --calibration TEXT_FILE."
            )
        self._name = name
        self._program = program
        self._work = work
        self._context = context
        self._workers = workers
        self._texts = context.calibration.chunks

    def _expect(self, footprint: Footprint) -> None:
        """Says what will be needed at once, and refuses what memory or disk cannot hold."""
        self._context.announce(f"{self._name} needs {footprint}")
        refuse_what_cannot_fit(footprint, self._context)

    def _stream(self, program: Program) -> Stream:
        return Stream(
            program, self._texts, self._workers, scratch=self._context.scratch, as_float=program is self._program
        )

    def _finished(self, count: int) -> int:
        """How many leading blocks of `count` an earlier run has finished."""
        resume = self._context.resume
        if not resume:
            return 0
        return next((index for index in range(count) if resume.load(f"finished-{index}") is None), count)

    def _keep(self, index: int, count: int, streams: Mapping[str, Stream], found: Mapping[str, Tensor] = _DONE) -> None:
        """Says that a block is finished, once its matrices and the activations at its end are on disk.

        Args:
            index: of the block.
            count: of all blocks; nothing goes on behind the last.
            streams: by name.
            found: what is to be known of the block later.
        """
        resume = self._context.resume
        if not resume:
            return
        if index + 1 < count:
            for name, each in streams.items():
                each.save(resume.scope(f"streams-{index}").scope(name))
        resume.save(f"finished-{index}", dict(found))
        if index:
            resume.scope(f"streams-{index - 1}").drop()

    def _go_on(self, index: int, streams: Mapping[str, Stream]) -> None:
        """Puts the streams behind a block that an earlier run has finished."""
        for name, each in streams.items():
            each.restore(self._context.resume.scope(f"streams-{index}").scope(name))

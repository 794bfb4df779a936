"""Learning the scales of one block of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, Program
from hikui.passes.gradients.block_training import BlockSpan, TrainingBlock, multiply_by
from hikui.passes.quantise.learned.learned_scales import LearnedScales

_EPSILON = 1e-12
"""AdamW's, far below the gradients: those of a large block's single scales are small."""

_BLOCKS = 1 << 20
"""More blocks than any model has, so that each block of each seed has an order of its own."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        epochs: how often all texts are gone through.
        lr: AdamW's step size at first; it falls to zero linearly.
        batch: texts for each step.
        seed: of the order of the texts.
    """

    epochs: int
    lr: float
    batch: int
    seed: int


class BlockLearning:
    """Learning the scales of one block.

    Args:
        program: holds the block's weights.
        span: the block.
        scales: of its sites; changed.
        stream: of the quantised model, at the block's first node.
        original: the block in the float model.
        float_stream: behind that block.
        texts: int64 [1, T] each.
        workers: share the texts of a step; each text's gradient is summed in the order of the texts.
    """

    def __init__(
        self,
        program: Program,
        span: BlockSpan,
        scales: list[LearnedScales],
        stream: Stream,
        original: BlockSpan,
        float_stream: Stream,
        texts: Sequence[Tensor],
        workers: Workers,
    ) -> None:
        self._block = TrainingBlock(program, span, {text.shape[1] for text in texts})
        self._span = span
        self._scales = scales
        self._stream = stream
        self._targets = original.outputs
        self._float_stream = float_stream
        self._texts = texts
        self._workers = workers
        numbers = range(len(texts))
        self._elements = sum(float_stream.value(number, node).numel() for number in numbers for node in self._targets)

    def learn(self, schedule: Schedule, block: int, progress: Callable[[int], None]) -> tuple[list[Tensor], Tensor]:
        """Descends.

        Args:
            schedule: how.
            block: its number, which the order of the texts depends on.
            progress: called with the number of epochs that are done.

        Returns:
            The best scales, float32 [n, groups] for each site; and the mean square error of the output, float64 [2],
            with the scales of least weight error and with these.

        Raises:
            HikuiError: the error or a gradient is not finite.
        """
        count = len(self._texts)
        best = [each.nearest for each in self._scales]
        first = least = self.error(best)
        if not isfinite(first):
            raise HikuiError(
                f"{self._span.name.capitalize()} gives NaN or infinite values on the calibration text, so "
                "nothing can be learned there; `hikui eval` of the float model shows whether it does so too."
            )
        optimiser = AdamW(
            [each.theta for each in self._scales], lr=schedule.lr, weight_decay=0.0, eps=_EPSILON, foreach=False
        )
        slope = LinearLR(optimiser, 1.0, 0.0, total_iters=schedule.epochs * -(-count // schedule.batch))
        generator = torch.Generator().manual_seed((schedule.seed * _BLOCKS + block) % (1 << 63))
        now = [each.scale() for each in self._scales]
        if (error := self.error(now)) < least:
            best, least = now, error
        for epoch in range(schedule.epochs):
            order = torch.randperm(count, generator=generator).tolist()
            for at in range(0, count, schedule.batch):
                self._descend(order[at : at + schedule.batch])
                optimiser.step()
                slope.step()
            now = [each.scale() for each in self._scales]
            if (error := self.error(now)) < least:
                best, least = now, error
            progress(epoch + 1)
        return best, torch.tensor([first, least], dtype=torch.float64)

    def error(self, scales: Sequence[Tensor]) -> float:
        """The mean square error of the block's output over all texts, with some scales: float32 [n, groups] each."""
        made = [matrix for matrix, _ in self._workers.map(_matrix, zip(self._scales, scales, strict=True))]

        def one(number: int) -> float:
            return float(self._squares(number, made))

        return sum(self._workers.map(one, range(len(self._texts)))) / self._elements

    def _squares(self, number: int, matrices: Sequence[Tensor]) -> Tensor:
        """The sum of squared errors of one text's output."""
        inputs = {node: self._stream.value(number, node) for node in self._block.inputs}
        by_site = dict(zip(self._span.sites, map(multiply_by, matrices), strict=True))
        total = torch.zeros((), dtype=torch.float64)
        made = self._block.run(inputs, self._texts[number].shape[1], by_site)
        for output, node in zip(made, self._targets, strict=True):
            total = total + (output - self._float_stream.value(number, node)).double().square().sum()
        return total

    def _descend(self, numbers: list[int]) -> None:
        """Sets the gradients for some texts."""
        now = [each.scale() for each in self._scales]
        made = list(self._workers.map(_matrix, zip(self._scales, now, strict=True)))

        def one(number: int) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [matrix.detach().requires_grad_() for matrix, _ in made]
                found = torch.autograd.grad(self._squares(number, leaves), leaves)
            return [
                each.gradient(gradient, slope)
                for each, gradient, (_, slope) in zip(self._scales, found, made, strict=True)
            ]

        total = [torch.zeros_like(each.theta) for each in self._scales]
        for gradients in self._workers.map(one, numbers):
            for held, gradient in zip(total, gradients, strict=True):
                held += gradient
        for node, each, gradient in zip(self._span.sites, self._scales, total, strict=True):
            if not bool(gradient.isfinite().all()):
                raise HikuiError(
                    f"Site {node.meta[SITE]} has gradients that are NaN or infinite on the calibration text; leave it "
                    "out with skip, and round it with another quantiser."
                )
            each.descend(gradient)


def _matrix(pair: tuple[LearnedScales, Tensor]) -> tuple[Tensor, Tensor]:
    scales, scale = pair
    return scales.matrix(scale)

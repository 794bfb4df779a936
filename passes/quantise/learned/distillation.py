"""What passes share that learn a quantised model's own numbers by its divergence from the float model.

The loss is KL(float‖quantised) of the next token, summed over the tokens of a text, after NanoQuant (arXiv 2602.06694);
what is learned, and from which gradients, a `Student` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, isfinite, pi
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.optim import Adam

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.gradients.chain import Learned, Sections, Slopes
from hikui.passes.gradients.coded_matrix import CodedMatrix
from hikui.passes.measure.footprint import Footprint, refuse_what_cannot_fit, room_for, value_nbytes
from hikui.passes.quantise.learned.end_to_end import EndToEnd

_HELD_OUT = 8
"""One text in so many is not learned on but judged by."""

_EPOCHS = 1 << 20
"""More epochs than any run has, so that each epoch of each seed has an order of its own."""

_WARM = 8
"""Steps at most in which the step size rises to its full height."""

_WAY_OUT = "use a smaller batch, fewer or shorter windows, or leave sites out with skip"

_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Course:
    """How a student learns.

    Attributes:
        name: of the pass.
        epochs: how often all texts are gone through.
        batch: texts for each step.
        seed: of the order of the texts.
        every: steps after which the student is judged and what was learned is kept for a later run.
        judges: the most texts that are held out.
        epsilon: of Adam, beside the size of a gradient.
        shares: parts of the whole way that are judged at the end, and of all that was judged the best is kept; where
            empty, the end is kept, if it is better than the beginning.
    """

    name: str
    epochs: int
    batch: int
    seed: int
    every: int
    judges: int
    epsilon: float
    shares: tuple[float, ...]


class Part(NamedTuple):
    """Values whose gradients are made together, so that a worker moves them while they are in its cache.

    Attributes:
        node: the site or vector that they are of.
        places: where they are among all values.
        gradients: makes the gradient for each, using up what it makes them of.
    """

    node: fx.Node
    places: tuple[int, ...]
    gradients: Callable[[], Sequence[Tensor]]


class Student(ABC):
    """What is learned: something of the sites, and factors, all 1 at first, for weights of one dimension.

    Args:
        program: with packed sites.
        whole: the model.
        vectors: whether weights of one dimension are learned.

    Attributes:
        values: float32, what the optimiser moves: first what a subclass puts there, then the factors.
        rates: Adam's step at its height for each of them.
        whole: as given.
        vectors: the placeholders of the weights of one dimension that are learned.
    """

    def __init__(self, program: Program, whole: EndToEnd, *, vectors: bool) -> None:
        self.whole = whole
        self.vectors = whole.vectors if vectors else []
        self._stored = {vector: program.store.load(program.weight_of(vector)) for vector in whole.vectors}
        self.values: list[Tensor] = []
        self.rates: list[float] = []

    def learn(self, values: Sequence[Tensor], rate: float) -> None:
        """Adds to what is learned; contiguous, as a later run reads what is kept of them."""
        assert all(value.is_contiguous() for value in values), "Adam's fused kernel reads them as they lie in memory"
        self.values += values
        self.rates += [rate] * len(values)

    def learn_vectors(self, rate: float) -> None:
        """Adds the factors of vectors, which come last."""
        self.learn([torch.ones(self._stored[vector].shape) for vector in self.vectors], rate)

    def learned(self, values: Sequence[Tensor], workers: Workers) -> Learned:
        """What sites and vectors are for some values."""
        factors = dict(zip(self.vectors, values[len(values) - len(self.vectors) :], strict=True))
        vectors = {vector: stored * factors.get(vector, 1.0) for vector, stored in self._stored.items()}
        return Learned(self.sites(values, workers), vectors)

    def parts(self, now: Learned, found: Slopes) -> list[Part]:
        """All values, with their gradients from those for `now`, what `learned` gave; these are used up."""
        first = len(self.values) - len(self.vectors)
        return self.of_sites(now, found) + [
            Part(vector, (place,), partial(self._of_vector, vector, found))
            for place, vector in enumerate(self.vectors, first)
        ]

    def _of_vector(self, vector: fx.Node, found: Slopes) -> list[Tensor]:
        return [found.vectors[vector] * self._stored[vector]]

    @abstractmethod
    def sites(self, values: Sequence[Tensor], workers: Workers) -> Mapping[fx.Node, Tensor | CodedMatrix]:
        """What sites are for some values."""

    @abstractmethod
    def of_sites(self, now: Learned, found: Slopes) -> list[Part]:
        """All values but the factors of vectors."""

    def confine(self, place: int) -> None:  # noqa: B027  (most values may be anything)
        """Brings a value back to where it may be, after a step."""


class Distillation:
    """One run; the program is only read.

    Args:
        course: how.
        student: what.
        program: with packed sites.
        parts: of the program.
        context: has the calibration text, of two windows or more.
        workers: threads.
    """

    def __init__(
        self,
        course: Course,
        student: Student,
        program: Program,
        parts: Sections,
        context: PassContext,
        workers: Workers,
    ) -> None:
        assert context.to_learn_from is not None, "it was looked at before"
        self._course, self._student, self._context, self._workers = course, student, context, workers
        self._program, self._texts = program, list(context.to_learn_from.chunks)
        count = len(self._texts)
        apart = max(_HELD_OUT, -(-count // course.judges))
        self._judging = range(0, count, apart)
        learning = [number for number in range(count) if number % apart]
        # Workers that share a batch are done at the same time where its texts are of one length.
        usual = self._texts[0].shape[1]
        parts_of = ([n for n in learning if (self._texts[n].shape[1] > usual) is longer] for longer in (False, True))
        self._by_length = [part for part in parts_of if part]
        self._steps = sum(-(-len(part) // course.batch) for part in self._by_length)
        self._inputs, self._targets = self._starts(parts)

    def _starts(self, parts: Sections) -> tuple[list[dict[fx.Node, Tensor]], list[dict[fx.Node, Tensor]]]:
        """For each text what is read of what is before the blocks, and what the head reads in the float model."""
        found, whole = [], self._student.whole
        for span, read, as_float in (
            (parts.blocks[0], whole.inputs, False),
            (parts.head, whole.head_inputs, True),
        ):
            stream = Stream(self._program, self._texts, self._workers, scratch=self._context.scratch, as_float=as_float)
            with stream:
                # Block by block, so that no more than one is in memory as floats.
                for stop in (*(each.nodes[0] for each in parts.blocks[1:] if span is parts.head), span.nodes[0]):
                    stream.advance(stop)
                found.append(
                    [{node: stream.value(number, node) for node in read} for number in range(len(self._texts))]
                )
        return found[0], found[1]

    def run(self) -> tuple[Learned | None, str]:
        """Learns; gives what is kept, None where nothing was better than what there was, and a note.

        Raises:
            HikuiError: the model, or a gradient, is not finite.
        """
        course, student = self._course, self._student
        values = student.values
        begin = [value.clone() for value in values] if course.shares else []
        optimisers = [
            Adam([value], lr=rate, betas=_BETAS, eps=course.epsilon, fused=True)
            for value, rate in zip(values, student.rates, strict=True)
        ]
        steps = course.epochs * self._steps
        done, best, first, least = self._start(optimisers, begin)
        for step in range(done, steps):
            self._context.progress(course.name, step, steps)
            self._descend(optimisers, self._batch(step), _height(step, steps))
            finished = step + 1
            if finished % course.every and finished != steps:
                continue
            give_back()
            if course.shares and (now := self._judge(values)) < least:
                least, best = now, [value.clone() for value in values]
            self._keep(finished, optimisers, best, (first, least))
        self._context.progress(course.name, steps, steps)
        share = 1.0
        if not course.shares:
            least, best = self._judge(values), values
        for part in course.shares:
            shorter = [torch.lerp(start, value, part) for start, value in zip(begin, values, strict=True)]
            if (now := self._judge(shorter)) < least:
                least, best, share = now, shorter, part
        held_out = f"{len(self._judging)} held-out texts"
        note = f"KL to the float model on {held_out}: {least:.4f} nats a token, {first:.4f} before"
        if share < 1:
            note += f"; {share:g} of the way that was gone"
        if not least < first:
            return None, f"{note}; nothing was learned that is better"
        learned = student.learned(best, self._workers)
        return Learned(learned.sites, {vector: learned.vectors[vector] for vector in student.vectors}), note

    def _start(self, optimisers: Sequence[Adam], begin: list[Tensor]) -> tuple[int, list[Tensor], float, float]:
        """Steps done before, the best values so far, and the divergence at first and with these."""
        values = self._student.values
        if (kept := self._context.resume.load("state")) is None:
            first = self._judge(values)
            if not isfinite(first):
                raise HikuiError(
                    "The quantised model gives NaN or infinite values on the calibration text, so nothing can be "
                    "learned; `hikui eval` of the float model shows whether it does so too."
                )
            return 0, begin, first, first
        for number, (value, optimiser) in enumerate(zip(values, optimisers, strict=True)):
            value.copy_(kept[f"value.{number}"])
            names = ("step", "exp_avg", "exp_avg_sq")
            optimiser.state[value] = {name: kept[f"{name}.{number}"] for name in names}
        first, least = kept["divergences"].tolist()
        return int(kept["done"]), [kept[f"best.{number}"] for number in range(len(begin))], first, least

    def _keep(
        self, finished: int, optimisers: Sequence[Adam], best: Sequence[Tensor], divergences: tuple[float, float]
    ) -> None:
        """Keeps all that a later run needs to go on from here."""
        if not self._context.resume:
            return
        state = {"done": torch.tensor(finished), "divergences": torch.tensor(divergences, dtype=torch.float64)}
        for number, (value, optimiser) in enumerate(zip(self._student.values, optimisers, strict=True)):
            state[f"value.{number}"] = value
            state |= {f"{name}.{number}": moment for name, moment in optimiser.state[value].items()}
        state |= {f"best.{number}": value for number, value in enumerate(best)}
        self._context.resume.save("state", state)

    def _batch(self, step: int) -> list[int]:
        """The texts of a step, in an order of each epoch's own."""
        epoch, at = divmod(step, self._steps)
        generator = torch.Generator().manual_seed((self._course.seed * _EPOCHS + epoch) % (1 << 63))
        batches = []
        for same in self._by_length:
            order = [same[index] for index in torch.randperm(len(same), generator=generator).tolist()]
            batches += [order[first : first + self._course.batch] for first in range(0, len(same), self._course.batch)]
        if len(self._by_length) > 1:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return batches[at]

    def _judge(self, values: Sequence[Tensor]) -> float:
        """The divergence a token on the held-out texts."""
        now = self._student.learned(values, self._workers)

        def one(number: int) -> float:
            return float(self._student.whole.divergence(self._inputs[number], self._targets[number], now))

        return sum(self._workers.map(one, self._judging)) / self._tokens(self._judging)

    def _descend(self, optimisers: Sequence[Adam], numbers: list[int], height: float) -> None:
        """One step down the divergence a token of some texts."""
        student = self._student
        now = student.learned(student.values, self._workers)

        def one(number: int) -> Slopes:
            return student.whole.gradients(self._inputs[number], self._targets[number], now)[1]

        total = Slopes({}, {})
        for found in self._workers.map(one, numbers):
            total.add(found)
        tokens = self._tokens(numbers)

        def move(part: Part) -> None:
            for place, gradient in zip(part.places, part.gradients(), strict=True):
                if not bool(gradient.sum().isfinite()):
                    raise HikuiError(
                        f"The gradients of {part.node.meta.get(SITE, part.node.name)} are NaN or infinite on the "
                        "calibration text; `hikui eval` of the float model shows whether its numbers are finite."
                    )
                optimiser, value = optimisers[place], student.values[place]
                value.grad = gradient.div_(tokens).contiguous()
                for group in optimiser.param_groups:
                    group["lr"] = student.rates[place] * height
                optimiser.step()
                value.grad = None
                student.confine(place)

        self._workers.each(move, student.parts(now, total))

    def _tokens(self, numbers: Sequence[int]) -> int:
        return sum(self._texts[number].shape[1] for number in numbers)


def _height(step: int, steps: int) -> float:
    """Of the step size, over its full height."""
    return min(1.0, (step + 1) / min(_WARM, steps)) * (1 + cos(pi * step / steps)) / 2


def expect(parts: Sections, context: PassContext, hands: int, name: str, nbytes: int, block: int) -> bool:
    """Says what a distillation needs at once, and refuses what cannot fit.

    Args:
        parts: of the program.
        context: has the texts.
        hands: how many texts are in hand at once.
        name: of the pass.
        nbytes: of what is learned, and of what is made of it.
        block: bytes that a worker needs of the sites of a block.

    Returns:
        Whether what blocks compute on the way to the head may be kept for the way back: where that leaves a third of
        the memory free.

    Raises:
        HikuiError: there is not enough memory.
    """
    assert context.to_learn_from is not None, "it was looked at before"
    texts = context.to_learn_from.chunks
    # What the first block and the head read: one value a token each, as wide as what goes from block to block.
    kept = 2 * sum(value_nbytes(node, text.shape[1]) for text in texts for node in parts.blocks[-1].outputs)
    widest = max(text.shape[1] for text in texts)
    values = max(sum(value_nbytes(node, widest) for node in span.nodes) for span in parts.blocks)
    flowing = len(parts.blocks) * sum(value_nbytes(node, widest) for node in parts.blocks[-1].outputs)
    peak = nbytes + hands * (2 * values + block + flowing) + kept
    graphs = hands * (len(parts.blocks) - 1) * (2 * values + block)
    room = room_for(context)
    keeps = room is not None and 3 * (peak + graphs) <= 2 * room
    peak += graphs if keeps else 0
    site = parts.blocks[0].sites[0] if parts.blocks[0].sites else parts.blocks[0].nodes[0]
    footprint = Footprint(peak, 0, str(site.meta.get(SITE, site.name)), 0, kept)
    context.announce(f"{name} needs {footprint}")
    refuse_what_cannot_fit(footprint, context, _WAY_OUT)
    return keeps

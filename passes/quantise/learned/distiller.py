"""Base of the passes that learn a quantised model's own numbers from the float model's next tokens."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BLOCK, FLOAT_WEIGHT, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.gradients.block_training import is_vector, require_gradients
from hikui.passes.gradients.chain import Learned, Sections, sections, without_head
from hikui.passes.graph import drop_weights, selected
from hikui.passes.quantise.learned.distillation import Course, Distillation, Student, expect

_LINEAR = torch.ops.hikui.linear.default

LEARNED = (".distilled", ".trained")
"""The ends of the names that what is learned is stored under."""

_LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class Distiller(Pass):
    """Learns on the packed sites of all blocks at once, by the divergence from the float model.

    Attributes:
        epochs: how often all texts are gone through.
        lr: Adam's step at its height; it falls to zero along a cosine.
        batch: texts for each step.
        vectors: whether norms and biases are learned too.
        activation_bits: what a later `activation` will round to, so that what is learned makes up for that too; 0 for
            none.
        sites: regular expression of the sites to learn on; empty is all.
        skip: regular expression of the sites to leave as they are.
        seed: of the order of the texts.
    """

    calibrates: ClassVar[bool] = True
    learns: ClassVar[str]
    """What it learns, for messages."""

    epochs: int = 1
    lr: float = 0.001
    batch: int = 4
    vectors: bool = True
    activation_bits: int = 0
    sites: str = ""
    skip: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (("epochs", self.epochs), ("batch", self.batch)):
            if value < 1:
                raise UsageError(f"{self.name} cannot take {option}={value}; give 1 or more.")
        if not self.lr > 0:
            raise UsageError(f"{self.name} cannot learn at a rate of {self.lr:g}; lr is above 0.")
        if self.activation_bits not in (0, 4, 8):
            raise UsageError(f"{self.name} cannot take activation_bits={self.activation_bits}; give 0, 4 or 8.")

    @abstractmethod
    def course(self) -> Course:
        """How it learns."""

    @abstractmethod
    def student(self, program: Program, parts: Sections, lengths: set[int]) -> Student:
        """What it learns; `lengths` are those of the texts."""

    @abstractmethod
    def nbytes(self, parts: Sections, workers: int, tokens: int) -> tuple[int, int]:
        """Bytes of all that is learned and made of it, and of what each worker has of a block's matrices.

        Args:
            parts: of the program.
            workers: how many.
            tokens: of the longest text.
        """

    @abstractmethod
    def store(self, work: Program, student: Student, learned: Learned) -> None:
        """Puts what was learned in its place; `learned` names nodes of another clone."""

    def chosen(self, program: Program) -> list[fx.Node]:
        """The sites of blocks that it learns on, in graph order."""
        packed = [node for node in program.graph.nodes if node.target is _LINEAR and {SITE, BLOCK} <= node.meta.keys()]
        return [node for node in selected(packed, self.sites, self.skip) if PackedLinear.of(node).format.is_integer]

    def requires(self, program: Program) -> None:
        """Raises HikuiError where the float matrices are gone, or gradients cannot pass."""
        if not (chosen := self.chosen(program)):
            return
        for node in program.graph.nodes:
            if node.target is _LINEAR and PackedLinear.of(node).format.is_integer and FLOAT_WEIGHT not in node.meta:
                raise HikuiError(
                    f"Site {node.meta.get(SITE, node.name)} came packed, or what it was packed from is gone, so there "
                    f"is no float model to learn from; run {self.name} on a float checkpoint, before `dead_code`."
                )
        parts = sections(program, chosen)
        require_gradients((*parts.blocks, parts.head), self.name)
        for node in program.weight_nodes():
            key = program.weight_of(node)
            if is_vector(node) and node.users and key.endswith(LEARNED):
                raise HikuiError(
                    f"'{key}' has been learned by an earlier pass, so the float model is gone; run one of distil and "
                    "qat, once."
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Learns on all blocks at once.

        Nothing is learned, and a warning says so, from text of a single window, which is not enough to learn from some
        and be judged by others, and of a model that makes its logits inside of a block.

        Raises:
            HikuiError: there is no calibration text, or not enough memory.
        """
        if not (chosen := self.chosen(program)):
            return PassResult(program, False)
        if context.to_learn_from is None:
            raise HikuiError("It learns from text and none was given; give some with --calibration TEXT_FILE.")
        if len(context.to_learn_from.chunks) < 2:
            context.warn(
                f"The calibration text gives one window, and {self.name} learns from some and is judged by others, so "
                f"it has left {self.learns} as they were; give a longer text."
            )
            return PassResult(program, False)
        parts = sections(program, chosen)
        if (reason := without_head(parts, self.name)) is not None:
            context.warn(f"{reason}, so it has left {self.learns} as they were.")
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            hands = min(workers.count, self.batch)
            lengths = {text.shape[1] for text in context.to_learn_from.chunks}
            keeps = expect(parts, context, hands, self.name, *self.nbytes(parts, workers.count, max(lengths)))
            student = self.student(program, parts, lengths)
            student.whole.keep(keeps)
            best, note = Distillation(self.course(), student, program, parts, context, workers).run()
        if best is None:
            return PassResult(program, False, [note])
        work = program.clone()
        self.store(work, student, best)
        work.recompile()
        return PassResult(work, True, [note])


def as_stored(scale: Tensor) -> Tensor:
    """Scales as float16 will hold them: float32."""
    return scale.clamp(-_LARGEST, _LARGEST).to(torch.float16).float()


def put_in_place(work: Program, weight: fx.Node, tensor: Tensor, how: str, reader: fx.Node | None = None) -> None:
    """Stores a tensor in the place of a stored one, for all that read it or for one reader.

    It has a name of its own, because a later pass may look for what the old one stands for.
    """
    key = work.store.free_name(f"{work.weight_of(weight)}.{how}")
    new = work.add_weight(key, tensor)
    if reader is None:
        weight.replace_all_uses_with(new)
    else:
        reader.replace_input_with(weight, new)
    drop_weights(work, [weight])


def head_nbytes(parts: Sections) -> int:
    """Of the head's matrices, rounded and not, as floats."""
    return sum(8 * packed.rows * packed.columns for packed in map(PackedLinear.of, parts.head.sites))

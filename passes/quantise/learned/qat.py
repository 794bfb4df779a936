"""Training a quantised model with its rounding in the forward pass: codes, scales and norms by its own divergence.

The latent weights behind the codes get the gradients of the rounded ones (the straight-through estimator of Bengio et
al., 2013, arXiv 1308.3432), as in quantisation-aware training of language models (LLM-QAT, arXiv 2305.17888;
EfficientQAT, arXiv 2407.11062, whose first stage trains them block by block). The teacher is the float model itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Packed, pack
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.chain import Learned, Sections, Slopes
from hikui.passes.gradients.coded_matrix import CodedMatrix
from hikui.passes.quantise.learned.distillation import Course, Part, Student
from hikui.passes.quantise.learned.distiller import Distiller, as_stored, head_nbytes, put_in_place
from hikui.passes.quantise.learned.end_to_end import EndToEnd
from hikui.passes.quantise.learned.latent_matrix import LatentMatrix, is_coded

_EVERY = 64
"""Steps after which what has been learned is kept for a later run: twelve bytes a weight."""

_JUDGES = 16
"""Texts held out at most: they are judged at the beginning and at the end alone."""

_EPSILON = 1e-15
"""The gradient of one weight of millions is far below what Adam usually has here."""

_BYTES = 24
"""A weight: latent, two moments, gradient, matrix and code."""


@dataclass(frozen=True)
class Qat(Distiller):
    """Learns codes, scales and norms of a quantised model, end to end, by its divergence from the float one.

    Each code is the nearest to a latent weight, which begins where the float weight is, or half-way to the border of
    the code's cell where the float weight is beyond. Adam moves the latents by the gradients of the rounded weights,
    and scales and norms by their own. What comes out is taken if it is nearer to the float model, on held-out text,
    than what came in.

    Attributes:
        epochs: how often all texts are gone through.
        lr: Adam's step at its height for a latent, relative to the distance of two codes; it falls to zero along a
            cosine.
        scale_lr: the same for scales and norms, relative to each of them.
        batch: texts for each step.
        vectors: whether norms and biases are learned too.
        activation_bits: what a later `activation` will round to, so that the codes make up for that too; 0 for none.
        sites: regular expression of the sites to learn on; empty is all.
        skip: regular expression of the sites to leave as they are.
        seed: of the order of the texts.
    """

    name: ClassVar[str] = "qat"
    learns: ClassVar[str] = "codes, scales and norms"
    lr: float = 0.004
    scale_lr: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale_lr > 0:
            raise UsageError(f"qat cannot learn scales at a rate of {self.scale_lr:g}; scale_lr is above 0.")

    def course(self) -> Course:
        """Where it ends is what counts: its steps fall to nothing."""
        return Course(self.name, self.epochs, self.batch, self.seed, _EVERY, _JUDGES, _EPSILON, ())

    def student(self, program: Program, parts: Sections, lengths: set[int]) -> Student:
        """Latent weights, factors of scales and of vectors."""
        return _Latents(self, program, parts, lengths)

    def nbytes(self, parts: Sections, workers: int, tokens: int) -> tuple[int, int]:
        """Latents, their moments and gradients; the gradients of the texts in hand; the head."""
        total = head_nbytes(parts)
        for packed in (PackedLinear.of(site) for span in parts.blocks for site in span.sites):
            n, k = packed.rows, packed.columns
            if is_coded(packed.format, k, self.activation_bits):
                # Of each text what the gradient is the product of, until there are those of the whole batch.
                gradients = self.batch * tokens * (4 * n + k)
            else:
                # Each text in hand has a gradient, and so has their sum.
                gradients = 4 * n * k * (min(workers, self.batch) + 1)
            total += n * k * _BYTES + gradients
        return total, 0

    def store(self, work: Program, student: Student, learned: Learned) -> None:
        """Codes, scales and vectors."""
        assert isinstance(student, _Latents), "it is this pass's own"
        nodes = {node.name: node for node in work.graph.nodes}
        for site, packed in student.packed():
            held = PackedLinear.of(nodes[site.name])
            assert held.scale is not None and packed.scale is not None, "integer formats have scales"
            put_in_place(work, held.weight, packed.weight, "trained", held.node)
            put_in_place(work, held.scale, packed.scale, "trained", held.node)
        for vector, value in learned.vectors.items():
            put_in_place(work, nodes[vector.name], value, "trained")


class _Latents(Student):
    """Latent weights, and factors, all 1 at first, for scales."""

    def __init__(self, options: Qat, program: Program, parts: Sections, lengths: set[int]) -> None:
        packed = {site: PackedLinear.of(site) for span in parts.blocks for site in span.sites}
        self._matrices = {site: LatentMatrix(program, held, options.activation_bits) for site, held in packed.items()}
        self._held = list(self._matrices.values())
        whole = EndToEnd(program, parts, lengths, {site: held.times for site, held in self._matrices.items()})
        super().__init__(program, whole, vectors=options.vectors)
        self.learn([held.latent for held in self._matrices.values()], options.lr)
        self.learn([torch.ones(held.scale.shape) for held in self._matrices.values()], options.scale_lr)
        self.learn_vectors(options.scale_lr)

    def _pairs(self, values: Sequence[Tensor]) -> Iterator[tuple[fx.Node, LatentMatrix, Tensor, Tensor]]:
        """Each site with its latent and the factors of its scales."""
        count = len(self._matrices)
        for (site, held), latent, factor in zip(
            self._matrices.items(), values[:count], values[count : 2 * count], strict=True
        ):
            yield site, held, latent, factor

    def sites(self, values: Sequence[Tensor], workers: Workers) -> dict[fx.Node, Tensor | CodedMatrix]:
        """The rounded matrices."""

        def one(pair: tuple[fx.Node, LatentMatrix, Tensor, Tensor]) -> tuple[fx.Node, Tensor | CodedMatrix]:
            site, held, latent, factor = pair
            return site, held.matrix(latent, as_stored(held.scale * factor))

        return dict(workers.map(one, self._pairs(values)))

    def of_sites(self, now: Learned, found: Slopes) -> list[Part]:
        """Latents, straight through the rounding, and factors."""

        def one(site: fx.Node, held: LatentMatrix, latent: Tensor, factor: Tensor) -> list[Tensor]:
            made, scale = now.sites[site], as_stored(held.scale * factor)
            codes = made.codes if isinstance(made, CodedMatrix) else None
            of_latent, of_scale = held.gradients(latent, scale, found.sites.pop(site), codes)
            return [of_latent, of_scale * held.scale]

        count = len(self._matrices)
        pairs = enumerate(self._pairs(self.values))
        return [Part(pair[0], (place, count + place), partial(one, *pair)) for place, pair in pairs]

    def confine(self, place: int) -> None:
        """A latent far beyond the last code would take long to come back."""
        if place < len(self._matrices):
            self._held[place].confine()

    def packed(self) -> Iterator[tuple[fx.Node, Packed]]:
        """The sites as they are now."""
        for site, held, latent, factor in self._pairs(self.values):
            yield site, pack(held.format, held.codes(latent), as_stored(held.scale * factor))

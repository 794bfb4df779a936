"""Distillation: scales and norms for which the quantised model's next tokens are those of the float model.

After the end-to-end stages of EfficientQAT (Chen et al., 2024, arXiv 2407.11062, section 3.3), which trains scales
alone, and of NanoQuant (arXiv 2602.06694), whose loss is the divergence from the float model. Norms and biases are
learned beside them; codes stay what a quantiser chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.formats import pack_scale
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.chain import Learned, Sections, Slopes
from hikui.passes.quantise.learned.distillation import Course, Part, Student
from hikui.passes.quantise.learned.distiller import Distiller, as_stored, head_nbytes, put_in_place
from hikui.passes.quantise.learned.end_to_end import EndToEnd
from hikui.passes.quantise.learned.scaled_product import ScaledProduct

_EVERY = 16
"""Steps after which it is judged, and what has been learned is kept for a later run."""

_JUDGES = 1 << 20
"""No fewer texts are held out than one in eight."""

_EPSILON = 1e-8

_SHARES = (0.75, 0.5, 0.25)
"""Of the way from where it began: what batches teach adds up with it, what they say by chance with its square."""


@dataclass(frozen=True)
class Distil(Distiller):
    """Learns factors for the scales and norms of a quantised model, end to end, by its divergence from the float one.

    Adam descends on KL(float‖quantised) of the next token. One text in eight is held out, and what is best on those
    is kept, of what was met on the way and of parts of the whole way: at worst the model as it was.

    Attributes:
        epochs: how often all texts are gone through.
        lr: Adam's step at its height, relative to each scale; it falls to zero along a cosine.
        batch: texts for each step.
        vectors: whether norms and biases are learned too.
        activation_bits: what a later `activation` will round to, so that the scales make up for that too; 0 for none.
        sites: regular expression of the sites to learn on; empty is all.
        skip: regular expression of the sites to leave as they are.
        seed: of the order of the texts.
    """

    name: ClassVar[str] = "distil"
    learns: ClassVar[str] = "scales and norms"
    lr: float = 0.002

    def course(self) -> Course:
        """All that was judged competes."""
        return Course(self.name, self.epochs, self.batch, self.seed, _EVERY, _JUDGES, _EPSILON, _SHARES)

    def student(self, program: Program, parts: Sections, lengths: set[int]) -> Student:
        """Factors for scales; codes, one byte a weight, stay in memory."""
        return _Scales(self, program, parts, lengths)

    def nbytes(self, parts: Sections, workers: int, tokens: int) -> tuple[int, int]:
        """All codes, what is learned, the head; and what a worker has of a block's matrices."""
        weights = scales = block = 0
        for span in parts.blocks:
            matrices = [PackedLinear.of(site) for site in span.sites]
            sizes = [packed.rows * packed.columns for packed in matrices]
            weights += sum(sizes)
            scales += sum(packed.rows * packed.format.groups(packed.columns) for packed in matrices)
            block = max(block, 4 * sum(sizes) + 12 * max(sizes, default=0))
        return weights + (24 + 8 * workers) * scales + head_nbytes(parts), block

    def store(self, work: Program, student: Student, learned: Learned) -> None:
        """Scales and vectors."""
        nodes = {node.name: node for node in work.graph.nodes}
        for site, scale in learned.sites.items():
            held = PackedLinear.of(nodes[site.name]).scale
            assert held is not None and isinstance(scale, Tensor), "integer formats have scales, which are learned"
            put_in_place(work, held, pack_scale(scale), "distilled", nodes[site.name])
        for vector, value in learned.vectors.items():
            put_in_place(work, nodes[vector.name], value, "distilled")


class _Scales(Student):
    """Factors, all 1 at first, for the scales of sites."""

    def __init__(self, options: Distil, program: Program, parts: Sections, lengths: set[int]) -> None:
        packed = {site: PackedLinear.of(site) for span in parts.blocks for site in span.sites}
        self._products = {site: ScaledProduct(program, held, options.activation_bits) for site, held in packed.items()}
        whole = EndToEnd(program, parts, lengths, {site: held.at for site, held in self._products.items()})
        super().__init__(program, whole, vectors=options.vectors)
        self.learn([torch.ones(held.scale.shape) for held in self._products.values()], options.lr)
        self.learn_vectors(options.lr)

    def sites(self, values: Sequence[Tensor], workers: Workers) -> dict[fx.Node, Tensor]:
        """Scales, as float16 will hold them."""
        pairs = zip(self._products.items(), values, strict=False)
        return {site: as_stored(held.scale * factor) for (site, held), factor in pairs}

    def of_sites(self, now: Learned, found: Slopes) -> list[Part]:
        """The factors."""

        def of_scale(site: fx.Node, stored: Tensor) -> list[Tensor]:
            reaching = found.sites[site]
            assert isinstance(reaching, Tensor), "scales are learned, no matrices"
            return [reaching * stored]

        sites = enumerate(self._products.items())
        return [Part(site, (place,), partial(of_scale, site, held.scale)) for place, (site, held) in sites]

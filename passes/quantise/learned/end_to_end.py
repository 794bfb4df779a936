"""How far a quantised model is from the float one, as a function of its scales and norms, with its gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from hikui.lowering.ir.float_matrix import float_matrix
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.block_training import Product, multiply_by
from hikui.passes.gradients.chain import Chain, Learned, Sections, Slopes, cuts, length
from hikui.passes.gradients.coded_matrix import CodedMatrix

_IN_CACHE = 1 << 18
"""Logits: a megabyte."""


class EndToEnd:
    """How far a program's next tokens are from those of the float model, and which way its scales and norms lead.

    Args:
        program: with packed sites; what they were packed from is still stored.
        parts: of the program.
        lengths: of the texts.
        products: of each site of the blocks, what it does for what is learned of it.

    Attributes:
        vectors: as of `Chain`.
        inputs: as of `Chain`.
        head_inputs: what the head reads.
    """

    def __init__(
        self,
        program: Program,
        parts: Sections,
        lengths: set[int],
        products: Mapping[fx.Node, Callable[[Any], Product]],
    ) -> None:
        self._products = products
        self._chain = Chain(program, parts, lengths)
        self._rounded = {site: multiply_by(PackedLinear.of(site).dense(program.store)) for site in parts.head.sites}
        self._exact = {site: multiply_by(float_matrix(site, program.store)) for site in parts.head.sites}
        self.inputs, self.head_inputs = self._chain.inputs, self._chain.head_inputs
        self.vectors = self._chain.vectors

    def keep(self, graphs: bool) -> None:
        """Whether what blocks compute is kept for the way back, which else computes it once more."""
        self._chain.keeps = graphs

    @torch.no_grad()
    def divergence(self, inputs: Mapping[fx.Node, Tensor], targets: Mapping[fx.Node, Tensor], now: Learned) -> Tensor:
        """The sum over a text's tokens of KL(float‖quantised) in nats: float64.

        Args:
            inputs: the values of `inputs` for the text.
            targets: the values of `head_inputs` in the float model.
            now: of each site and vector what stands in its place.
        """
        values = self._chain.forwards(inputs, now, self._product)
        read = {node: values[node] for node in self.head_inputs}
        parts = (self._of_rows(read, targets, rows, now.vectors) for rows in cuts(length(inputs)))
        return torch.stack(list(parts)).sum()

    def gradients(
        self, inputs: Mapping[fx.Node, Tensor], targets: Mapping[fx.Node, Tensor], now: Learned
    ) -> tuple[Tensor, Slopes]:
        """The divergence as above, and its gradients."""

        def loss(read: Mapping[fx.Node, Tensor], rows: slice, vectors: Mapping[fx.Node, Tensor]) -> Tensor:
            return self._of_rows(read, targets, rows, vectors)

        return self._chain.gradients(inputs, now, self._product, loss)

    def _product(self, site: fx.Node, learned: Tensor | CodedMatrix | None) -> Product:
        assert learned is not None, "something is learned of all sites"
        return self._products[site](learned)

    def _of_rows(
        self,
        values: Mapping[fx.Node, Tensor],
        targets: Mapping[fx.Node, Tensor],
        rows: slice,
        vectors: Mapping[fx.Node, Tensor],
    ) -> Tensor:
        """The divergence of some tokens."""
        count, head = rows.stop - rows.start, self._chain.head
        with torch.no_grad():
            cut = {node: targets[node][:, rows] for node in self.head_inputs}
            wanted = head.run(cut, count, self._exact)[0]
        cut = {node: values[node][:, rows] for node in self.head_inputs}
        given = head.run(cut, count, self._rounded, vectors)[0]
        divergence: Tensor = _Divergence.apply(given, wanted)  # type: ignore[no-untyped-call]
        return divergence


class _Divergence(torch.autograd.Function):
    """KL(softmax(wanted)‖softmax(given)) summed over the tokens, float64; its gradient is made on the way there."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        slope = torch.empty(given.shape) if ctx.needs_input_grad[0] else None
        # So many rows at a time that all that is made of them stays in the cache.
        count = max(1, _IN_CACHE // given.shape[-1])
        rows = [each.flatten(0, -2).split(count) for each in (given, wanted)]
        for index, (mine, other) in enumerate(zip(*rows, strict=True)):
            logarithms, sought = mine.log_softmax(-1), other.log_softmax(-1)
            likely = sought.exp()
            total += sought.sub_(logarithms).mul_(likely).sum(-1, dtype=torch.float64).sum()
            if slope is not None:
                slope.flatten(0, -2)[index * count :][:count] = logarithms.exp_().sub_(likely)
        ctx.slope = slope
        return total

    @staticmethod
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor, None]:
        return ctx.slope.mul_(of_total), None

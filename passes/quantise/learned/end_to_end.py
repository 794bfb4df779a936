"""How far a quantised model is from the float one, as a function of its scales and norms, with its gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.block_training import Product, multiply_by
from hikui.passes.gradients.chain import Chain, Learned, Sections, cuts, length


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
        products: Mapping[fx.Node, Callable[[Tensor], Product]],
    ) -> None:
        self._products = products
        self._chain = Chain(program, parts, lengths)
        self._rounded = {site: multiply_by(PackedLinear.of(site).dense(program.store)) for site in parts.head.sites}
        self._exact = {site: multiply_by(PackedLinear.of(site).unrounded(program.store)) for site in parts.head.sites}
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
    ) -> tuple[Tensor, Learned]:
        """The divergence as above, and its gradients."""

        def loss(read: Mapping[fx.Node, Tensor], rows: slice, vectors: Mapping[fx.Node, Tensor]) -> Tensor:
            return self._of_rows(read, targets, rows, vectors)

        return self._chain.gradients(inputs, now, self._product, loss)

    def _product(self, site: fx.Node, learned: Tensor | None) -> Product:
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
            wanted = head.run(cut, count, self._exact)[0].log_softmax(-1)
        cut = {node: values[node][:, rows] for node in self.head_inputs}
        given = head.run(cut, count, self._rounded, vectors)[0].log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum(-1).double().sum()

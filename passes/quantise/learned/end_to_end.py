"""The whole model as a function of its scales and norms that gradients flow through, one block in memory at a time."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import BLOCK, FLOAT_WEIGHT, Program
from hikui.passes.graph import block_segments
from hikui.passes.quantise.learned.block_training import (
    BlockSpan,
    Product,
    TrainingBlock,
    multiply_by,
    text_dependent,
)
from hikui.passes.quantise.learned.scaled_product import ScaledProduct

_TOKENS = 64
"""Tokens whose logits are made at a time: those of a whole text of a large vocabulary would take gigabytes."""


class Sections(NamedTuple):
    """The calls of a program that depend on its text, from the first block on.

    Attributes:
        blocks: each with what belongs to no block behind it; what is before the first is not learned on.
        head: from the last block to the logits; it looks at each token alone.
    """

    blocks: list[BlockSpan]
    head: BlockSpan


def sections(program: Program, learned: Sequence[fx.Node]) -> Sections:
    """Cuts a program.

    Args:
        program: canonicalised, unfused, with blocks.
        learned: the packed sites that are learned on.
    """
    segments = [segment for segment in block_segments(program) if any(BLOCK in node.meta for node in segment)]
    inside = [index for index, node in enumerate(segments[0]) if BLOCK in node.meta]
    segments[0] = segments[0][inside[0] :]
    last = max(index for index, node in enumerate(segments[-1]) if BLOCK in node.meta)
    tail, segments[-1] = segments[-1][last + 1 :], segments[-1][: last + 1]
    logits = program.outputs()[0]
    wanted, changing = set(learned), text_dependent(program)
    spans = []
    for segment in segments:
        held = set(segment)
        outputs = [
            node
            for node in segment
            if node.name in changing and any(user.op == "call_function" and user not in held for user in node.users)
        ]
        spans.append(BlockSpan(segment, segment[-1].next, [node for node in segment if node in wanted], outputs))
    needed = _behind(logits, set(tail))
    head = [node for node in tail if node in needed]
    sites = [node for node in head if is_packed(node)]
    return Sections(spans, BlockSpan(head, program.output_node, sites, [logits]))


def _behind(node: fx.Node, among: set[fx.Node]) -> set[fx.Node]:
    """The calls that a value is made of."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand in among and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


class Learned(NamedTuple):
    """What is learned, or its gradients.

    Attributes:
        scales: float32 [n, groups] of each site of the blocks.
        vectors: float32 [width], by their placeholders.
    """

    scales: dict[fx.Node, Tensor]
    vectors: dict[fx.Node, Tensor]


class EndToEnd:
    """How far a program's next tokens are from those of the float model, and which way its scales and norms lead.

    Args:
        program: with packed sites; what they were packed from is still stored.
        parts: of the program.
        lengths: of the texts.
        activation_bits: as of `ScaledProduct`.

    Attributes:
        products: of the sites of the blocks.
        vectors: placeholders of the weights, float32 [width], that blocks and head read: those of norms, and biases.
        inputs: what the first block reads.
        head_inputs: what the head reads.
    """

    def __init__(self, program: Program, parts: Sections, lengths: set[int], activation_bits: int) -> None:
        self.products = {
            site: ScaledProduct(program, PackedLinear.of(site), activation_bits)
            for span in parts.blocks
            for site in span.sites
        }
        fixed: dict[int, dict[fx.Node, object]] = {}
        self._blocks = [(span, TrainingBlock(program, span, lengths, fixed)) for span in parts.blocks]
        cuts = {rows.stop - rows.start for length in lengths for rows in _cuts(length)}
        self._head = TrainingBlock(program, parts.head, cuts)
        self._rounded = {site: multiply_by(PackedLinear.of(site).dense(program.store)) for site in parts.head.sites}
        self._exact = {site: multiply_by(_float_matrix(program, site)) for site in parts.head.sites}
        self.inputs = self._blocks[0][1].inputs
        self.head_inputs = self._head.inputs
        read = [vector for block in (*(block for _, block in self._blocks), self._head) for vector in block.vectors]
        self.vectors = list(dict.fromkeys(read))

    @torch.no_grad()
    def divergence(self, inputs: Mapping[fx.Node, Tensor], targets: Mapping[fx.Node, Tensor], now: Learned) -> Tensor:
        """The sum over a text's tokens of KL(float‖quantised) in nats: float64.

        Args:
            inputs: the values of `inputs` for the text.
            targets: the values of `head_inputs` in the float model.
            now: of each site and vector what stands in its place.
        """
        values = self._forwards(inputs, now)
        read = {node: values[node] for node in self.head_inputs}
        parts = (self._of_rows(read, targets, rows, now.vectors) for rows in _cuts(_length(inputs)))
        return torch.stack(list(parts)).sum()

    def gradients(
        self, inputs: Mapping[fx.Node, Tensor], targets: Mapping[fx.Node, Tensor], now: Learned
    ) -> tuple[Tensor, Learned]:
        """The divergence as above, and its gradients.

        Only what goes from block to block is kept on the way there; each block is run once more on the way back.
        """
        values = self._forwards(inputs, now)
        reaching: dict[fx.Node, Tensor] = {}
        found = Learned({}, {})
        total = torch.zeros((), dtype=torch.float64)
        for rows in _cuts(_length(inputs)):
            read, own = _leaves({node: values[node] for node in self.head_inputs}), self._own(self._head, now)
            with torch.enable_grad():
                loss = self._of_rows(read, targets, rows, own)
            _backwards([(loss, None)], [(read, reaching), (own, found.vectors)])
            total += loss.detach()
        for span, block in reversed(self._blocks):
            read, own = _leaves({node: values[node] for node in block.inputs}), self._own(block, now)
            scales = _leaves({site: now.scales[site] for site in span.sites})
            with torch.enable_grad():
                made = block.run(read, _length(inputs), self._with(scales), own)
            ends = [(value, reaching.pop(node, None)) for node, value in zip(span.outputs, made, strict=True)]
            _backwards(
                [(value, of_value) for value, of_value in ends if of_value is not None],
                [(read, reaching), (own, found.vectors), (scales, found.scales)],
            )
        return total, found

    @torch.no_grad()
    def _forwards(self, inputs: Mapping[fx.Node, Tensor], now: Learned) -> dict[fx.Node, Tensor]:
        """What goes from block to block."""
        values = dict(inputs)
        for span, block in self._blocks:
            read = {node: values[node] for node in block.inputs}
            scales = {site: now.scales[site] for site in span.sites}
            made = block.run(read, _length(inputs), self._with(scales), now.vectors)
            values |= zip(span.outputs, made, strict=True)
        return values

    def _with(self, scales: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Product]:
        return {site: self.products[site].at(scale) for site, scale in scales.items()}

    @staticmethod
    def _own(block: TrainingBlock, now: Learned) -> dict[fx.Node, Tensor]:
        return _leaves({node: now.vectors[node] for node in block.vectors})

    def _of_rows(
        self,
        values: Mapping[fx.Node, Tensor],
        targets: Mapping[fx.Node, Tensor],
        rows: slice,
        vectors: Mapping[fx.Node, Tensor],
    ) -> Tensor:
        """The divergence of some tokens."""
        count = rows.stop - rows.start
        with torch.no_grad():
            cut = {node: targets[node][:, rows] for node in self.head_inputs}
            wanted = self._head.run(cut, count, self._exact)[0].log_softmax(-1)
        cut = {node: values[node][:, rows] for node in self.head_inputs}
        given = self._head.run(cut, count, self._rounded, vectors)[0].log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum(-1).double().sum()


def _cuts(length: int) -> list[slice]:
    return [slice(start, min(start + _TOKENS, length)) for start in range(0, length, _TOKENS)]


def _length(inputs: Mapping[fx.Node, Tensor]) -> int:
    """Of a text, by what the first block reads of it: [1, T, width]."""
    return next(iter(inputs.values())).shape[1]


def _leaves(values: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """The values as what gradients are taken of, where they are no integers."""
    return {node: value.detach().requires_grad_(value.is_floating_point()) for node, value in values.items()}


def _backwards(
    ends: Sequence[tuple[Tensor, Tensor | None]],
    leaves: Sequence[tuple[Mapping[fx.Node, Tensor], dict[fx.Node, Tensor]]],
) -> None:
    """Adds gradients to what has been found.

    Args:
        ends: values, and the gradient that reaches each (None for a loss).
        leaves: with the place for their gradients.
    """
    wanted = [(node, leaf, place) for values, place in leaves for node, leaf in values.items() if leaf.requires_grad]
    made, reaching = zip(*ends, strict=True)
    gradients = torch.autograd.grad(made, [leaf for _, leaf, _ in wanted], reaching, allow_unused=True)
    for (node, _, place), gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            place[node] = place[node] + gradient if node in place else gradient


def _float_matrix(program: Program, site: fx.Node) -> Tensor:
    """What a packed site was made of, its columns in the packed order: float32 [n, k]."""
    order = PackedLinear.of(site).column_order(program.store)
    matrix = program.store.load(str(site.meta[FLOAT_WEIGHT])).float()
    return matrix if order is None else matrix[:, order]

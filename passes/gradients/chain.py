"""A model as a chain of blocks with a head behind them, which gradients go back through one block at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, fx

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.ir.packed import is_packed
from hikui.lowering.ir.program import BLOCK, Program
from hikui.passes.gradients.block_training import BlockSpan, Product, TrainingBlock, text_dependent
from hikui.passes.gradients.coded_matrix import CodedGradient, CodedLeaf, CodedMatrix
from hikui.passes.graph import block_segments

_TOKENS = 64
"""Tokens whose logits are made at a time: those of a whole text of a large vocabulary would take gigabytes."""


class Sections(NamedTuple):
    """The calls of a program that depend on its text, from the first block on.

    Attributes:
        blocks: each with what belongs to no block behind it; what is before the first is left out.
        head: from the last block to the logits; it looks at each token alone.
    """

    blocks: list[BlockSpan]
    head: BlockSpan


def sections(program: Program, chosen: Sequence[fx.Node]) -> Sections:
    """Cuts a program.

    Args:
        program: canonicalised, unfused, with blocks.
        chosen: sites whose products the caller will say.
    """
    segments = [segment for segment in block_segments(program) if any(BLOCK in node.meta for node in segment)]
    inside = [index for index, node in enumerate(segments[0]) if BLOCK in node.meta]
    segments[0] = segments[0][inside[0] :]
    last = max(index for index, node in enumerate(segments[-1]) if BLOCK in node.meta)
    tail, segments[-1] = segments[-1][last + 1 :], segments[-1][: last + 1]
    logits = program.outputs()[0]
    wanted, changing = set(chosen), text_dependent(program)
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
    return Sections(spans, BlockSpan(head, program.output_node, [node for node in head if is_packed(node)], [logits]))


def without_head(parts: Sections, name: str) -> str | None:
    """Why a pass cannot look at a program's next tokens, where nothing is behind its blocks; None where it can."""
    if parts.head.nodes:
        return None
    block = parts.blocks[-1].name
    return f"The logits are made inside of {block}, and {name} takes a model with a head behind its blocks"


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
    """What is learned.

    Attributes:
        sites: what is learned of each site of the blocks: its scales, float32 [n, groups], or its matrix, [n, k].
        vectors: float32 [width], by their placeholders.
    """

    sites: Mapping[fx.Node, Tensor | CodedMatrix]
    vectors: dict[fx.Node, Tensor]


class Slopes(NamedTuple):
    """The gradients for what is learned, float32, those for matrices of codes being those for what they stand for."""

    sites: dict[fx.Node, Tensor | CodedGradient]
    vectors: dict[fx.Node, Tensor]

    def add(self, other: "Slopes") -> None:
        """Adds those of another text, which may be used up."""
        for node, gradient in other.sites.items():
            held = self.sites.get(node)
            if held is None:
                self.sites[node] = gradient
            elif isinstance(held, CodedGradient):
                assert isinstance(gradient, CodedGradient), "a site is learned in one way"
                self.sites[node] = held + gradient
            else:
                assert isinstance(gradient, Tensor), "a site is learned in one way"
                held += gradient
        for node, gradient in other.vectors.items():
            if node in self.vectors:
                self.vectors[node] += gradient
            else:
                self.vectors[node] = gradient


SiteProduct = Callable[[fx.Node, Tensor | CodedMatrix | None], Product]
"""What a site does, given what is learned of it, if anything is."""

Loss = Callable[[Mapping[fx.Node, Tensor], slice, Mapping[fx.Node, Tensor]], Tensor]
"""What some tokens cost, by what the head reads of all of them, which they are, and the vectors: one number."""


class Chain:
    """The blocks and the head of a program, their weights but for those of the chosen sites in memory.

    Args:
        program: as `sections` takes it.
        parts: of the program.
        lengths: of the texts.

    Attributes:
        head: behind the blocks; it is run on some tokens at a time.
        inputs: what blocks and head read of what is made before the first block, the token ids among it.
        head_inputs: what the head reads.
        vectors: placeholders of the weights, float32 [width], that blocks and head read: those of norms, and biases.
        keeps: whether what a block computes is kept for the way back, which else computes it once more; no bit depends
            on it.
    """

    keeps = False

    def __init__(self, program: Program, parts: Sections, lengths: set[int]) -> None:
        fixed: dict[int, dict[fx.Node, object]] = {}
        self._blocks = [(span, TrainingBlock(program, span, lengths, fixed)) for span in parts.blocks]
        self.head = TrainingBlock(program, parts.head, {rows.stop - rows.start for n in lengths for rows in cuts(n)})
        self.head_inputs = self.head.inputs
        made, before = set[fx.Node](), dict[fx.Node, None]()
        for inputs, outputs in (
            *((block.inputs, span.outputs) for span, block in self._blocks),
            (self.head.inputs, []),
        ):
            before.update(dict.fromkeys(node for node in inputs if node not in made))
            made.update(outputs)
        self.inputs = list(before)
        read = [vector for block in (*(block for _, block in self._blocks), self.head) for vector in block.vectors]
        self.vectors = list(dict.fromkeys(read))

    @torch.no_grad()
    def forwards(
        self, inputs: Mapping[fx.Node, Tensor], now: Learned, product: SiteProduct, first: int = 0
    ) -> dict[fx.Node, Tensor]:
        """What goes from block to block, and to the head.

        Args:
            inputs: the values of `inputs` for a text, and of what the blocks before `first` make.
            now: what stands in the places of what is learned.
            product: of each chosen site of the blocks.
            first: the first block that is run.
        """
        values = dict(inputs)
        for span, block in self._blocks[first:]:
            read = {node: values[node] for node in block.inputs}
            products = {site: product(site, now.sites.get(site)) for site in span.sites}
            made = block.run(read, length(inputs), products, now.vectors)
            values |= zip(span.outputs, made, strict=True)
        return values

    def gradients(
        self, inputs: Mapping[fx.Node, Tensor], now: Learned, product: SiteProduct, loss: Loss
    ) -> tuple[Tensor, Slopes]:
        """A loss summed over all tokens, float64, and its gradients for what is learned.

        Unless `keeps`, only what goes from block to block is kept on the way there; each block is run once more on the
        way back, and then gradients pass the outputs of `product`.
        """
        kept: list[_Graph] = []
        if self.keeps:
            values = dict(inputs)
            for span, block in self._blocks:
                kept.append(self._graph(span, block, values, now, product))
                values |= {node: value.detach() for node, value in zip(span.outputs, kept[-1].made, strict=True)}
        else:
            values = self.forwards(inputs, now, product)
        reaching: dict[fx.Node, Tensor] = {}
        found = Slopes({}, {})
        total = torch.zeros((), dtype=torch.float64)
        for rows in cuts(length(inputs)):
            read, own = _leaves({node: values[node] for node in self.head_inputs}), self._own(self.head, now)
            with torch.enable_grad():
                part = loss(read, rows, own)
            _backwards([(part, None)], [(read, reaching), (own, found.vectors)])
            total += part.detach()
        for span, block in reversed(self._blocks):
            graph = kept.pop() if self.keeps else self._graph(span, block, values, now, product)
            ends = [(value, reaching.pop(node, None)) for node, value in zip(span.outputs, graph.made, strict=True)]
            of_sites: dict[fx.Node, Tensor] = {}
            _backwards(
                [(value, of_value) for value, of_value in ends if of_value is not None],
                [
                    (graph.read, reaching),
                    (graph.own, found.vectors),
                    (graph.learned, of_sites),
                    ({site: leaf.stand_in for site, leaf in graph.coded.items()}, {}),
                ],
            )
            found.sites.update(of_sites)
            found.sites.update({site: leaf.gradient() for site, leaf in graph.coded.items()})
        return total, found

    def _graph(
        self,
        span: BlockSpan,
        block: TrainingBlock,
        values: Mapping[fx.Node, Tensor],
        now: Learned,
        product: SiteProduct,
    ) -> "_Graph":
        """What a block makes of some values, and all that gradients are taken of."""
        read, own = _leaves({node: values[node] for node in block.inputs}), self._own(block, now)
        held = {site: _as_leaf(now.sites[site]) for site in span.sites if site in now.sites}
        coded = {site: value.leaf for site, value in held.items() if isinstance(value, CodedMatrix) and value.leaf}
        learned = {site: value for site, value in held.items() if isinstance(value, Tensor)}
        with torch.enable_grad():
            products = {site: product(site, held.get(site)) for site in span.sites}
            made = block.run(read, length(values), products, own)
        return _Graph(read, own, learned, coded, made)

    @staticmethod
    def _own(block: TrainingBlock, now: Learned) -> dict[fx.Node, Tensor]:
        return _leaves({node: now.vectors[node] for node in block.vectors if node in now.vectors})


class _Graph(NamedTuple):
    """The outputs of a block, and the leaves: what it reads, its vectors, and what is learned of its sites."""

    read: dict[fx.Node, Tensor]
    own: dict[fx.Node, Tensor]
    learned: dict[fx.Node, Tensor]
    coded: dict[fx.Node, CodedLeaf]
    made: list[Tensor]


def first_inputs(
    chain: Chain, program: Program, parts: Sections, texts: Sequence[Tensor], workers: Workers, scratch: Path | None
) -> list[dict[fx.Node, Tensor]]:
    """The values of a chain's `inputs` for each text, in the program as it is."""
    with Stream(program, texts, workers, scratch=scratch) as stream:
        stream.advance(parts.blocks[0].nodes[0])
        return [{node: stream.value(number, node) for node in chain.inputs} for number in range(len(texts))]


def cuts(count: int) -> list[slice]:
    """The tokens of a text, as many at a time as the head looks at."""
    return [slice(start, min(start + _TOKENS, count)) for start in range(0, count, _TOKENS)]


def length(inputs: Mapping[fx.Node, Tensor]) -> int:
    """Of a text, by what is read of what is before its blocks: [1, T, …]."""
    return next(iter(inputs.values())).shape[1]


def _as_leaf(value: Tensor | CodedMatrix) -> Tensor | CodedMatrix:
    return value.as_leaf() if isinstance(value, CodedMatrix) else value.detach().requires_grad_()


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

"""How much the model's answers depend on each token of the calibration text, site by site.

What a rounded matrix does to the next token's distribution is, to second order, a sum over tokens of the change of its
output weighed by the curvature of the divergence there, the Fisher information. Sums such as E[x·xᵀ] that count every
token alike are ruled by the few with huge activations, on which little may depend. After GuidedQuant (Kim et al., 2025,
section 3), which weighs tokens by the squared gradient of the loss, averaged over a group of output channels; here the
group is all sites that read an activation, the labels are drawn from the model itself, so that the squared gradient
estimates the Fisher information, and a power tempers the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.float_matrix import float_matrix
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BLOCK, FLOAT_WEIGHT, SITE, STATISTICS, Program
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.gradients.block_training import BlockSpan, Product, multiply_by, require_gradients
from hikui.passes.gradients.chain import Chain, Learned, Sections, cuts, first_inputs, sections, without_head
from hikui.passes.graph import aten, float_sites, groups, is_weight, matrix_shape, same_size, shape, sites, weight_of
from hikui.passes.measure.evidence import TOKEN_WEIGHT
from hikui.passes.measure.footprint import Footprint, refuse_what_cannot_fit, value_nbytes

_LINEAR = torch.ops.hikui.linear.default

_EVERY = 16
"""Texts after which what has been found is kept for a later run."""

_STORED = torch.bfloat16
"""Of the matrices: which tokens count more is not told by their last digits."""

_LOGITS = 5
"""Tensors as large as the logits of the tokens that are looked at, while their gradient is taken."""

_SEEDS = 1 << 63
"""More than a generator takes."""

_TEXTS = 1 << 20
"""More texts than any calibration has, so that each text of each seed draws labels of its own."""


@dataclass(frozen=True)
class Guide(Pass):
    """Weighs the tokens of the calibration text by how much the next tokens depend on what a site makes of them.

    The statistic `token_weight`, float32 [tokens of all texts], mean 1: what later passes sum over tokens is weighed by
    it, the Gram matrix of `calibrate` and the Hessian of `gptq` and `qep` among them.

    Attributes:
        power: of the mean squared gradient: 1 is the Fisher information; near 0 tokens count alike.
        seed: of the labels.
    """

    name: ClassVar[str] = "guide"
    calibrates: ClassVar[bool] = True
    power: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise UsageError(f"guide cannot weigh by the power {self.power:g}; give above 0 and at most 1.")

    def chosen(self, program: Program) -> list[fx.Node]:
        """The float sites of blocks that read one row a token, in graph order."""
        tokens = shape(program.input_nodes()[0])[1]
        return [node for node in float_sites(program) if BLOCK in node.meta and _is_by_token(node, tokens)]

    def requires(self, program: Program) -> None:
        """Raises HikuiError where there is no float site, or gradients cannot pass."""
        if not float_sites(program):
            raise HikuiError("There is no unpacked linear site to weigh; run `canonicalise` first, and `rtn` later.")
        if chosen := self.chosen(program):
            parts = sections(program, chosen)
            require_gradients((*parts.blocks, parts.head), self.name)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Sends each text through the model and its gradients back.

        Raises:
            HikuiError: there is no calibration text, a gradient is NaN or infinite, or there is too little memory.
        """
        if context.calibration is None:
            raise HikuiError(
                "It follows real text through the model and none was given; give some with --calibration TEXT_FILE."
            )
        if not (chosen := self.chosen(program)):
            context.warn("The model has no blocks, and guide goes through blocks, so all tokens count alike.")
            return PassResult(program, False)
        parts = sections(program, [*chosen, *_rounded(program)])
        if (reason := without_head(parts, self.name)) is not None:
            context.warn(f"{reason}, so all tokens count alike.")
            return PassResult(program, False)
        work = program.clone()
        with Workers(context.workers) as workers:
            found = _Backpropagation(self, program, parts, chosen, context, workers).run()
        new = False
        nodes = {node.name: node for node in work.graph.nodes}
        for name, members in groups(chosen).items():
            key = f"statistics/{name}/{TOKEN_WEIGHT}"
            weights = _tempered(torch.cat([of_text[name] for of_text in found]), self.power)
            changed = not (key in work.store and torch.equal(work.store.load(key), weights))
            if changed:
                work.store.put(key, weights)
            for member in members:
                node = nodes[member.name]
                held = node.meta.get(STATISTICS, {})
                if changed or held.get(TOKEN_WEIGHT) != key:
                    new = True
                    # What was summed before counted the tokens otherwise.
                    held = {kind: place for kind, place in held.items() if kind != "gram"}
                node.meta[STATISTICS] = {**held, TOKEN_WEIGHT: key}
        if not new:
            return PassResult(program, False)
        return PassResult(work, True, [f"tokens of {len(found)} texts weighed for {len(groups(chosen))} activations"])

    def ensures(self, program: Program) -> None:
        """Where one site of a block has weights, every unpacked one has."""
        held = [TOKEN_WEIGHT in node.meta.get(STATISTICS, {}) for node in self.chosen(program)]
        if any(held) and not all(held):
            raise VerificationError("Some sites have weights of tokens and others have none.")


def _tempered(squares: Tensor, power: float) -> Tensor:
    """The weights: float32 with a mean of 1, all alike where nothing depends on any token."""
    mean = squares.double().mean()
    if not bool(mean > 0):
        return torch.ones(len(squares))
    raised = (squares.double() / mean) ** power
    return (raised / raised.mean()).float()


class _Backpropagation:
    """One run of the pass; the program is only read."""

    def __init__(
        self,
        options: Guide,
        program: Program,
        parts: Sections,
        chosen: list[fx.Node],
        context: PassContext,
        workers: Workers,
    ) -> None:
        assert context.calibration is not None, "it was looked at before"
        self._options, self._program, self._context, self._workers = options, program, context, workers
        self._texts = list(context.calibration.chunks)
        self._group = {site: name for name, members in groups(chosen).items() for site in members}
        footprint = _footprint(parts, self._texts, workers.count)
        context.announce(f"{options.name} needs {footprint}")
        refuse_what_cannot_fit(footprint, context, "leave `guide` out of the recipe")
        self._parts = parts
        self._chain = Chain(program, parts, {text.shape[1] for text in self._texts})
        self._head = {site: multiply_by(_float_matrix(program, site)) for site in parts.head.sites}
        self._matrices = {
            site: _float_matrix(program, site).to(_STORED) for span in parts.blocks for site in span.sites
        }

    def run(self) -> list[dict[str, Tensor]]:
        """For each text and each group the mean squared gradient of each token: float32 [T]."""
        resume, count = self._context.resume, len(self._texts)
        scratch = self._context.scratch
        inputs = first_inputs(self._chain, self._program, self._parts, self._texts, self._workers, scratch)
        found: list[dict[str, Tensor]] = []
        for start in range(0, count, _EVERY):
            self._context.progress(self._options.name, start, count)
            numbers = range(start, min(start + _EVERY, count))
            kept = resume.load(f"texts-{start}")
            if kept is not None:
                found += [{name: kept[f"{name}/{number}"] for name in set(self._group.values())} for number in numbers]
                continue
            made = list(self._workers.map(lambda number: self._of_text(number, inputs[number]), numbers))
            named = zip(numbers, made, strict=True)
            resume.save(
                f"texts-{start}", {f"{name}/{number}": held for number, of in named for name, held in of.items()}
            )
            found += made
            give_back()
        self._context.progress(self._options.name, count, count)
        return found

    def _of_text(self, number: int, inputs: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((self._options.seed * _TEXTS + number) % _SEEDS)
        squares: dict[str, Tensor] = {}

        def product(site: fx.Node, _: object) -> Product:
            name = self._group.get(site)

            def add(of_y: Tensor) -> None:
                assert name is not None, "the site is weighed for"
                own = of_y.square().sum(-1).flatten()
                squares[name] = squares[name] + own if name in squares else own

            def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
                y = F.linear(x, self._matrices[site].float(), bias)
                if y.requires_grad and name is not None:
                    y.register_hook(add)
                return y

            return multiply

        def loss(read: Mapping[fx.Node, Tensor], rows: slice, _: Mapping[fx.Node, Tensor]) -> Tensor:
            cut = {node: read[node][:, rows] for node in self._chain.head_inputs}
            said = self._chain.head.run(cut, rows.stop - rows.start, self._head)[0][0].log_softmax(-1)
            if bool(said.isnan().any()):
                raise HikuiError(
                    "The float model gives NaN on the calibration text; `hikui eval` of it shows "
                    "whether it does so elsewhere."
                )
            drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
            return -said.gather(-1, drawn).sum()

        self._chain.gradients(inputs, Learned({}, {}), product, loss)
        widths: dict[str, int] = {}
        for site, name in self._group.items():
            widths[name] = widths.get(name, 0) + matrix_shape(site)[0]
        length = self._texts[number].shape[1]
        out = {name: squares.get(name, torch.zeros(length)) / width for name, width in widths.items()}
        for name, of_tokens in out.items():
            if not bool(of_tokens.isfinite().all()):
                raise HikuiError(
                    f"Gradients at {name} are NaN or infinite on the calibration text; `hikui eval` of the float "
                    "model shows whether its numbers are finite."
                )
        return out


def _is_by_token(node: fx.Node, tokens: int | torch.SymInt) -> bool:
    """Whether a call gives one row a token: [T, width], or with dimensions of 1 before or between."""
    sizes = [size for size in shape(node)[:-1] if not same_size(size, 1)]
    return len(sizes) == 1 and same_size(sizes[0], tokens)


def _rounded(program: Program) -> list[fx.Node]:
    """The sites of blocks that are packed already and of which the float matrix is still known."""
    return [node for node in sites(program) if node.target is _LINEAR and {BLOCK, FLOAT_WEIGHT} <= node.meta.keys()]


def _float_matrix(program: Program, site: fx.Node) -> Tensor:
    """What a site multiplies with in the float model, as far as it is still known."""
    if site.target is not _LINEAR:
        return program.store.load(program.weight_of(weight_of(site)))
    if FLOAT_WEIGHT in site.meta:
        return float_matrix(site, program.store)
    return PackedLinear.of(site).dense(program.store)


def _footprint(parts: Sections, texts: list[Tensor], workers: int) -> Footprint:
    """What it needs at once: all matrices at two bytes a weight, the head, and a block's values for each worker."""
    kept = sum(value_nbytes(node, text.shape[1]) for text in texts for node in parts.blocks[-1].outputs)
    widest = max(text.shape[1] for text in texts)
    weights, block, site = 0, 0, ""
    for span in parts.blocks:
        sizes = [_size(node) for node in span.sites]
        # What is neither weighed for nor known as floats is in memory as it is multiplied with.
        weights += 2 * sum(sizes) + sum(4 * _size(node) for node in span.nodes if node not in span.sites)
        needed = 2 * sum(value_nbytes(node, widest) for node in span.nodes) + 4 * sum(sizes)
        if needed > block:
            block, site = needed, _name(span)
    flowing = len(parts.blocks) * sum(value_nbytes(node, widest) for node in parts.blocks[-1].outputs)
    head = sum(4 * _size(node) for node in parts.head.nodes)
    logits = _LOGITS * value_nbytes(parts.head.outputs[0], max(rows.stop - rows.start for rows in cuts(widest)))
    return Footprint(weights + head + workers * (block + flowing + logits) + kept, 0, site, 0, kept)


def _size(node: fx.Node) -> int:
    """Weights of the matrix that a call multiplies with; 0 where it is no product with one."""
    if node.target is _LINEAR:
        packed = PackedLinear.of(node)
        return packed.rows * packed.columns
    if node.target is aten.linear.default and is_weight(node.args[1]):
        rows, columns = matrix_shape(node)
        return rows * columns
    return 0


def _name(span: BlockSpan) -> str:
    return str(span.sites[0].meta[SITE]) if span.sites else span.name

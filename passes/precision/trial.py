"""What each site costs the model in each format, by trial: the costs that `assign` weighs bits against.

The error of a matrix, or of its output, hardly says what rounding it does to the model's answers; the divergence of the
answers themselves, with one site rounded at a time, does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import BLOCK, FIXED, SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.gradients.block_training import Product, multiply_by, require_gradients
from hikui.passes.gradients.chain import Chain, Learned, Sections, cuts, first_inputs, length, sections, without_head
from hikui.passes.graph import (
    aten,
    float_sites,
    groups,
    is_call,
    is_measured,
    is_weight,
    matrix_shape,
    selected,
    weight_of,
)
from hikui.passes.matrices import load_finite
from hikui.passes.measure.footprint import Footprint, refuse_what_cannot_fit, value_nbytes
from hikui.passes.precision.candidates import parse_formats
from hikui.passes.quantise.binary_factors import factorise, shrunk
from hikui.passes.quantise.columns import mixed_order, require_mixable
from hikui.passes.quantise.rounding import dequantise, round_matrix

_ITERATIONS = 30
"""Of the alternation that finds factors: the 100 of `factorise` leave 10 to 15 % less error, in three times as long."""


@dataclass(frozen=True)
class Trial(Pass):
    """Rounds one site at a time to each format, and notes how far the next tokens move; nothing else is changed.

    The cost is KL(float‖one site rounded) in nats a token, over some of the calibration texts. Sites are rounded as
    `rtn{weighted=true}` would where `calibrate` has measured them, else as `rtn` would, and factorised as `factorise`
    would, with fewer iterations. What an earlier measure has
    said of a site that is tried is forgotten: costs of two units cannot be added up. A site whose format `override` has
    fixed is not tried.

    Attributes:
        formats: candidates, separated by `|`.
        texts: how many of the calibration texts are read, the first ones.
        sites: regular expression of the sites to try; empty is all.
        skip: regular expression of the sites to leave out.
    """

    name: ClassVar[str] = "trial"
    calibrates: ClassVar[bool] = True
    formats: str = "int4-g64|int8-g64"
    texts: int = 4
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        parse_formats(self.formats)
        if self.texts < 1:
            raise UsageError(f"trial cannot read {self.texts} texts; give 1 or more.")

    def chosen(self, program: Program) -> list[fx.Node]:
        """The unpacked sites that are tried, in graph order: those of blocks, and of what is behind them."""
        found = self._asked_for(program)
        inside = [node for node in found if BLOCK in node.meta]
        if not inside:
            return []
        head = set(sections(program, inside).head.nodes)
        return [node for node in found if BLOCK in node.meta or node in head]

    def _asked_for(self, program: Program) -> list[fx.Node]:
        """Those whose format is still open, wherever they are."""
        free = [node for node in float_sites(program) if FIXED not in node.meta]
        return list(selected(free, self.sites, self.skip))

    def requires(self, program: Program) -> None:
        """Raises HikuiError where there is no float site, one is too narrow for a format, or a block is not known."""
        if not float_sites(program):
            raise HikuiError("There is no unpacked linear site; run `canonicalise` first, and `rtn` later.")
        chosen = self.chosen(program)
        for fmt in parse_formats(self.formats):
            if fmt.is_mixed:
                require_mixable(chosen, fmt)
        if chosen:
            parts = sections(program, [node for node in chosen if BLOCK in node.meta])
            require_gradients((*parts.blocks, parts.head), self.name)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Tries sites side by side; float matrices of all blocks are in memory.

        Raises:
            HikuiError: there is no calibration text or not enough memory, the model has no blocks or makes its logits
                inside of one, or its logits are not finite.
        """
        if context.calibration is None:
            raise HikuiError("It measures on text and none was given; give some with --calibration TEXT_FILE.")
        chosen = self.chosen(program)
        inside = [node for node in chosen if BLOCK in node.meta]
        if not inside:
            if any({BLOCK, FIXED} <= node.meta.keys() for node in float_sites(program)):
                return PassResult(program, False)
            raise HikuiError("The model has no blocks with sites to try, and trial goes through blocks.")
        if left := set(self._asked_for(program)) - set(chosen):
            names = ", ".join(sorted(node.meta[SITE] for node in left))
            context.warn(
                f"trial starts at the first block, so it has left out {names}; give them a format by `override`."
            )
        parts = sections(program, inside)
        if (reason := without_head(parts, self.name)) is not None:
            raise HikuiError(f"{reason}; the pass `sensitivity` measures errors of outputs instead.")
        work = program.clone()
        with Workers(context.workers) as workers:
            costs = _Trials(self, program, parts, chosen, context, workers).run()
        nodes = {node.name: node for node in work.graph.nodes}
        changed = False
        for node in chosen:
            changed |= costs[node] != node.meta.get(SENSITIVITY)
            nodes[node.name].meta[SENSITIVITY] = costs[node]
        if not changed:
            return PassResult(program, False)
        return PassResult(work, True, self._notes(chosen, costs))

    def _notes(self, chosen: Sequence[fx.Node], costs: Mapping[fx.Node, Mapping[str, float]]) -> list[str]:
        notes = []
        for name in map(str, parse_formats(self.formats)):
            worst = max(chosen, key=lambda node: (costs[node][name], node.meta[SITE]))
            total = sum(costs[node][name] for node in chosen)
            notes.append(
                f"{name}: {total:.4f} nats a token over {len(chosen)} sites, most at {worst.meta[SITE]} "
                f"({costs[worst][name]:.4f})"
            )
        return notes

    def ensures(self, program: Program) -> None:
        """Every site that was tried has a finite cost for each format."""
        wanted = {str(fmt) for fmt in parse_formats(self.formats)}
        for node in self.chosen(program):
            held = node.meta.get(SENSITIVITY, {})
            if not wanted <= held.keys() or not all(isfinite(held[name]) for name in wanted):
                raise VerificationError(f"Site {node.meta[SITE]} lacks a finite cost of some format.")


class _Trials:
    """One run of the pass; the program is only read."""

    def __init__(
        self,
        options: Trial,
        program: Program,
        parts: Sections,
        chosen: list[fx.Node],
        context: PassContext,
        workers: Workers,
    ) -> None:
        assert context.calibration is not None, "it was looked at before"
        self._options, self._program, self._parts = options, program, parts
        self._context, self._workers = context, workers
        self._texts = list(context.calibration.chunks)[: options.texts]
        self._formats = parse_formats(options.formats)
        footprint = _footprint(parts, chosen, self._texts, workers.count)
        context.announce(f"{options.name} needs {footprint}")
        refuse_what_cannot_fit(footprint, context)
        self._tied = groups(chosen)
        self._orders: dict[tuple[str, Format], Tensor] = {}
        for name, members in self._tied.items():
            for fmt in self._formats:
                if fmt.is_mixed:
                    self._orders[name, fmt] = mixed_order(program, members, fmt).long()
        self._chain = Chain(program, parts, {text.shape[1] for text in self._texts})
        self._matrices = {site: self._load(site) for span in parts.blocks for site in span.sites}
        self._packed = {site: multiply_by(PackedLinear.of(site).dense(program.store)) for site in parts.head.sites}
        of_block = {site: index for index, span in enumerate(parts.blocks) for site in span.sites}
        self._stages: list[list[fx.Node]] = [[] for _ in range(len(parts.blocks) + 1)]
        for site in chosen:
            self._stages[of_block.get(site, len(parts.blocks))].append(site)

    def _load(self, site: fx.Node) -> Tensor:
        return load_finite(self._program, weight_of(site), site.meta[SITE])

    def run(self) -> dict[fx.Node, dict[str, float]]:
        """The cost of each site in each format."""
        resume, costs = self._context.resume, dict[fx.Node, dict[str, float]]()
        kept = [resume.load(f"stage-{index}") for index in range(len(self._stages))]
        if not all(kept):
            values, wanted = self._float_run()
        names, done = [str(fmt) for fmt in self._formats], 0
        total = sum(map(len, self._stages))
        for index, of_stage in enumerate(self._stages):
            self._context.progress(self._options.name, done, total)
            found = kept[index]
            if found is None:
                jobs = [(index, site, fmt) for site in of_stage for fmt in self._formats]
                measured = self._workers.map(lambda job: self._cost(*job, values, wanted), jobs)
                table = torch.tensor(list(measured), dtype=torch.float64).view(len(of_stage), len(names))
                found = {"costs": table}
                resume.save(f"stage-{index}", found)
                give_back()
            for site, row in zip(of_stage, found["costs"].tolist(), strict=True):
                costs[site] = dict(zip(names, row, strict=True))
            done += len(of_stage)
        self._context.progress(self._options.name, done, total)
        return costs

    def _float_run(self) -> tuple[list[dict[fx.Node, Tensor]], list[Tensor]]:
        """What goes from block to block for each text, and the logarithms of the next tokens' probabilities."""
        scratch = self._context.scratch
        inputs = first_inputs(self._chain, self._program, self._parts, self._texts, self._workers, scratch)
        nothing = Learned({}, {})

        def one(read: dict[fx.Node, Tensor]) -> tuple[dict[fx.Node, Tensor], Tensor]:
            values = self._chain.forwards(read, nothing, self._exact)
            return values, torch.cat([self._said(values, rows, {}) for rows in cuts(length(read))])

        runs = list(self._workers.map(one, inputs))
        for _, wanted in runs:
            if not bool(wanted.isfinite().all()):
                raise HikuiError(
                    "The float model gives NaN or infinite values on the calibration text; `hikui eval` of it shows "
                    "whether it does so elsewhere."
                )
        return [values for values, _ in runs], [wanted for _, wanted in runs]

    def _exact(self, site: fx.Node, _: object) -> Product:
        return multiply_by(self._matrices[site])

    def _said(self, values: Mapping[fx.Node, Tensor], rows: slice, products: Mapping[fx.Node, Product]) -> Tensor:
        """The logarithms of the probabilities of some tokens: float32 [rows, vocabulary]."""
        cut = {node: values[node][:, rows] for node in self._chain.head_inputs}
        return self._chain.head.run(cut, rows.stop - rows.start, self._packed | dict(products))[0][0].log_softmax(-1)

    def _cost(
        self,
        stage: int,
        site: fx.Node,
        fmt: Format,
        values: Sequence[Mapping[fx.Node, Tensor]],
        wanted: Sequence[Tensor],
    ) -> float:
        """Nats a token that one site in one format costs."""
        tried = multiply_by(self._rounded(site, fmt))

        def product(node: fx.Node, _: object) -> Product:
            return tried if node is site else self._exact(node, None)

        total, tokens = 0.0, 0
        for of_text, said in zip(values, wanted, strict=True):
            moved = self._chain.forwards(of_text, Learned({}, {}), product, first=stage)
            count = said.shape[0]
            for rows in cuts(count):
                given = self._said(moved, rows, {site: tried} if stage == len(self._parts.blocks) else {})
                exact = said[rows]
                total += float((exact.exp() * (exact - given)).sum(-1).double().sum())
            tokens += count
        return total / tokens

    def _rounded(self, site: fx.Node, fmt: Format) -> Tensor:
        weight = self._matrices[site] if site in self._matrices else self._load(site)
        if fmt.is_factors:
            return self._factored(site, fmt, weight)
        if not fmt.is_integer:
            return weight.to(fmt.weight_dtype).float()
        importance = self._mean_square(site)
        order = None
        if fmt.is_mixed:
            name = next(name for name, members in self._tied.items() if site in members)
            order = self._orders[name, fmt]
            weight = weight[:, order]
            importance = None if importance is None else importance[order]
        try:
            rounded = dequantise(round_matrix(weight, fmt, importance=importance), fmt)
        except OverflowError as error:
            raise HikuiError(f"Site {site.meta[SITE]} as {fmt}: {error}; leave the format out.") from error
        return rounded if order is None else rounded[:, order.argsort()]

    def _mean_square(self, site: fx.Node) -> Tensor | None:
        return self._program.store.load(site.meta[STATISTICS]["mean_square"]).float() if is_measured(site) else None

    def _factored(self, site: fx.Node, fmt: Format, weight: Tensor) -> Tensor:
        square = self._mean_square(site)
        importance = None if square is None else shrunk(square)
        generator = torch.Generator().manual_seed(0)
        return factorise(weight, fmt.rank(*weight.shape), importance, _ITERATIONS, generator).dense()


def _footprint(parts: Sections, chosen: Sequence[fx.Node], texts: Sequence[Tensor], workers: int) -> Footprint:
    """All float matrices, what goes from block to block and the logits of each text, and what a worker has in hand."""
    weights = sum(_nbytes(node) for span in (*parts.blocks, parts.head) for node in span.nodes)
    largest = max(map(_nbytes, chosen))
    widest = max(text.shape[1] for text in texts)
    kept = 0
    for text in texts:
        kept += sum(value_nbytes(node, text.shape[1]) for span in parts.blocks for node in span.outputs)
        kept += value_nbytes(parts.head.outputs[0], text.shape[1])
    block = max(sum(value_nbytes(node, widest) for node in span.nodes) for span in parts.blocks)
    flowing = len(parts.blocks) * sum(value_nbytes(node, widest) for node in parts.blocks[-1].outputs)
    logits = 3 * value_nbytes(parts.head.outputs[0], min(widest, cuts(widest)[0].stop))
    peak = weights + kept + workers * (3 * largest + block + flowing + logits)
    return Footprint(peak, 0, str(chosen[0].meta[SITE]), 0, kept)


def _nbytes(node: fx.Node) -> int:
    """Of the float matrix that a call multiplies with; 0 where it is no product with a stored one."""
    if is_packed(node):
        packed = PackedLinear.of(node)
        return 4 * packed.rows * packed.columns
    if is_call(node, aten.linear.default) and is_weight(node.args[1]):
        n, k = matrix_shape(node)
        return 4 * n * k
    return 0

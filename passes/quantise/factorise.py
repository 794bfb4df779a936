"""Puts two matrices of signs in the place of a float matrix, with scales before, between and behind them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import FACTORS, MOST_FACTORS, SIGNS, Format, pack
from hikui.lowering.ir.factored import LEFT, RIGHT
from hikui.lowering.ir.program import CORRECTION, FACTOR, FLOAT_WEIGHT, FORMAT, GROUP, LATENT, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import (
    argument,
    aten,
    float_sites,
    hikui,
    insert,
    matrix_shape,
    replace,
    selected,
    weight_of,
)
from hikui.passes.matrices import load_finite
from hikui.passes.measure.evidence import OwnEvidence
from hikui.passes.quantise.binary_factors import SMALLEST, Factors, factorise, shrunk, signs
from hikui.passes.quantise.factor_descent import refine
from hikui.passes.quantise.packing import store_packed
from hikui.passes.quantise.rounder import assigned_format
from hikui.passes.quantise.walk import Walk

_SITES = 1 << 20
"""More sites than any model has, so that each of each seed has a start of its own."""

_LEAST = 1e-6
"""Of the largest scale of a column, what each has at least."""

_DAMPING = 0.01
"""Added to H's diagonal, over its mean, as in `gptq`."""


@dataclass(frozen=True)
class Factorise(Pass):
    """Ŵ = diag(s₁)·U·diag(m)·Vᵀ·diag(s₂) for the matrices of sites, U and V of signs: two products in a row.

    The factors are those of least error, each column of W weighed by its mean square activation where `calibrate` has
    measured it. What they leave of that is then lowered sign by sign, or, where the Gram matrix is known, what they
    leave of the output's error. What stands in the graph is x·s₂, a product with Vᵀ whose scales are m, and one with U
    whose scales are s₁; so a later `activation` rounds x·s₂, and what is between the two.

    Attributes:
        bits: of a weight, all scales counted, of sites that no format was assigned to: their rank is the largest
            multiple of 32 that fits.
        iterations: of the alternation that finds the factors.
        rounds: how often all signs and scales are looked at once more.
        sites: regular expression of the sites to factorise; empty is all.
        skip: regular expression of the sites to leave as they are.
        seed: of the start, which is random.
        inputs: `float` takes what `calibrate` has measured; `quantised` measures each site behind the blocks before,
            factorised already. A site that `qep` has marked is measured so, and corrected, in any case.
    """

    name: ClassVar[str] = "factorise"
    bits: float = 1.6
    iterations: int = 100
    rounds: int = 4
    sites: str = ""
    skip: str = ""
    seed: int = 0
    inputs: Literal["float", "quantised"] = "float"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MOST_FACTORS:
            raise UsageError(f"factorise cannot take {self.bits:g} bits per weight; it takes up to {MOST_FACTORS:g}.")
        if self.iterations < 1:
            raise UsageError(f"factorise cannot take {self.iterations} iterations; give 1 or more.")
        if self.rounds < 0:
            raise UsageError(f"factorise cannot take {self.rounds} rounds; give 0 or more.")

    def default_format(self) -> Format:
        """The format of sites that none was assigned to."""
        return Format(FACTORS, rate=self.bits)

    def format_of(self, node: fx.Node) -> Format:
        """The format that a site is to have."""
        return assigned_format(node, self.default_format())

    def chosen(self, program: Program) -> list[fx.Node]:
        """The float sites that it takes, in graph order: those that another format was assigned to are left."""
        found = selected(float_sites(program), self.sites, self.skip)
        return [node for node in found if self.format_of(node).is_factors]

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Where it measures its sites itself; those that `qep` has marked are that pass's to say."""
        return self.inputs == "quantised"

    def walks(self, program: Program) -> bool:
        """Whether it goes through the model with the calibration text."""
        return self.inputs == "quantised" or any(CORRECTION in node.meta for node in self.chosen(program))

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Factorises sites side by side, or those of a block behind the ones before.

        Raises:
            HikuiError: a matrix holds NaN or infinite values; or the pass has to go through the model and there is no
                calibration text, or not enough memory.
        """
        work = program.clone()
        chosen = self.chosen(work)
        if not chosen:
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            put = _Replacement(self, work, chosen, workers)
            notes = Walk(put, program, work, context, workers).run() if self.walks(work) else put.each(context)
        work.recompile()
        return PassResult(work, True, notes)


class _Replacement:
    """Puts factors in the place of sites (a `Replacement` of `walk`)."""

    reads_float = False
    wants = frozenset({"mean_square", "gram"})

    def __init__(self, options: Factorise, program: Program, nodes: list[fx.Node], workers: Workers) -> None:
        self.name, self.nodes = options.name, nodes
        self._options, self._program, self._workers = options, program, workers
        self._numbers = {node.meta[SITE]: number for number, node in enumerate(nodes)}

    def spare(self, tied: Sequence[fx.Node]) -> int:
        """See `Replacement.spare`: what a site makes of the Gram matrix, and of its factors, at most."""
        return 2 + 3 * min(self._workers.count, len(tied))

    def put(
        self,
        tied: Sequence[fx.Node],
        evidence: OwnEvidence | None = None,
        weights: Mapping[str, Tensor] | None = None,
        resume: Resume | None = None,
    ) -> list[str]:
        """See `Replacement.put`."""
        mean_square = hessian = None
        if evidence is not None:
            mean_square, hessian = evidence.mean_square, evidence.take_gram().float()
        jobs = [(node, mean_square, hessian, (weights or {}).get(node.meta[SITE]), resume) for node in tied]
        found = list(self._workers.map(lambda job: self._found(*job), jobs))
        return [note for node, factors in zip(tied, found, strict=True) for note in self._replace(node, factors)]

    def each(self, context: PassContext) -> list[str]:
        """Replaces all of the sites, on what `calibrate` has measured; returns notes on them."""
        notes: list[str] = []

        def factors(node: fx.Node) -> Factors:
            keys, load = node.meta.get(STATISTICS, {}), self._program.store.load
            mean_square, gram = (load(keys[kind]).float() if kind in keys else None for kind in ("mean_square", "gram"))
            return self._found(node, mean_square, gram, None, context.resume)

        for index, (node, found) in enumerate(zip(self.nodes, self._workers.map(factors, self.nodes), strict=True)):
            context.progress(self.name, index, len(self.nodes))
            notes += self._replace(node, found)
        context.progress(self.name, len(self.nodes), len(self.nodes))
        return notes

    def _found(
        self,
        node: fx.Node,
        mean_square: Tensor | None,
        gram: Tensor | None,
        weight: Tensor | None,
        resume: Resume | None,
    ) -> Factors:
        number = self._numbers[node.meta[SITE]]
        if resume and (kept := resume.load(f"{number}")) is not None:
            return Factors(**kept)
        if weight is None:
            weight = load_finite(self._program, weight_of(node), node.meta[SITE])
        importance = None if mean_square is None else shrunk(mean_square)
        if gram is not None:
            hessian = gram.clone()
            mean = float(hessian.diagonal().mean())
            hessian.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
        else:
            hessian = torch.diag(torch.ones(weight.shape[1]) if importance is None else importance)
        options = self._options
        generator = torch.Generator().manual_seed((options.seed * _SITES + number) % (1 << 63))
        rank = options.format_of(node).rank(*weight.shape)
        factors = factorise(weight, rank, importance, options.iterations, generator)
        factors = _in_range(refine(weight, factors, hessian, options.rounds))
        if resume:
            resume.save(f"{number}", factors._asdict())
        return factors

    def _replace(self, node: fx.Node, factors: Factors) -> list[str]:
        site, fmt, shape = node.meta[SITE], self._options.format_of(node), matrix_shape(node)
        _put_in_place(self._program, node, factors)
        return [f"{site}: {note}" for note in fmt.notes(*shape)]


def _in_range(factors: Factors) -> Factors:
    """The same product, with the largest of what float16 will hold near 1: s₂ takes the powers of two.

    No s₂ is zero, since x is had back from x·s₂ where the float model is asked.
    """
    least = _LEAST * factors.columns.abs().max().clamp_min(SMALLEST)
    columns = torch.where(factors.columns.abs() < least, least, factors.columns)
    found = {}
    for name, scale in (("rows", factors.rows), ("middle", factors.middle)):
        largest = float(scale.abs().max())
        power = 2.0 ** round(math.log2(largest)) if largest > 0 else 1.0
        found[name], columns = scale / power, columns * power
    return factors._replace(columns=columns, **found)


def _put_in_place(program: Program, node: fx.Node, factors: Factors) -> None:
    """x·s₂, the product with Vᵀ, and the one with U, which keeps the site's name."""
    site, stored = str(node.meta[SITE]), program.weight_of(weight_of(node))
    columns = program.add_weight(program.store.free_name(f"{stored}.columns"), factors.columns)
    value = insert(program, node, aten.mul.Tensor, (node.args[0], columns), node)
    bias = argument(node, 2, "bias")
    assert bias is None or isinstance(bias, fx.Node), "a linear adds a stored vector"
    parts = (
        (RIGHT, factors.right.t(), factors.middle, None),
        (LEFT, factors.left, factors.rows, bias),
    )
    for name, latent, scale, bias in parts:
        scale = scale.to(torch.float16).float().unsqueeze(1)
        matrix = pack(SIGNS, signs(latent).to(torch.int8), scale)
        held, scales = store_packed(program, program.store.free_name(f"{stored}.{name}"), matrix)
        value = insert(
            program, node, hikui.linear.default, (value, held, scales, bias, str(SIGNS), latent.shape[0]), node
        )
        # As far from turning as they are from zero, the mean of a row being its scale.
        key = program.store.free_name(f"{stored}.{name}.latent")
        program.store.put(key, latent / latent.abs().mean(1, keepdim=True).clamp_min(SMALLEST) * scale)
        own = site if name == LEFT else f"{site}.{RIGHT}"
        value.meta |= {SITE: own, GROUP: own, FORMAT: str(SIGNS), FLOAT_WEIGHT: stored, LATENT: key, FACTOR: name}
    replace(node, value)

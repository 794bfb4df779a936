"""What every quantiser of matrices shares: which sites, in which format, and on what evidence.

A quantiser that needs nothing but the weights, or the statistics that `calibrate` has stored, works site by site. One
that follows what its own rounding does to the activations, or that a `qep` pass has asked to correct the weights, walks
through the model with the float and the quantised activations side by side, block by block (`walk.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import GROUPS, KINDS, Format, Packed, pack
from hikui.lowering.ir.program import CORRECTION, FORMAT, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, matrix_shape, selected, sites, weight_of
from hikui.passes.measure.evidence import Evidence
from hikui.passes.quantise.columns import Orders, require_mixable
from hikui.passes.quantise.packing import pack_by_rows, replace_with_packed
from hikui.passes.quantise.rounding import Rounded

KINDS_BY_BITS = {1: "sign", 2: "int2", 3: "int3", 4: "int4", 8: "int8"}


@dataclass(frozen=True)
class Quantiser(Pass):
    """Base of the passes that round matrices.

    A site that has been assigned a format gets that one; the others get `format`, or else `bits` and `group`.

    Attributes:
        bits: 1 (signs), 2, 3, 4 or 8.
        group: input columns that share a scale: 32, 64 or 128; 0 is the whole channel.
        format: any integer format by its name, as `ternary-g128` or `nf4-g64`, instead of `bits` and `group`.
        sites: regular expression of the sites to quantise; empty is all.
        skip: regular expression of the sites to leave as they are.
    """

    sequential: ClassVar[bool] = False
    """Whether it measures its sites' inputs itself, behind the blocks that it has already quantised."""
    times: ClassVar[int] = 1
    """How many of the usual parts of a matrix it is given at once."""

    bits: int = 4
    group: int = 64
    format: str = ""
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if self.bits not in self._kinds():
            known = ", ".join(map(str, self._kinds()))
            raise UsageError(f"{self.name} cannot round to {self.bits} bits; it takes {known}.")
        if self.group not in (0, *GROUPS):
            raise UsageError(
                f"{self.name} cannot take a group of {self.group}; choose {', '.join(map(str, GROUPS))}, or 0 for the "
                "channel."
            )
        if self.format and (self.bits, self.group) != (Quantiser.bits, Quantiser.group):
            raise UsageError(f"{self.name} takes either format, or bits and group; leave out one or the other.")
        self.default_format()

    def _kinds(self) -> dict[int, str]:
        return KINDS_BY_BITS

    def default_format(self) -> Format:
        """The format of sites that none was assigned to."""
        if self.format:
            return Format.parse(self.format)
        kind = self._kinds()[self.bits]
        return Format(kind, self.group or None) if kind in KINDS else Format(kind)

    def format_of(self, node: fx.Node) -> Format:
        """The format that a site is to have."""
        return Format.parse(node.meta[FORMAT]) if FORMAT in node.meta else self.default_format()

    def chosen(self, program: Program) -> list[fx.Node]:
        """The sites that it quantises, in graph order."""
        return list(selected(float_sites(program), self.sites, self.skip))

    # ── what a quantiser says ───────────────────────────────────────────────────────────────────────────────────────

    def wants(self) -> frozenset[str]:
        """Which statistics it needs of what a site reads: `mean_square`, `max_abs`, `mean_abs`, `gram`."""
        return frozenset()

    @property
    def reads_float(self) -> bool:
        """Whether a sequential quantiser measures the float model's activations, not the quantised one's."""
        return False

    @property
    def spare_matrices(self) -> int:
        """How many K×K float64 matrices `prepare` makes beside the Gram matrix."""
        return 0

    def prepare(self, evidence: Evidence, workers: Workers) -> object:
        """Whatever can be worked out once for tied sites; it may use up the evidence's Gram matrix."""
        return None

    def quantise(self, weight: Tensor, fmt: Format, evidence: Evidence | None, prepared: object) -> Rounded:
        """Rounds some rows of a matrix, which do not depend on the others.

        Args:
            weight: float32 [n, k], finite; the columns of a mixed format in their permuted order, as the evidence.
            fmt: an integer format.
            evidence: what `wants` names; None where that is nothing.
            prepared: what `prepare` gave for the same evidence.

        Raises:
            OverflowError: a scale does not fit float16.
        """
        raise TypeError(f"{type(self).__name__} does not say how it rounds")

    # ── the pass ────────────────────────────────────────────────────────────────────────────────────────────────────

    def walks(self, program: Program) -> bool:
        """Whether it has to go through the model with the calibration text."""
        return self.sequential or any(CORRECTION in node.meta for node in self.chosen(program))

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or statistics are wanted and missing."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        walks = self.walks(program)
        for node in self.chosen(program):
            if not walks and self.wants():
                missing = sorted(self.wants() - node.meta.get(STATISTICS, {}).keys())
                if missing:
                    option = "{gram=true}" if missing == ["gram"] else ""
                    raise HikuiError(
                        f"Site {node.meta[SITE]} has no statistics of the kind '{missing[0]}', which {self} needs; "
                        f"run `calibrate{option}` first."
                    )
            if (fmt := self.format_of(node)).is_mixed:
                require_mixable([node], fmt)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantises one site after the other; at most one float matrix is in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit the format; or the pass has to go
                through the model and there is no calibration text, or not enough memory.
        """
        work = program.clone()
        chosen = self.chosen(work)
        if not chosen:
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            if self.walks(work):
                from hikui.passes.quantise.walk import Walk

                notes = Walk(self, program, work, context, workers).run()
            else:
                notes = self._site_by_site(work, chosen, context, workers)
        work.recompile()
        return PassResult(work, True, notes)

    def _site_by_site(self, work: Program, chosen: list[fx.Node], context: PassContext, workers: Workers) -> list[str]:
        notes: list[str] = []
        packer = Packer(self, work, [(node, self.format_of(node)) for node in chosen], workers)
        for index, node in enumerate(chosen):
            context.progress(self.name, index, len(chosen))
            evidence = Evidence.stored(work, node, self.wants()) if self.wants() else None
            notes += packer.pack(node, evidence, resume=context.resume)
        context.progress(self.name, len(chosen), len(chosen))
        return notes


class Packer:
    """Rounds and packs sites for a quantiser; what it has finished is kept in `resume`.

    Args:
        quantiser: rounds.
        program: is changed.
        nodes: every site that will be packed, with its format.
        workers: share the rows.
    """

    def __init__(
        self, quantiser: Quantiser, program: Program, nodes: list[tuple[fx.Node, Format]], workers: Workers
    ) -> None:
        self._quantiser = quantiser
        self._program = program
        self._workers = workers
        self._orders = Orders(program, nodes)
        self._of: Evidence | None = None
        self._prepared: dict[str, tuple[Evidence, object]] = {}

    def pack(
        self,
        node: fx.Node,
        evidence: Evidence | None,
        *,
        resume: Resume | None = None,
        weight: Tensor | None = None,
    ) -> list[str]:
        """Puts the packed matrix in the place of a float site; returns notes on it.

        Args:
            node: the site.
            evidence: of what it reads; tied sites share one, and it is used up with the last of them.
            resume: where finished sites are kept.
            weight: float32 [n, k] to round instead of the stored matrix.

        Raises:
            HikuiError: the weights hold NaN or infinite values, or do not fit the format.
        """
        site, fmt = node.meta[SITE], self._quantiser.format_of(node)
        x, order = self._orders.gather(node, fmt) if fmt.is_mixed else (None, None)
        kept = resume.load(site) if resume else None
        if kept is not None:
            packed = Packed(kept["weight"], kept.get("scale"))
        else:
            packed = self._round(node, fmt, order, evidence, weight)
            if resume:
                both = {"weight": packed.weight, "scale": packed.scale}
                resume.save(site, {name: tensor for name, tensor in both.items() if tensor is not None})
        notes = [f"{site}: {note}" for note in fmt.notes(*matrix_shape(node))]
        replace_with_packed(self._program, node, fmt, packed, x)
        return notes

    def _round(
        self, node: fx.Node, fmt: Format, order: Tensor | None, evidence: Evidence | None, weight: Tensor | None
    ) -> Packed:
        site, prepared = node.meta[SITE], None
        if evidence is not None and fmt.is_integer:
            evidence, prepared = self._prepare(evidence, fmt, order)

        def rounded(rows: Tensor) -> Packed:
            if not fmt.is_integer:
                return pack(fmt, _checked(rows, fmt, site))
            ordered = rows if order is None else rows[:, order]
            try:
                result = self._quantiser.quantise(ordered, fmt, evidence, prepared)
            except OverflowError as error:
                raise HikuiError(f"Site {site}: {error}; leave it out with skip, or choose a float format.") from error
            return pack(fmt, result.codes, result.scale)

        return pack_by_rows(
            self._program, weight_of(node), site, fmt, rounded, self._workers, weight, self._quantiser.times
        )

    def _prepare(self, evidence: Evidence, fmt: Format, order: Tensor | None) -> tuple[Evidence, object]:
        """What tied sites share is worked out with the first of them; a mixed format sees its columns permuted."""
        if evidence is not self._of:
            # Of the tied group before nothing is needed any more.
            self._of, self._prepared = evidence, {}
        key = "" if order is None else str(fmt)
        if key not in self._prepared:
            seen = evidence if order is None else evidence.permuted(order)
            self._prepared[key] = seen, self._quantiser.prepare(seen, self._workers)
        return self._prepared[key]


def _checked(weight: Tensor, fmt: Format, site: str) -> Tensor:
    largest = torch.finfo(fmt.weight_dtype).max
    if float(weight.abs().max()) > largest:
        raise HikuiError(f"Site {site}: its weights pass {fmt}'s largest value {largest:g}; pack it as float32.")
    return weight

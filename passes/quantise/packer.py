"""Rounds and packs sites, one after the other, and keeps what is finished."""

from collections.abc import Mapping, Sequence
from typing import Generic

import torch
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, Packed, pack
from hikui.lowering.ir.program import GROUP, SITE, Program
from hikui.passes.graph import matrix_shape, weight_of
from hikui.passes.measure.evidence import Evidence, OwnEvidence
from hikui.passes.quantise.columns import Orders
from hikui.passes.quantise.packing import pack_by_rows, replace_with_packed
from hikui.passes.quantise.rounder import Prepared, Rounder

_UNKNOWN = Evidence()
"""Of a site that nothing is wanted of."""


class Packer(Generic[Prepared]):
    """Rounds and packs sites for a quantiser (a `Replacement` of `walk`); what it has finished is kept in `resume`.

    Args:
        rounder: rounds.
        program: is changed.
        nodes: every site that will be packed.
        workers: share the rows.
    """

    def __init__(self, rounder: Rounder[Prepared], program: Program, nodes: list[fx.Node], workers: Workers) -> None:
        self.name, self.nodes, self.wants = rounder.name, nodes, rounder.wants()
        self.reads_float = rounder.reads_float
        self._rounder = rounder
        self._program = program
        self._workers = workers
        self._orders = Orders(program, [(node, rounder.format_of(node)) for node in nodes])
        self._due: dict[str, set[str]] = {}
        for node in nodes:
            if (key := column_key(rounder.format_of(node))) is not None:
                self._due.setdefault(node.meta[GROUP], set()).add(key)
        self._of: OwnEvidence | None = None
        self._prepared: dict[str, Prepared] = {}

    def spare(self, tied: Sequence[fx.Node]) -> int:
        """See `Replacement.spare`."""
        return self._rounder.spare_matrices + preparations(self._rounder, tied)

    def put(
        self,
        tied: Sequence[fx.Node],
        evidence: OwnEvidence | None = None,
        weights: Mapping[str, Tensor] | None = None,
        resume: Resume | None = None,
    ) -> list[str]:
        """See `Replacement.put`."""
        weights = dict(weights or {})
        notes: list[str] = []
        for node in tied:
            notes += self.pack(node, evidence, resume=resume, weight=weights.pop(node.meta[SITE], None))
        return notes

    def pack(
        self,
        node: fx.Node,
        evidence: OwnEvidence | None,
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
        site, fmt = node.meta[SITE], self._rounder.format_of(node)
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
        self, node: fx.Node, fmt: Format, order: Tensor | None, evidence: OwnEvidence | None, weight: Tensor | None
    ) -> Packed:
        site = node.meta[SITE]
        if fmt.is_integer:
            prepared = self._prepare(node, fmt, order, evidence)

        def rounded(rows: Tensor) -> Packed:
            if not fmt.is_integer:
                return pack(fmt, _checked(rows, fmt, site))
            ordered = rows if order is None else rows[:, order]
            try:
                result = self._rounder.quantise(ordered, fmt, prepared)
            except OverflowError as error:
                raise HikuiError(f"Site {site}: {error}; leave it out with skip, or choose a float format.") from error
            return pack(fmt, result.codes, result.scale)

        return pack_by_rows(
            self._program, weight_of(node), site, fmt, rounded, self._workers, weight, self._rounder.times
        )

    def _prepare(self, node: fx.Node, fmt: Format, order: Tensor | None, evidence: OwnEvidence | None) -> Prepared:
        """What tied sites share is worked out with the first of them; a mixed format sees its columns permuted."""
        if evidence is None:
            return self._rounder.prepare(_UNKNOWN, self._workers, fmt)
        if evidence is not self._of:
            # Of the tied group before nothing is needed any more.
            self._of, self._prepared = evidence, {}
        key = column_key(fmt)
        assert key is not None, "the format is of integers"
        if key not in self._prepared:
            last = self._due[node.meta[GROUP]] <= self._prepared.keys() | {key}
            seen: Evidence = evidence if last else evidence.shared()
            if order is not None:
                seen = seen.permuted(order)
            self._prepared[key] = self._rounder.prepare(seen, self._workers, fmt)
        return self._prepared[key]


def column_key(fmt: Format) -> str | None:
    """Tied sites whose formats have one key see their columns in one order; None for what is not rounded."""
    if not fmt.is_integer:
        return None
    return str(fmt) if fmt.is_mixed else ""


def preparations(rounder: Rounder[Prepared], tied: Sequence[fx.Node]) -> int:
    """How many K×K matrices are held for tied sites beside their Gram matrix, apart from `spare_matrices`."""
    keys = {key for node in tied if (key := column_key(rounder.format_of(node))) is not None}
    return max(0, len(keys) - 1) + any(keys)


def _checked(weight: Tensor, fmt: Format, site: str) -> Tensor:
    largest = torch.finfo(fmt.weight_dtype).max
    if float(weight.abs().max()) > largest:
        raise HikuiError(f"Site {site}: its weights pass {fmt}'s largest value {largest:g}; pack it as float32.")
    return weight

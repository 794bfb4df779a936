"""Round to nearest: quantises each linear site on its own, without looking at the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import GROUPS, Format, Packed, pack
from hikui.lowering.passes_base import Pass, PassContext, PassResult
from hikui.lowering.program import FORMAT, SITE, STATISTICS, Program
from hikui.passes.columns import Orders, require_mixable
from hikui.passes.graph import float_sites, matrix_shape, selected, sites, weight_of
from hikui.passes.packing import pack_by_rows, replace_with_packed
from hikui.passes.rounding import round_matrix

_KINDS = {1: "sign", 2: "int2", 3: "int3", 4: "int4", 8: "int8", 16: "float16", 32: "float32"}


@dataclass(frozen=True)
class Rtn(Pass):
    """Rounds the weights of linear sites to nearest.

    A site that has been assigned a format gets that one; the others get `format`, or else `bits` and `group`.

    Attributes:
        bits: 1 (signs), 2, 3, 4 or 8 for an integer format, 16 or 32 for a float one.
        group: input columns that share a scale: 32, 64 or 128; 0 is the whole channel. Floats take no notice of it.
        format: any format by its name, as `ternary-g128` or `nf4-g64`, instead of `bits` and `group`.
        clip: `mse` searches the scale with the least squared error; `minmax` covers the largest value.
        weighted: weigh each column's error by its mean square activation, as `calibrate` measured it.
        sites: regular expression of the sites to quantise; empty is all.
        skip: regular expression of the sites to leave as they are.
    """

    name: ClassVar[str] = "rtn"
    bits: int = 4
    group: int = 64
    format: str = ""
    clip: Literal["mse", "minmax"] = "mse"
    weighted: bool = False
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if self.bits not in _KINDS:
            raise UsageError(f"rtn cannot round to {self.bits} bits; it takes {', '.join(map(str, _KINDS))}.")
        if self.group not in (0, *GROUPS):
            raise UsageError(
                f"rtn cannot take a group of {self.group}; choose {', '.join(map(str, GROUPS))}, or 0 for the channel."
            )
        if self.format and (self.bits, self.group) != (Rtn.bits, Rtn.group):
            raise UsageError("rtn takes either format, or bits and group; leave out one or the other.")
        self.default_format()

    def default_format(self) -> Format:
        """The format of sites that none was assigned to."""
        if self.format:
            return Format.parse(self.format)
        kind = _KINDS[self.bits]
        return Format(kind, self.group or None) if self.bits <= 8 else Format(kind)

    def _format(self, node: fx.Node) -> Format:
        return Format.parse(node.meta[FORMAT]) if FORMAT in node.meta else self.default_format()

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or statistics are wanted and missing."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        for node in selected(float_sites(program), self.sites, self.skip):
            if self.weighted and STATISTICS not in node.meta:
                raise HikuiError(
                    f"Site {node.meta[SITE]} has no statistics to weigh errors with; run `calibrate` first, "
                    "or drop weighted=true."
                )
            if (fmt := self._format(node)).is_mixed:
                require_mixable([node], fmt)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantises one site after the other; at most one float matrix is in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit the format.
        """
        work = program.clone()
        chosen = list(selected(float_sites(work), self.sites, self.skip))
        if not chosen:
            return PassResult(program, False)
        orders = Orders(work, [(node, self._format(node)) for node in chosen])
        notes: list[str] = []
        for index, node in enumerate(chosen):
            context.progress("rtn", index, len(chosen))
            notes += self._quantise(work, node, orders)
        context.progress("rtn", len(chosen), len(chosen))
        work.recompile()
        return PassResult(work, True, notes)

    def _quantise(self, program: Program, node: fx.Node, orders: Orders) -> list[str]:
        site, fmt = node.meta[SITE], self._format(node)
        importance = program.store.load(node.meta[STATISTICS]["mean_square"]) if self.weighted else None
        x, order = orders.gather(node, fmt) if fmt.is_mixed else (None, None)
        if order is not None and importance is not None:
            importance = importance[order]

        def pack_rows(rows: torch.Tensor) -> Packed:
            if not fmt.is_integer:
                return pack(fmt, _checked(rows, fmt, site))
            ordered = rows if order is None else rows[:, order]
            try:
                rounded = round_matrix(ordered, fmt, self.clip, importance)
            except OverflowError as error:
                raise HikuiError(f"Site {site}: {error}; leave it out with skip, or choose a float format.") from error
            return pack(fmt, rounded.codes, rounded.scale)

        packed = pack_by_rows(program, weight_of(node), site, fmt, pack_rows)
        notes = [f"{site}: {note}" for note in fmt.notes(*matrix_shape(node))]
        replace_with_packed(program, node, fmt, packed, x)
        return notes


def _checked(weight: torch.Tensor, fmt: Format, site: str) -> torch.Tensor:
    largest = torch.finfo(fmt.weight_dtype).max
    if float(weight.abs().max()) > largest:
        raise HikuiError(f"Site {site}: its weights pass {fmt}'s largest value {largest:g}; pack it as float32.")
    return weight

"""What a quantiser says: which sites it takes, in which format, on what evidence, and how it rounds some rows."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import GROUPS, KINDS, SUM_WIDTH, WIDEST_GROUP, Format, is_group
from hikui.lowering.ir.program import FORMAT, Program
from hikui.lowering.pipeline.contract import Pass
from hikui.passes.graph import float_sites, selected
from hikui.passes.measure.evidence import Evidence
from hikui.passes.quantise.rounding import Rounded

Prepared = TypeVar("Prepared")
"""What a quantiser works out once for tied sites."""

KINDS_BY_BITS: Mapping[int, str] = {1: "sign", 2: "int2", 3: "int3", 4: "int4", 8: "int8"}

BITS, GROUP = 4, 64
"""Of the format that sites get where nothing else is said."""


def chosen_format(name: str, bits: int, group: int, text: str, kinds: Mapping[int, str] = KINDS_BY_BITS) -> Format:
    """The format that a pass's options ask for.

    Args:
        name: the pass's, for messages.
        bits: a key of `kinds`.
        group: a multiple of 32 up to 256; 0 is the whole channel.
        text: a format by its name instead of both, or empty.
        kinds: kind by bits.

    Raises:
        UsageError: there is no such format, or it is asked for twice.
    """
    if bits not in kinds:
        raise UsageError(f"{name} cannot round to {bits} bits; it takes {', '.join(map(str, kinds))}.")
    if group and not is_group(group):
        raise UsageError(
            f"{name} cannot take a group of {group}; choose {', '.join(map(str, GROUPS))}, another multiple of "
            f"{SUM_WIDTH} up to {WIDEST_GROUP}, or 0 for the channel."
        )
    if text and (bits, group) != (BITS, GROUP):
        raise UsageError(f"{name} takes either format, or bits and group; leave out one or the other.")
    if text:
        if (fmt := Format.parse(text)).is_factors:
            raise UsageError(f"{name} rounds one matrix, and {fmt} is of two; run `factorise` for it.")
        return fmt
    kind = kinds[bits]
    return Format(kind, group or None) if kind in KINDS else Format(kind)


def assigned_format(node: fx.Node, default: Format) -> Format:
    """The format that a site was assigned, or else the default."""
    return Format.parse(node.meta[FORMAT]) if FORMAT in node.meta else default


@dataclass(frozen=True)
class Rounder(Pass, Generic[Prepared]):
    """Base of the passes that round matrices: their options, and what each of them must say.

    A site that has been assigned a format gets that one; the others get `format`, or else `bits` and `group`.

    Attributes:
        bits: 1 (signs), 2, 3, 4 or 8.
        group: input columns that share a scale: 32, 64, 128 or another multiple of 32 up to 256; 0 is the whole
            channel. A matrix that it does not divide is cut into the nearest groups that do, without padding.
        format: any integer format by its name, as `ternary-g128` or `nf4-g64`, instead of `bits` and `group`.
        sites: regular expression of the sites to quantise; empty is all.
        skip: regular expression of the sites to leave as they are.
    """

    kinds: ClassVar[Mapping[int, str]] = KINDS_BY_BITS
    """The kinds of formats that `bits` may ask for."""
    times: ClassVar[int] = 1
    """How many of the usual parts of a matrix it is given at once."""

    bits: int = BITS
    group: int = GROUP
    format: str = ""
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        self.default_format()

    def default_format(self) -> Format:
        """The format of sites that none was assigned to."""
        return chosen_format(self.name, self.bits, self.group, self.format, self.kinds)

    def format_of(self, node: fx.Node) -> Format:
        """The format that a site is to have."""
        return assigned_format(node, self.default_format())

    def chosen(self, program: Program) -> list[fx.Node]:
        """The sites that it quantises, in graph order: not those that are to become factors."""
        found = selected(float_sites(program), self.sites, self.skip)
        return [node for node in found if not self.format_of(node).is_factors]

    def wants(self) -> frozenset[str]:
        """Which statistics it needs of what a site reads: `mean_square`, `max_abs`, `mean_abs`, `gram`."""
        return frozenset()

    @property
    def reads_float(self) -> bool:
        """Whether a sequential quantiser measures the float model's activations, not the quantised one's."""
        return False

    @property
    def spare_matrices(self) -> int:
        """How many K×K float64 matrices `prepare` makes beside a Gram matrix that it may use up."""
        return 0

    @abstractmethod
    def prepare(self, evidence: Evidence, workers: Workers, fmt: Format) -> Prepared:
        """What is worked out once for tied sites of one order of columns.

        Args:
            evidence: has what `wants` names; `take_gram` gives a matrix that may be overwritten.
            workers: share the work.
            fmt: of the first of them; where it is mixed, of all.
        """

    @abstractmethod
    def quantise(self, weight: Tensor, fmt: Format, prepared: Prepared) -> Rounded:
        """Rounds some rows of a matrix, which do not depend on the others.

        Args:
            weight: float32 [n, k], finite; the columns of a mixed format in their permuted order, as the evidence.
            fmt: an integer format.
            prepared: what `prepare` gave.

        Raises:
            OverflowError: a scale does not fit float16.
        """

"""What a product takes for one token on one thread, by how fast a machine multiplies each kind of weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import KINDS, SIGNS, Format

PICOSECONDS = 10**9
"""In a millisecond: times are whole numbers of them."""

_OF_A_WEIGHT = 1000
"""Picoseconds that a weight takes at 10⁹ weights a second."""


@dataclass(frozen=True)
class Speeds:
    """How many 10⁹ weights a second a thread multiplies with one row of activations, weights coming from memory.

    Attributes:
        of: by kind of weights.
    """

    of: Mapping[str, float]

    @staticmethod
    def parse(text: str) -> "Speeds":
        """Reads `int4=14.2|sign=40`, as a pass option states them.

        Raises:
            UsageError: the text is none, or states no kind or speed.
        """
        found: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split("|"))):
            kind, _, number = (piece.strip() for piece in part.partition("="))
            try:
                speed = float(number)
            except ValueError:
                speed = math.nan
            if kind not in KINDS or kind in found or not (math.isfinite(speed) and speed > 0):
                raise UsageError(
                    f"'{part}' is no speed of a kind of weights; write 10⁹ weights a second, such as "
                    f"int4=14.2|sign=40, each once, of {', '.join(KINDS)}."
                )
            found[kind] = speed
        return Speeds(found)

    def __str__(self) -> str:
        """As `parse` reads it, kinds in the order of their definition."""
        return "|".join(f"{kind}={self.of[kind]!r}" for kind in KINDS if kind in self.of)

    def lacks(self, formats: Iterable[Format]) -> list[str]:
        """The kinds that formats are made of and that have no speed here."""
        kinds = {
            _timed_as(part.format)
            for fmt in formats
            for part in (SIGNS if fmt.is_factors else fmt).segments((fmt.columns or 0) + 1)
        }
        return sorted(kinds - self.of.keys())

    def picoseconds(self, fmt: Format, n: int, k: int) -> int:
        """What the product with one row of activations takes, rounded up: columns of padding are multiplied too.

        Floats are read as fast as int8's bytes: neither does anything but wait for them.

        Args:
            fmt: a format that `lacks` nothing.
            n: output features.
            k: input features.
        """
        if fmt.is_factors:
            rank = fmt.rank(n, k)
            return self.picoseconds(SIGNS, rank, k) + self.picoseconds(SIGNS, n, rank)
        parts = fmt.segments(fmt.padded_k(k))
        bytes_wide = 1 if fmt.is_integer else fmt.bits / 8
        return math.ceil(
            math.fsum(
                _OF_A_WEIGHT * n * (part.stop - part.start) * bytes_wide / self.of[_timed_as(part.format)]
                for part in parts
            )
        )


def _timed_as(fmt: Format) -> str:
    """The kind whose speed an unmixed format has."""
    return fmt.kind if fmt.is_integer else "int8"

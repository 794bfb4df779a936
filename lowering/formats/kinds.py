"""The kinds of low-bit weights: which integer a stored field stands for.

Codes are integers throughout, codebooks included, so that products with integer activations are exact; what a table's
real values are divided by is absorbed by the scales.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
"""NormalFloat4 (Dettmers et al., QLoRA, 2023, appendix E) times 127, rounded."""

FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The 4-bit float with two exponent bits and one mantissa bit, times two; bit 3 is the sign."""

TERNARY_COLUMNS = 20
"""Input columns in a line of `ternary`: five codes a byte, 3⁵ = 243 of its 256 values."""

_STEP = 32


@dataclass(frozen=True)
class Kind:
    """How one kind of low-bit weight is stored.

    Attributes:
        bits: of the stored field; for `ternary`, of which a byte holds five, what one alone would take.
        lines: lines of 64 bytes (16 rows × 4 bytes) that hold a step of 32 input columns; None for `ternary`, whose
            lines hold 20 columns each, the last one of a group what is left.
        codes: the integer that each stored field stands for, by field; None for `int8`, which is stored as it is.
    """

    bits: int
    lines: int | None
    codes: tuple[int, ...] | None

    def lines_of(self, columns: int) -> int:
        """Lines that so many columns of one group take, a multiple of 32."""
        return -(-columns // TERNARY_COLUMNS) if self.lines is None else columns // _STEP * self.lines

    def columns_of(self, lines: int) -> int:
        """Columns, a multiple of 32, that so many lines of one group hold.

        Of twenty neighbouring numbers one at most is a multiple of 32, so that the lines of `ternary` tell it too.
        """
        return lines * TERNARY_COLUMNS // _STEP * _STEP if self.lines is None else lines * _STEP // self.lines

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Every integer that a code can be, ascending."""
        return tuple(range(-127, 128)) if self.codes is None else tuple(sorted(set(self.codes)))

    @cached_property
    def step(self) -> int:
        """The distance of two neighbouring codes (1 or 2), fields ascending; 0 for a codebook."""
        if self.codes is None:
            return 1
        step = self.codes[1] - self.codes[0]
        return step if self.codes == tuple(range(self.codes[0], self.codes[-1] + 1, step)) else 0

    @property
    def padding(self) -> int:
        """The field under padding: that of code 0 where there is one."""
        return self.codes.index(0) if self.codes and 0 in self.codes else 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.codes is None else torch.uint8


KINDS = {
    "sign": Kind(1, 1, (-1, 1)),
    "int2": Kind(2, 2, tuple(range(-2, 2))),
    "ternary": Kind(2, None, (-1, 0, 1)),
    "int3": Kind(3, 3, tuple(range(-4, 4))),
    "int4": Kind(4, 4, tuple(range(-8, 8))),
    "nf4": Kind(4, 4, NF4),
    "fp4": Kind(4, 4, FP4),
    "int8": Kind(8, 8, None),
}
"""Every kind whose columns are all stored alike; `mixed` is made of `int4` and `sign`.

Every kind of more than one bit has a zero. With odd codes alone a small weight moves by half a step away from zero,
always to the side of its own sign: where an input column is a hundred times as large as the others, as in every real
language model, these errors do not cancel. SmolLM2-135M in groups of 64 had 3.24 bits a character with the odd 3-bit
codes −7 … 7 and has 1.33 with −4 … 3 (0.98 in float), although the matrices themselves are rounded about as well.
"""

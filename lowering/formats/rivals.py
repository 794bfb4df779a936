"""What the same matrices would take in others' formats, by the formulas of their papers and code.

Papers on binary and ternary weights often count codes alone. These sums count everything that is stored: scales, means,
masks and bitmaps too, as appendix F of NanoQuant (arXiv 2602.06694) does for binary methods.
"""

from collections.abc import Callable, Iterable
from math import ceil
from typing import NamedTuple

_GROUP = 128
"""Columns of the blocks of binary and ternary methods."""

_BLOCK = 256
"""Columns of llama.cpp's blocks of few bits; matrices that are no multiple of it wide get another type."""

_FALLBACK = 4.5
"""Bits of IQ4_NL and Q4_0, which llama.cpp takes then."""


class Rival(NamedTuple):
    """One format of others.

    Attributes:
        name: as its authors call it.
        stored: what the sum counts.
        bits: `bits(n, k)` is bits a weight of an n×k matrix.
    """

    name: str
    stored: str
    bits: Callable[[int, int], float]


def _binary(of_row_and_block: int, of_column: int = 1) -> Callable[[int, int], float]:
    """Two bits a weight for sign and mask, and bits for each row of a block and each column."""
    return lambda n, k: 2 + (of_column * k + of_row_and_block * n * ceil(k / _GROUP)) / (n * k)


def _blocks(bits: float) -> Callable[[int, int], float]:
    """A type of llama.cpp with blocks of 256 columns."""
    return lambda n, k: bits if k % _BLOCK == 0 else _FALLBACK


RIVALS = (
    Rival("BiLLM", "sign and mask, 112 bits a row and block, no salient columns", _binary(112)),
    Rival("ARB-LLM, RC", "sign and mask, 64 bits a row and block, 33 a column, no salient columns", _binary(64, 33)),
    Rival("HBLLM, row", "sign and mask, 160 bits a row and block", _binary(160)),
    Rival("STBLLM 4:8", "as its authors' code stores it", lambda n, k: 3.5),
    Rival(
        "PTQ1.61",
        "a fifth of the columns at 4 bits, a scale a row, a mask of columns",
        lambda n, k: 1.6 + 32 / k + 1 / n,
    ),
    Rival("PT²-LLM", "five codes a byte, scale and mean a row and block", lambda n, k: 1.6 + 32 * ceil(k / _GROUP) / k),
    Rival("CAT-Q, as released", "Q2_0: two bits a code, a scale for 128", lambda n, k: 2 + 16 * ceil(k / _GROUP) / k),
    Rival("GPTQ 2 bits, g64", "codes, scale and zero point", lambda n, k: 2 + 18 * ceil(k / 64) / k),
    Rival("NanoQuant at 1.00", "two binary factors, two scales a row and column", lambda n, k: 1.0),
    Rival("llama.cpp TQ1_0", "five codes a byte, a scale for 256", _blocks(1.6875)),
    Rival("llama.cpp TQ2_0", "two bits a code, a scale for 256", _blocks(2.0625)),
    Rival("llama.cpp IQ1_S", "a grid of codes", _blocks(1.5625)),
    Rival("llama.cpp IQ2_XXS", "a grid of codes", _blocks(2.0625)),
    Rival("llama.cpp Q2_K", "codes, scales of scales", _blocks(2.625)),
    Rival("llama.cpp Q3_K", "codes, scales of scales", _blocks(3.4375)),
    Rival("llama.cpp Q4_0", "codes, a scale for 32", lambda n, k: 4.5),
)
"""By kind: binary, ternary and mixed, and llama.cpp's."""


def rival_bits(shapes: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Mean bits a weight of some matrices, (out features, in features) each, in each of `RIVALS`."""
    held = list(shapes)
    weights = sum(n * k for n, k in held)
    return {rival.name: sum(rival.bits(n, k) * n * k for n, k in held) / weights for rival in RIVALS} if weights else {}

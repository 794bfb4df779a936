"""Float matrices that are ternary already, as a model trained so holds them (BitNet b1.58, arXiv 2402.17764)."""

import torch
from torch import Tensor, fx

from hikui.lowering.formats import ROWS, Format, Packed, pack
from hikui.lowering.ir.program import SITE, Program
from hikui.passes.graph import matrix_shape, weight_of
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.quantise.packing import pack_by_rows, replace_with_packed
from hikui.passes.quantise.rounding import to_float16

_FEWEST = 8
"""Columns below which a row may well hold one magnitude by chance."""


def may_be_ternary(program: Program, node: fx.Node) -> bool:
    """Whether the first rows of a float site's matrix hold one magnitude each, and zero."""
    key, (n, k) = program.weight_of(weight_of(node)), matrix_shape(node)
    if k < _FEWEST:
        return False
    first = program.store.load_rows(key, 0, min(ROWS, n)).float()
    return bool(first.any()) and _is_of_one_magnitude(first)


def adopt_ternary(program: Program, node: fx.Node) -> list[str]:
    """Packs a float site whose matrix is ternary or of signs, with a scale a row; notes, or none where it is neither.

    Raises:
        HikuiError: the matrix holds NaN or infinite values.
    """
    site, weight = str(node.meta[SITE]), weight_of(node)
    zeros = False
    for rows in row_parts(*matrix_shape(node)):
        part = load_finite(program, weight, site, rows)
        if not _is_of_one_magnitude(part):
            return []
        zeros = zeros or bool((part == 0).any())
    fmt = Format("ternary" if zeros else "sign")
    furthest = [0.0]

    def pack_rows(part: Tensor) -> Packed:
        scale = part.abs().amax(1)
        stored = to_float16(scale)
        apart = (stored - scale).abs() / torch.where(scale > 0, scale, 1.0)
        furthest[0] = max(furthest[0], float(apart.max()))
        return pack(fmt, part.sign().to(torch.int8), stored.unsqueeze(1))

    try:
        packed = pack_by_rows(program, weight, site, fmt, pack_rows)
    except OverflowError:
        # Its scales are beyond float16: whoever rounds what is left will say so.
        return []
    replace_with_packed(program, node, fmt, packed)
    moved = f", its scales rounded to float16 by {furthest[0]:.1g} at most" if furthest[0] else ""
    return [f"{site}: {fmt}, as the matrix is {'ternary' if zeros else 'of signs'}{moved}"]


def _is_of_one_magnitude(rows: Tensor) -> bool:
    """Whether every row is one magnitude times −1, 0 and 1."""
    return torch.equal(rows, rows.sign() * rows.abs().amax(1, keepdim=True))

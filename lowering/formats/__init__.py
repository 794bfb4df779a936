"""Weight formats: how a matrix is stored, and how many bits that truly takes.

One packed layout serves every CPU: a block holds 16 output rows side by side, so a kernel adds 16 rows without a
horizontal sum, and 4 neighbouring input columns, which is what the integer dot products of VNNI and NEON take.
docs/architecture.md has the layout in a table.
"""

from hikui.lowering.formats.activations import quantize_activation, quantize_activation_static
from hikui.lowering.formats.cache import CODE_TYPES, cache_format, dequantize_cache, quantize_cache
from hikui.lowering.formats.format import (
    ACTIVATION_PADDING,
    FACTORS,
    GROUPS,
    LEAST_SCALE,
    MIXED,
    MOST_FACTORS,
    ROWS,
    SIGNS,
    SUM_WIDTH,
    WIDEST_GROUP,
    Format,
    Segment,
    activation_k,
    is_group,
)
from hikui.lowering.formats.kinds import FP4, KINDS, NF4, Kind
from hikui.lowering.formats.packing import Packed, pack, pack_scale, unpack, unpack_codes, unpack_scale

__all__ = [
    "ACTIVATION_PADDING",
    "CODE_TYPES",
    "FACTORS",
    "FP4",
    "GROUPS",
    "KINDS",
    "LEAST_SCALE",
    "MIXED",
    "MOST_FACTORS",
    "NF4",
    "ROWS",
    "SIGNS",
    "SUM_WIDTH",
    "WIDEST_GROUP",
    "Format",
    "Kind",
    "Packed",
    "Segment",
    "activation_k",
    "cache_format",
    "dequantize_cache",
    "is_group",
    "pack",
    "pack_scale",
    "quantize_activation",
    "quantize_activation_static",
    "quantize_cache",
    "unpack",
    "unpack_codes",
    "unpack_scale",
]

"""Lists of formats as pass options state them (`int4-g64|int8-g64`), and what tied sites take together."""

from collections.abc import Sequence

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format


def parse_formats(text: str, *, factors: bool = True) -> list[Format]:
    """The formats of a list, each once, in its order.

    Args:
        text: the list.
        factors: whether factors may be among them.

    Raises:
        UsageError: the list is empty, or names what is no format, or none that is wanted.
    """
    names = [name.strip() for name in text.split("|") if name.strip()]
    if not names:
        raise UsageError("The list of formats is empty; write for example int4-g64|int8-g64.")
    formats = list(dict.fromkeys(map(Format.parse, names)))
    if not factors and (found := [fmt for fmt in formats if fmt.is_factors]):
        raise UsageError(f"{found[0]} is of two matrices, whose error is not that of rounding one; try it by `trial`.")
    return formats


def tied_nbytes(formats: Sequence[Format], shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of tied sites; those of one mixed format share the order of their columns.

    Args:
        formats: of each site.
        shapes: (out features, in features) of each.
    """
    _, k = shapes[0]
    orders = sum(fmt.permutation_nbytes(k) for fmt in dict.fromkeys(formats))
    return orders + sum(fmt.nbytes(*shape) for fmt, shape in zip(formats, shapes, strict=True))

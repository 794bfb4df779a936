"""Lists of formats as pass options state them (`int4-g64|int8-g64`), and what tied sites take together."""

from collections.abc import Sequence

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format


def parse_formats(text: str) -> list[Format]:
    """The formats of a list, each once, in its order.

    Raises:
        UsageError: the list is empty, or names what is no format.
    """
    names = [name.strip() for name in text.split("|") if name.strip()]
    if not names:
        raise UsageError("The list of formats is empty; write for example int4-g64|int8-g64.")
    return list(dict.fromkeys(map(Format.parse, names)))


def tied_nbytes(formats: Sequence[Format], shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of tied sites; those of one mixed format share the order of their columns.

    Args:
        formats: of each site.
        shapes: (out features, in features) of each.
    """
    _, k = shapes[0]
    orders = sum(fmt.permutation_nbytes(k) for fmt in dict.fromkeys(formats))
    return orders + sum(fmt.nbytes(*shape) for fmt, shape in zip(formats, shapes, strict=True))

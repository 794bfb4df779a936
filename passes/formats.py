"""Lists of formats as pass options state them: `int4-g64|int8-g64`."""

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

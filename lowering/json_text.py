"""JSON and texts that somebody else wrote: whatever is wrong with them is told in one way."""

import json
from typing import Any


def not_utf8(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which no UTF-8 can say; None where it holds none.

    Python keeps a byte of an argument so that was not UTF-8, and JSON and YAML can spell one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, but nesting too deep for Python is a `ValueError` too, not a `RecursionError`.

    Raises:
        ValueError: the text is not JSON, nests too deeply, or has an integer of more digits than Python converts.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None

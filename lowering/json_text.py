"""JSON from a file that somebody else wrote: whatever is wrong with it is a ValueError."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, but nesting too deep for Python is a `ValueError` too, not a `RecursionError`.

    Raises:
        ValueError: the text is not JSON, nests too deeply, or has an integer of more digits than Python converts.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None

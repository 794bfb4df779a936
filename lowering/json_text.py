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


class DuplicateKeyError(ValueError):
    """An object names something twice, and readers differ in which of them they believe."""


def parse_json(text: str | bytes, *, unique: bool = False, finite: bool = False) -> Any:
    """As `json.loads`, but nesting too deep for Python is a `ValueError` too, not a `RecursionError`.

    Args:
        text: the JSON.
        unique: refuse an object that has a key twice.
        finite: refuse NaN and the infinities, which JSON does not have and Python reads.

    Raises:
        DuplicateKeyError: an object has a key twice.
        ValueError: the text is not JSON, nests too deeply, or has an integer of more digits than Python converts.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique if unique else None, parse_constant=_refused if finite else None
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise DuplicateKeyError(f"the key {twice[:80]!r} twice")
    return found

"""The errors that hikui raises on purpose.

Each carries one sentence that names the file, node or option at fault and the way out. The command line prints that
sentence and exits with `exit_code`; anything else that escapes is a defect of hikui.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

DEFECT = 3
"""Exit status of what is no fault of the input: a broken promise, or an error that nobody foresaw."""


class HikuiError(Exception):
    """Something in the input, the machine or the artefact makes the work impossible."""

    exit_code: ClassVar[int] = 1


class UsageError(HikuiError):
    """The request itself is wrong: an unknown option, pass, target or recipe key."""

    exit_code: ClassVar[int] = 2


class VerificationError(HikuiError):
    """A program breaks an invariant: a pass is at fault, not the user's input."""

    exit_code: ClassVar[int] = DEFECT


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the known name that is nearest to a wrong one, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line, as the end of a sentence; its type where it says nothing."""
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")

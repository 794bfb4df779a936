"""The errors that hikui raises on purpose.

Each carries one sentence that names the file, node or option at fault and the way out. The command line prints that
sentence and exits with `exit_code`; anything else that escapes is a defect of hikui.
"""

from typing import ClassVar


class HikuiError(Exception):
    """Something in the input, the machine or the artefact makes the work impossible."""

    exit_code: ClassVar[int] = 1


class UsageError(HikuiError):
    """The request itself is wrong: an unknown option, pass, target or recipe key."""

    exit_code: ClassVar[int] = 2


class VerificationError(HikuiError):
    """A program breaks an invariant: a pass is at fault, not the user's input."""

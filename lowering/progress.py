"""How long work says how far it is, what it is about to need, and what its user should know of the result."""

import logging
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""


def no_progress(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


Announce = Callable[[str], None]
"""Called with a sentence on what is about to happen."""


def no_announcement(sentence: str) -> None:
    """What nobody reads."""


def log_warning(sentence: str) -> None:
    """A sentence that the user should read, through the logger `hikui`, which Python shows on stderr."""
    logging.getLogger("hikui").warning(sentence)

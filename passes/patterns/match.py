"""The answer of a matcher that found nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern does not hold.

    Attributes:
        reason: one clause, for people.
        node: name of the node where it broke.
    """

    reason: str
    node: str

"""What the harness times: a contestant, told the setting, gives steps to take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

COLD_BYTES = 150_000_000
"""Weights that a cold walk goes over; no cache of a CPU with few memory channels holds them."""

GROUP = 128
"""Weights that share a scale, wherever a library lets one choose."""

Step = Callable[[], object]


class UnavailableError(Exception):
    """A contestant cannot do what it is asked for; the message says why."""


@dataclass(frozen=True)
class Workload:
    """One setting.

    Attributes:
        m: rows of activations.
        n: output features.
        k: input features.
        threads: threads a contestant may use.
        cold: the weights come from memory each time.
    """

    m: int
    n: int
    k: int
    threads: int
    cold: bool

    @property
    def products(self) -> int:
        """Multiply-accumulates of one product."""
        return self.m * self.n * self.k

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes of weights a walk goes over."""
        return -(-COLD_BYTES // nbytes) if self.cold else 1

    def chunks(self, copies: int) -> list[int]:
        """How many copies each call handles where a call is dear: all at once where products are short."""
        return [copies] if self.m == 1 else [1] * copies

    def __str__(self) -> str:
        place = "cold" if self.cold else "in cache"
        return f"M={self.m} N={self.n} K={self.k}, {place}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Prepared:
    """A contestant at the start.

    Attributes:
        steps: taken in turn, over and over.
        products: products that one step computes.
        nbytes: bytes of weights and scales that one product reads.
        bits: the same in bits a weight.
        macs: multiply-accumulates of one product; 0 is the setting's own.
        result: the last product's output, float32 [m, n]; None where there is nothing to look at.
    """

    steps: Sequence[Step]
    products: int
    nbytes: int
    bits: float
    macs: float = 0
    result: Callable[[], NDArray[np.float32]] | None = None


class Contestant(Protocol):
    """A contestant.

    Attributes:
        name: unique among the contestants.
        ours: one of hikui's.
    """

    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    def prepare(self, workload: Workload) -> Prepared:
        """Makes operands and everything that is not timed.

        Raises:
            UnavailableError: it cannot do this.
        """
        ...


def width(bits: float) -> int:
    """The class of weights among which contestants are compared: 1 (to 1.8 bits), 2, 3, 4 or 8."""
    return next((value for value, most in ((1, 1.8), (2, 2.8), (3, 3.8), (4, 5.0)) if bits < most), 8)


def activations(workload: Workload) -> NDArray[np.float32]:
    """Normal values, float32 [m, k]; the same for all contestants."""
    return np.random.default_rng(0).standard_normal((workload.m, workload.k), np.float32)


def random_bytes(shape: tuple[int, ...], count: int) -> NDArray[np.uint8]:
    """`count` copies of random bytes, uint8 [count, *shape], that differ so that no library takes two for one."""
    one = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    many = np.repeat(one[np.newaxis], count, axis=0)
    many.reshape(count, -1)[:, 0] = np.arange(count) % 256
    return many

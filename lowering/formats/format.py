"""The name of a weight format, its sizes, and the bits that it truly takes."""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from hikui.lowering.errors import UsageError
from hikui.lowering.formats.kinds import KINDS

ROWS = 16
"""Output rows in a block of the packed layout."""

SUM_WIDTH = 32
"""Input columns that share one entry of an activation's `sums`; every group is a multiple of it."""

ACTIVATION_PADDING = 128
"""Quantised activations are padded to this many columns."""

LEAST_SCALE = 2.0**-22
"""Below it a float16 scale is no more than three steps of 2⁻²⁴ above zero.

Chosen by measurement: with the feed-forward matrices of `stories260k` a power of two smaller and the norm before them
as much larger, int8 scales of four steps cost nothing, those of one step .01 nats a token, and below that the model is
gone.
"""

GROUPS = (32, 64, 128)
"""The usual groups: what `mixed` takes, and what is tried where a group is searched."""

WIDEST_GROUP = 256

WIDEST_TERNARY = 32768
"""Columns that kernels add up under one scale of `ternary`: their sums of 32 bits hold 256 times the result."""

MIXED = "mixed"
FACTORS = "factors"
FLOAT_DTYPES = {"float16": torch.float16, "float32": torch.float32}

MOST_FACTORS = 4.0
"""Bits per weight that factors may take: from three on, rounded integers have less error in fewer bits."""

RANK_STEP = 32
"""Columns of a matrix of signs are padded to so many, so a rank between two would store what nothing reads."""

_PATTERN = re.compile(
    rf"({'|'.join(KINDS)})-(?:g(\d+)|channel)|({MIXED})-g(\d+)-c(\d+)|({'|'.join(FLOAT_DTYPES)})"
    rf"|({FACTORS})-(?:r(\d+)|(\d{{1,2}}(?:\.\d{{1,6}})?))",
    re.ASCII,
)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def activation_k(k: int) -> int:
    """Columns of a quantised activation of k values."""
    return round_up(k, ACTIVATION_PADDING)


def is_group(group: int) -> bool:
    """Whether so many columns may share a scale."""
    return 0 < group <= WIDEST_GROUP and group % SUM_WIDTH == 0


@cache
def fitting_group(group: int, k: int) -> int:
    """The group that K columns are cut into where `group` is asked for.

    The group itself where it divides K, which is first rounded up to a multiple of 32; else the nearest multiple of 32
    above its half and up to one and a half of it that does, of two alike the smaller, so that nothing is padded. Where
    there is none, 32, 64 and 128 pad K to whole groups. Others would pad it beyond the columns of a quantised
    activation, which are multiples of 128: they take what suits the fewest columns up to these.
    """
    whole = round_up(k, SUM_WIDTH)
    padding = ACTIVATION_PADDING % group == 0
    for width in range(whole, whole + 1 if padding else activation_k(k) + 1, SUM_WIDTH):
        near = range(round_up(group // 2 + 1, SUM_WIDTH), group + group // 2 + 1, SUM_WIDTH)
        fitting = [size for size in near if width % size == 0]
        if fitting:
            return min(fitting, key=lambda size: (abs(size - group), size))
    return group if padding else ACTIVATION_PADDING


class Segment(NamedTuple):
    """Columns `start`…`stop`−1 of a matrix, all of one format."""

    format: "Format"
    start: int
    stop: int


@dataclass(frozen=True)
class Format:
    """Integer codes with a scale for each group of columns, plain floats, or two factors of signs.

    Attributes:
        kind: a key of `KINDS`, `mixed`, `factors`, `float16` or `float32`.
        group: input columns that share a scale, a multiple of 32; None is one scale a row (and the only value for
            floats). A matrix whose columns it does not divide may be cut into others: see `group_size`.
        columns: for `mixed`, how many leading columns are `int4`; the others are `sign`. Which columns lead is the
            affair of whoever permutes them. For `factors`, their rank, where it is given instead of a rate.
        rate: for `factors`, the bits a weight, all scales counted, that their rank is the largest for. A site has this
            format until two products with matrices of signs, each of a format of its own, take its place.
    """

    kind: str
    group: int | None = None
    columns: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, MIXED, FACTORS, *FLOAT_DTYPES):
            known = ", ".join([*KINDS, MIXED, FACTORS, *FLOAT_DTYPES])
            raise UsageError(f"Format '{self.kind}' is not known; the formats are {known}.")
        groups = ", ".join(map(str, GROUPS))
        if self.is_factors:
            self._check_factors()
        elif self.rate is not None:
            raise UsageError(f"Format '{self.kind}' has its bits of itself; only 'factors' takes a number of them.")
        elif self.is_mixed:
            if self.group not in GROUPS:
                raise UsageError(f"Format 'mixed' cannot have a group of {self.group}; it takes {groups}.")
            if not self.columns or self.columns < 0 or self.columns % self.group:
                raise UsageError(
                    f"Format 'mixed' cannot have {self.columns} int4 columns; it takes a multiple of its group "
                    f"{self.group}, at least one."
                )
        elif self.columns is not None:
            raise UsageError(f"Format '{self.kind}' stores all columns alike; only 'mixed' takes a number of them.")
        elif self.group is not None and (not self.is_integer or not is_group(self.group)):
            raise UsageError(
                f"Format '{self.kind}' cannot have a group of {self.group}; integer formats take {groups}, another "
                f"multiple of {SUM_WIDTH} up to {WIDEST_GROUP}, or channel, float formats take none."
            )

    def _check_factors(self) -> None:
        if self.group is not None or (self.rate is None) == (self.columns is None):
            raise UsageError("Format 'factors' takes either a rank or bits per weight, and no group.")
        if self.rate is not None and not 0 < self.rate <= MOST_FACTORS:
            raise UsageError(
                f"Format 'factors' cannot take {self.rate:g} bits per weight; it takes up to {MOST_FACTORS:g}."
            )
        if self.columns is not None and (self.columns < 1 or self.columns % RANK_STEP):
            raise UsageError(
                f"Format 'factors' cannot have a rank of {self.columns}; it takes a multiple of {RANK_STEP}."
            )

    @staticmethod
    def parse(text: str) -> "Format":
        """Reads `int4-g64`, `sign-channel`, `nf4-g32`, `mixed-g128-c768`, `factors-1.6`, `float16`, …

        Raises:
            UsageError: the text names no format.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"Format '{text}' is not known; write for example int4-g64, int8-g128, int4-channel, sign-g128, "
                "ternary-g64, nf4-g64, mixed-g128-c768, factors-1.6, float16 or float32."
            )
        plain, group, mixed, mixed_group, columns, floating, factors, rank, rate = match.groups()
        if factors:
            return Format(factors, columns=int(rank)) if rank else Format(factors, rate=float(rate))
        if mixed:
            return Format(mixed, int(mixed_group), int(columns))
        return Format(plain or floating, int(group) if group else None)

    def __str__(self) -> str:
        if self.is_factors:
            return f"{self.kind}-{self.rate:g}" if self.columns is None else f"{self.kind}-r{self.columns}"
        if not self.is_integer:
            return self.kind
        if self.is_mixed:
            return f"{self.kind}-g{self.group}-c{self.columns}"
        return f"{self.kind}-channel" if self.group is None else f"{self.kind}-g{self.group}"

    @property
    def is_integer(self) -> bool:
        """Whether weights are integer codes (of a codebook also) with scales."""
        return self.kind not in (FACTORS, *FLOAT_DTYPES)

    @property
    def is_factors(self) -> bool:
        """Whether two matrices of signs are to stand for the matrix."""
        return self.kind == FACTORS

    @property
    def is_mixed(self) -> bool:
        return self.kind == MIXED

    @property
    def is_plain(self) -> bool:
        """Whether it is of one matrix, all of whose columns are stored alike."""
        return not self.is_mixed and not self.is_factors

    @property
    def bits(self) -> int:
        """Bits of one stored value (the widest, for `mixed`), without scales and padding."""
        if self.is_factors:
            return 1
        if not self.is_integer:
            return FLOAT_DTYPES[self.kind].itemsize * 8
        return KINDS["int4" if self.is_mixed else self.kind].bits

    @property
    def levels(self) -> tuple[int, ...]:
        """Every value that a code can have, ascending; for `mixed` those of its int4 columns.

        Raises:
            ValueError: a float format, which has no codes.
        """
        if not self.is_integer:
            raise ValueError(f"{self} has no codes")
        return KINDS["int4" if self.is_mixed else self.kind].levels

    @property
    def weight_dtype(self) -> torch.dtype:
        if self.is_factors:
            return torch.uint8
        if not self.is_integer:
            return FLOAT_DTYPES[self.kind]
        return torch.uint8 if self.is_mixed else KINDS[self.kind].dtype

    def segments(self, k: int) -> tuple[Segment, ...]:
        """The runs of columns stored alike: one, but two for `mixed`. `k` may be the padded number of columns.

        Raises:
            UsageError: `mixed` wants more int4 columns than there are, `ternary` has more under a scale than kernels
                add up, or the format is of two matrices.
        """
        if self.is_factors:
            raise UsageError(f"Format '{self}' is of two matrices, which are stored as '{SIGNS}' each.")
        if self.kind == "ternary" and self.group is None and k > WIDEST_TERNARY:
            raise UsageError(
                f"Format '{self}' adds up {WIDEST_TERNARY} columns at most, and the matrix has {k}; take ternary-g256."
            )
        if not self.is_mixed:
            return (Segment(self, 0, k),)
        assert self.columns is not None
        if self.columns > k:
            raise UsageError(f"Format '{self}' has more int4 columns than the matrix has columns, {k}.")
        ends = ((Format("int4", self.group), 0, self.columns), (Format("sign", self.group), self.columns, k))
        return tuple(Segment(*end) for end in ends if end[1] < end[2])

    def group_size(self, k: int) -> int:
        """Columns in a group for a matrix of k input columns.

        A group above k becomes the channel, and one that does not divide k a nearby one that does, as `fitting_group`
        finds it. For `mixed` it is the group, whatever k.
        """
        if self.is_mixed:
            assert self.group is not None
            return self.group
        if self.group is None or self.group > k:
            return round_up(k, SUM_WIDTH)
        return fitting_group(self.group, k)

    def padded_k(self, k: int) -> int:
        """Columns stored: whole groups, for `mixed` as many as the activation has once quantised."""
        if self.is_mixed:
            return activation_k(k)
        return round_up(k, self.group_size(k)) if self.is_integer else k

    def groups(self, k: int) -> int:
        return self.padded_k(k) // self.group_size(k)

    def stored_columns(self, lines: int, groups: int) -> int:
        """Columns, padding included, of an integer format's weight with so many lines and groups (second dimensions).

        Where there are no such columns, others, to whose `weight_shape` the lines do not fit.
        """
        if self.is_mixed:
            assert self.columns is not None
            return SUM_WIDTH * lines - 3 * self.columns
        return groups * KINDS[self.kind].columns_of(lines // groups) if groups else 0

    def weight_shape(self, n: int, k: int) -> tuple[int, ...]:
        blocks = -(-n // ROWS)
        self.segments(k)  # Says so where the format does not fit.
        if not self.is_integer:
            return (blocks, k, ROWS)
        if self.is_mixed:
            assert self.columns is not None
            return (blocks, (self.padded_k(k) + 3 * self.columns) // SUM_WIDTH, ROWS, 4)
        return (blocks, self.groups(k) * KINDS[self.kind].lines_of(self.group_size(k)), ROWS, 4)

    def scale_shape(self, n: int, k: int) -> tuple[int, ...] | None:
        return (-(-n // ROWS), self.groups(k), ROWS) if self.is_integer else None

    def rank(self, n: int, k: int) -> int:
        """Of the factors of an n×k matrix: as given, or the largest multiple of 32 that the rate allows.

        It is at least 32, even where that takes more bits.

        Raises:
            UsageError: a rank was given that takes more bits than factors may.
        """
        if self.columns is None:
            assert self.rate is not None, "factors have a rank or a rate"
            return _largest_rank(n, k, self.rate)
        if self.columns > (most := _largest_rank(n, k, MOST_FACTORS)):
            raise UsageError(
                f"Format '{self}' takes more than {MOST_FACTORS:g} bits for each weight of a matrix of {n}×{k}; its "
                f"rank is {most} at most."
            )
        return self.columns

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix, or of both factors, scales and padding counted."""
        if self.is_factors:
            return _factor_nbytes(n, k, self.rank(n, k))
        weight = torch.Size(self.weight_shape(n, k)).numel() * self.weight_dtype.itemsize
        scale = self.scale_shape(n, k)
        return weight + (torch.Size(scale).numel() * torch.float16.itemsize if scale else 0)

    def permutation_nbytes(self, k: int) -> int:
        """Bytes of the order of the columns, which `mixed` needs once for all sites that read an activation."""
        return k * torch.int32.itemsize if self.is_mixed else 0

    def true_bits(self, n: int, k: int) -> float:
        """Bits per weight of an n×k matrix that stands alone; scales, padding and a permutation counted."""
        return 8 * (self.nbytes(n, k) + self.permutation_nbytes(k)) / (n * k)

    def notes(self, n: int, k: int) -> list[str]:
        """What a reader of the report should know of this format on an n×k matrix."""
        out = []
        if self.is_factors:
            return [f"rank {self.rank(n, k)}, {self.true_bits(n, k):.3f} bits per weight"]
        size = self.group_size(k) if self.is_integer else None
        if self.group is not None and not self.is_mixed and self.group > k:
            out.append(f"group {self.group} is wider than K={k}: one group for the whole channel")
        elif size is not None:
            if self.group not in (None, size):
                out.append(f"groups of {size} columns instead of {self.group}, which does not divide K={k}")
            if self.padded_k(k) != k:
                filled = ACTIVATION_PADDING if self.is_mixed else size
                out.append(f"K={k} is padded to {self.padded_k(k)} to fill the last group of {filled}")
        if n % ROWS:
            out.append(f"N={n} is padded to {round_up(n, ROWS)} rows")
        return out


SIGNS = Format("sign")
"""Of either of two factors."""


def _largest_rank(n: int, k: int, rate: float) -> int:
    # Linear in the rank: two of them say how many bytes a step takes.
    first, second = (_factor_nbytes(n, k, rank) for rank in (RANK_STEP, 2 * RANK_STEP))
    return RANK_STEP * max(1, 1 + math.floor((rate * n * k / 8 - first) / (second - first)))


def _factor_nbytes(n: int, k: int, rank: int) -> int:
    """Bytes of the factors of an n×k matrix: of both, their scales, and those of the columns, which are float32."""
    return SIGNS.nbytes(n, rank) + SIGNS.nbytes(rank, k) + torch.float32.itemsize * k

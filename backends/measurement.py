"""Random operands for timing products, and the timing of `hikui bench`; the benchmarks share the operands."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hikui.backends.kernels.standalone import Call, Library
from hikui.lowering.formats import ROWS, Format, Packed, activation_k, pack

GROUP = 128
_MIXED_SHARE = 0.19
"""Of a mixed matrix's columns, what 1.6 bits a weight leave for int4."""

_WALK_BYTES = 64_000_000
"""Copies of the weights that `measure` walks over; more than the caches of boards and of most desktop CPUs."""

_SECONDS = 0.05
_LEAST_TIMES = 4
ROWS_OF_SIZE = {"single": 1, "few": 8, "many": 64}
"""Rows of activations that stand for each class of the library's kernels."""

Step = Callable[[], object]


def format_of(kind: str, k: int, group: int = GROUP) -> Format:
    """The format of a kind, with as many int4 columns as make 1.6 bits where it is `mixed`."""
    if kind != "mixed":
        return Format(kind, group)
    return Format.parse(f"mixed-g{group}-c{max(1, round(_MIXED_SHARE * k / group)) * group}")


@dataclass(frozen=True)
class Operands:
    """Activations in both forms, copies of a packed weight, a branch that they share, and room for the result.

    Attributes:
        x: float32 [m, k].
        quantised: int8 [m, Kq], float32 [m], int32 [m, Kq/32]; filled by `quantise`.
        weights: each in memory of its own.
        branch: the packed factors of a low-rank branch, float16; None without one.
        y: float32 [m, n].
    """

    fmt: Format
    x: Tensor
    quantised: tuple[Tensor, Tensor, Tensor]
    weights: tuple[Packed, ...]
    branch: tuple[Tensor, Tensor] | None
    y: Tensor

    @staticmethod
    def random(fmt: Format, m: int, n: int, k: int, copies: int, rank: int = 0) -> "Operands":
        """Operands whose rows of weights repeat every 16: a kernel does not care, and packing takes no time.

        Args:
            fmt: an integer format.
            m: rows of activations.
            n: output features, a multiple of 16.
            k: input features.
            copies: how many weights.
            rank: of the branch; 0 for none.
        """
        generator = torch.Generator().manual_seed(0)
        parts = []
        for start, stop, levels in ((p.start, p.stop, torch.tensor(p.format.levels)) for p in fmt.segments(k)):
            parts.append(levels[torch.randint(len(levels), (ROWS, stop - start), generator=generator)])
        scale = torch.full((ROWS, fmt.groups(k)), 2.0**-7)
        block = pack(fmt, torch.cat(parts, dim=1), scale)
        assert block.scale is not None
        one = Packed(*(part.repeat(n // ROWS, 1, *[1] * (part.dim() - 2)) for part in block if part is not None))
        assert one.scale is not None
        branch = None
        if rank:
            half, shapes = Format("float16"), ((rank, k), (n, rank))
            a, b = (pack(half, torch.randn(shape, generator=generator) * 0.01) for shape in shapes)
            branch = (a.weight, b.weight)
        padded = activation_k(k)
        quantised = (
            torch.empty(m, padded, dtype=torch.int8), torch.empty(m), torch.empty(m, padded // 32, dtype=torch.int32),
        )  # fmt: skip
        weights = (one, *(Packed(one.weight.clone(), one.scale.clone()) for _ in range(copies - 1)))
        return Operands(fmt, torch.randn(m, k, generator=generator), quantised, weights, branch, torch.empty(m, n))

    def quantise(self, library: Library) -> Step:
        """The quantisation of the activations."""
        return partial(library.run, "hikui_quantize_activation", Call(self.x, *self.quantised))

    def products(self, library: Library, *, fused: bool = False) -> list[Step]:
        """One product for each weight; fused: with the branch in the same call."""
        name = f"hikui_linear_a8_{'branch_' if fused else ''}{self.fmt.kind}"
        branch = (self.x, *self.branch) if fused and self.branch else ()
        steps: list[Step] = []
        for packed in self.weights:
            assert packed.scale is not None
            call = Call(*self.quantised, packed.weight, packed.scale, torch.empty(0), *branch, self.y)
            steps.append(partial(library.run, name, call))
        return steps

    def separate_branch(self, library: Library) -> list[Step]:
        """A x, B t and the sum, as calls of their own."""
        assert self.branch is not None
        a, b = self.branch
        rank = a.shape[0] * ROWS
        inner, outer, none = torch.empty(len(self.x), rank), torch.empty_like(self.y), torch.empty(0)
        return [
            partial(library.run, "hikui_linear_float16", Call(self.x, a, none, inner)),
            partial(library.run, "hikui_linear_float16", Call(inner, b, none, outer)),
            partial(torch.add, self.y, outer, out=self.y),
        ]


@dataclass(frozen=True)
class KernelUse:
    """Which kernel stands for a kind of weights and a class of rows on this CPU, as the library itself says."""

    kind: str
    size: str
    kernel: str


def describe(library: Library) -> list[KernelUse]:
    """What a library of kernels says of itself; it picks the instruction set first."""
    return [KernelUse(kind, size, kernel) for (kind, size), kernel in library.describe().items()]


@dataclass(frozen=True)
class Timing:
    """The speed of one kernel on one thread, without the quantisation of the activations.

    Attributes:
        format: of the weights.
        m: rows of activations.
        gmacs: 10⁹ multiply-accumulates a second.
        gbs: 10⁹ bytes of weights and scales a second.
        kernel: what the library uses here.
    """

    format: str
    m: int
    gmacs: float
    gbs: float
    kernel: str


def measure(library: Library, use: KernelUse, n: int, k: int) -> Timing:
    """Times a kernel with weights that come from memory.

    Args:
        library: the kernels.
        use: what to time.
        n: output features, a multiple of 16.
        k: input features.
    """
    fmt, m = format_of(use.kind, k), ROWS_OF_SIZE[use.size]
    nbytes = fmt.nbytes(n, k)
    operands = Operands.random(fmt, m, n, k, copies=-(-_WALK_BYTES // nbytes))
    operands.quantise(library)()
    steps = operands.products(library)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < _LEAST_TIMES or time.perf_counter() - begun < _SECONDS:
        step = steps[len(times) % len(steps)]
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    # The first pages are mapped and the clock rises in the first call.
    seconds = statistics.median(times[1:])
    return Timing(str(fmt), m, round(m * n * k / seconds / 1e9, 2), round(nbytes / seconds / 1e9, 2), use.kernel)

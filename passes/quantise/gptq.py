"""GPTQ: rounds a matrix column by column, each time making up in the columns to come for what was lost.

Frantar et al., 2022 (arXiv 2210.17323). With H = E[x·xᵀ] + λI = U·Uᵀ, U upper triangular, the error E‖(W−Q)x‖² is
Σ_k (U_kk·e_k + Σ_{j<k} U_jk·e_j)² a row, e = w − q, so the best target for column k, given the columns before it, is
w_k + Σ_{j<k} e_j·U_jk / U_kk. This needs one factor and no inverse (Chee et al., QuIP, 2023, section 4, show that it is
the same as GPTQ's update by the rows of the Cholesky factor of H⁻¹).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import WIDEST_GROUP, Format
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.passes.measure import linalg
from hikui.passes.measure.evidence import Evidence
from hikui.passes.quantise.descent import descend
from hikui.passes.quantise.quantiser import Quantiser
from hikui.passes.quantise.rounding import Rounded, column_groups, dequantise, inverse, nearest, round_matrix

_BLOCK = 128
"""Columns whose errors are applied to all later ones at once."""

_STRIP = 32
"""Columns of these whose errors are applied at once to those behind them in the block."""


class Factor(NamedTuple):
    """What tied sites share: U of H with its columns in the order in which they are rounded.

    Attributes:
        upper: float64 [k, k]; what lies below the diagonal is not to be read.
        order: int64 [k], or None where it is the columns' own.
        importance: float32 [k], the diagonal of H in the columns' own order.
        hessian: H itself, float32 [k, k] in the columns' own order, where sweeps are to follow.
        signs_first: the same with the columns that become signs before all others, those with the smallest activations
            first, where these are to be rounded in two stages.
    """

    upper: Tensor
    order: Tensor | None
    importance: Tensor
    hessian: Tensor | None = None
    signs_first: "Factor | None" = None


@dataclass(frozen=True)
class Gptq(Quantiser[Factor]):
    """Rounds sites with error compensation, in the order of the model, on what the quantised blocks before give them.

    Attributes:
        act_order: round the columns with the largest activations first. The scales are then chosen beforehand for all
            groups; without it each group's scale is chosen when its turn comes.
        damping: λ over the mean of H's diagonal; raised tenfold as often as the factorisation needs it.
        clip: how scales are chosen, as in `rtn`.
        weighted: weigh a column's error by its mean square activation when scales are chosen.
        sweeps: afterwards refit the scales in closed form and look at every code once more, so many times (`descent`).
        inputs: `quantised` measures each site behind the quantised blocks; `float` in the float model (after
            Squeeze10's full-information supervision).
        staged: round sites of a mixed format to int4 throughout first, and from there, column by column, those that
            become signs, the int4 ones making up for them at the end (after Squeeze10); otherwise all columns are
            rounded once, from the float weights.
    """

    name: ClassVar[str] = "gptq"
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    # A column of more rows is more work for each of many small steps.
    times: ClassVar[int] = 2
    act_order: bool = True
    damping: float = 0.01
    clip: Literal["mse", "minmax"] = "mse"
    weighted: bool = False
    sweeps: int = 0
    inputs: Literal["quantised", "float"] = "quantised"
    staged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise UsageError(f"gptq cannot be damped by {self.damping:g}; damping is above 0.")
        if self.sweeps < 0:
            raise UsageError(f"gptq cannot take {self.sweeps} sweeps; give 0 or more.")

    @property
    def reads_float(self) -> bool:
        """Whether H is that of the float model."""
        return self.inputs == "float"

    @property
    def spare_matrices(self) -> int:
        """The copy of H in another order, the one for sweeps (float32, counted as float64), and what stages take."""
        return int(self.act_order) + bool(self.sweeps) + 2 * self.staged

    def requires(self, program: Program) -> None:
        """Raises HikuiError as every quantiser, and where `qep` asks for what the float model cannot give."""
        super().requires(program)
        marked = [node for node in self.chosen(program) if CORRECTION in node.meta]
        if self.reads_float and marked:
            raise HikuiError(
                f"`qep` asks for {marked[0].meta[SITE]} to be corrected for the errors of the layers before it, of "
                "which there are none in the float model; leave out `qep`, or inputs=float."
            )

    def wants(self) -> frozenset[str]:
        """The Gram matrix."""
        return frozenset({"gram"})

    def prepare(self, evidence: Evidence, workers: Workers, fmt: Format) -> Factor:
        """Factors the Gram matrix."""
        assert evidence.gram is not None, "it was asked for"
        diagonal = evidence.gram.diagonal().clone()
        order = torch.sort(diagonal, descending=True, stable=True).indices if self.act_order else None
        hessian = evidence.gram.float() if self.sweeps else None
        staged = None
        if self.staged and fmt.columns is not None:
            small = torch.sort(diagonal[fmt.columns :], stable=True).indices + fmt.columns
            signs_first = torch.cat((small, torch.arange(fmt.columns)))
            upper = linalg.permuted(evidence.gram, signs_first)
            linalg.factor_upper(upper, self.damping, workers)
            staged = Factor(upper, signs_first, diagonal.float())
        gram = evidence.take_gram(order)
        damping = linalg.factor_upper(gram, self.damping, workers)
        if hessian is not None:
            mean = float(diagonal.mean())
            hessian.diagonal().add_(damping * (mean if mean > 0 else 1.0))
        return Factor(gram, order, diagonal.float(), hessian, staged)

    def quantise(self, weight: Tensor, fmt: Format, prepared: Factor) -> Rounded:
        """Rounds some rows; see `Rounder.quantise`."""
        importance = prepared.importance if self.weighted else None
        if prepared.signs_first is None:
            rounded = compensate(weight, fmt, prepared, self.clip, importance)
        else:
            buffer = Format("int4", fmt.group)
            start = dequantise(compensate(weight, buffer, prepared, self.clip, importance), buffer)
            rounded = compensate(start, fmt, prepared.signs_first, self.clip, importance)
        if prepared.hessian is None:
            return rounded
        return descend(weight, rounded, fmt, prepared.hessian, self.sweeps)


def compensate(weight: Tensor, fmt: Format, factor: Factor, clip: str, importance: Tensor | None = None) -> Rounded:
    """Rounds rows column by column with the factor of H.

    Args:
        weight: float32 [n, k].
        fmt: an integer format.
        factor: of H.
        clip: how scales are chosen.
        importance: float32 [k] for the choice of scales.

    Returns:
        Codes and scales in the columns' own order.

    Raises:
        OverflowError: a scale does not fit float16.
    """
    n, k = weight.shape
    scales = _Scales(weight, fmt, clip, importance, beforehand=factor.order is not None)
    order = torch.arange(k) if factor.order is None else factor.order
    # In float32, as the weights are: further digits of a target tell only where it lies in the middle of two codes.
    # Transposed, so that a column is a run of memory: what each column is to be, and once it is rounded, what it lacks.
    left = weight.t().contiguous()[order]
    codes = torch.empty(k, n, dtype=torch.int8)
    positions, pivots = order.tolist(), factor.upper.diagonal().tolist()
    for start, stop in _parts(k, scales.starts, own_order=factor.order is None):
        panel = factor.upper[:stop, start:stop].float()
        corner = panel[start:]
        carried = panel[:start].t() @ left[:start]
        if factor.order is None:
            # What GPTQ would have made of these columns by now: their best values, given all errors before them.
            updated = left[start:stop] + torch.linalg.solve_triangular(corner.t(), carried, upper=False)
            scales.meet(start, stop, updated.t().contiguous())
        for first in range(0, stop - start, _STRIP):
            last = min(first + _STRIP, stop - start)
            done = left[start + first : start + last]
            for at in range(first, last):
                position = positions[start + at]
                scale, reciprocal, kind = scales.of(position)
                target = torch.addmv(carried[at], done[: at - first].t(), corner[first:at, at])
                target.mul_(1 / pivots[start + at]).add_(done[at - first])
                code = nearest(target.mul_(reciprocal), kind)
                codes[position] = code
                done[at - first] -= code.mul_(scale)
            carried[last:].addmm_(corner[first:last, last:].t(), done)
    return Rounded(codes.t().contiguous(), scales.table.t().contiguous())


def _parts(k: int, starts: list[int], *, own_order: bool) -> list[tuple[int, int]]:
    """Blocks of columns; in their own order none crosses the start of a group, nor cuts one whose scale is met."""
    cuts = {*range(0, k, _BLOCK), k}
    if own_order:
        cuts |= {start for start in starts if start < k}
        for start, stop in pairwise([*starts, k]):
            if stop - start <= WIDEST_GROUP:
                cuts -= set(range(start + 1, stop))
    ends = sorted(cuts)
    return list(pairwise(ends))


class _Scales:
    """The scale of each group: chosen beforehand for all of them, or when a group's first column is met."""

    def __init__(self, weight: Tensor, fmt: Format, clip: str, importance: Tensor | None, *, beforehand: bool) -> None:
        n, k = weight.shape
        self._clip, self._importance, self._k = clip, importance, k
        self._groups = list(column_groups(fmt, k))
        self.starts = [own.start for _, own in self._groups]
        self.table = torch.zeros(len(self._groups), n)
        self._inverse = torch.zeros_like(self.table)
        widths = [own.stop - own.start for _, own in self._groups]
        self._group_of = [index for index, width in enumerate(widths) for _ in range(width)]
        self._beforehand = {index for index, width in enumerate(widths) if beforehand or width > WIDEST_GROUP}
        for index in sorted(self._beforehand):
            if widths[index]:
                self._choose(index, weight[:, self._groups[index][1]])

    def meet(self, start: int, stop: int, updated: Tensor) -> None:
        """Chooses the scale of the groups that begin in these columns, from what became of them: [n, stop−start]."""
        for index, (_, own) in enumerate(self._groups):
            if start <= own.start < stop and index not in self._beforehand:
                self._choose(index, updated[:, own.start - start : own.stop - start])

    def _choose(self, index: int, columns: Tensor) -> None:
        kind, own = self._groups[index]
        importance = None if self._importance is None else self._importance[own]
        rounded = round_matrix(columns, Format(kind), self._clip, importance)
        self.table[index] = rounded.scale[:, 0]
        self._inverse[index] = inverse(self.table[index])

    def of(self, column: int) -> tuple[Tensor, Tensor, str]:
        """(scale float32 [n], its inverse, kind) of a column."""
        index = self._group_of[column]
        return self.table[index], self._inverse[index], self._groups[index][0]

"""Refuses a packed matrix whose scales, or values, are too small for float16.

Float16 holds multiples of 2⁻²⁴, and nothing below. A model may lie there and be as good as any: a norm's weight may be
large and the matrix behind it small. Rounded as they are, such weights vanish without a sound.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import LEAST_SCALE, ROWS, unpack_scale
from hikui.lowering.ir.float_matrix import float_and_packed_rows
from hikui.lowering.ir.packed import PackedEmbedding, PackedLinear, is_packed_embedding
from hikui.lowering.ir.program import Program

LOST_SHARE = 0.01
"""Share of a matrix's squared weights in groups whose scale is lost, from which on it is refused; a row that was never
trained is less."""

_FLOAT_ERROR = 1e-5
"""Squared error of the weights below float16's normal numbers, over all squares; usual rounding takes 1e-7."""


def refuse_underflow(program: Program, node: fx.Node, key: str, site: str) -> None:
    """Compares a matrix that was just packed with its floats, where float16 may have been too coarse for it.

    Args:
        program: holds both.
        node: the packed product, or the look-up.
        key: the store key of the float matrix [n, k].
        site: for the sentence.

    Raises:
        HikuiError: what float16 lost is more than rounding may lose.
    """
    looked_up = is_packed_embedding(node)
    what = "Embedding" if looked_up else "Site"
    packed = PackedEmbedding.of(node) if looked_up else PackedLinear.of(node)
    if packed.format.is_integer:
        share, largest = _lost_share(program, packed, key)
        if share > LOST_SHARE:
            remedy = (
                "let `embedding` take format=float32"
                if looked_up
                else "leave it out with skip, or choose a format of fewer bits, whose scales are larger"
            )
            raise HikuiError(
                f"{what} {site}: its weights are so small (the largest lost one is {largest:.3g}) that float16 holds "
                f"no scale of {packed.format} for {100 * share:.0f} % of it; {remedy}."
            )
    elif packed.format.kind == "float16":
        error, total, largest, start = 0.0, 0.0, 0.0, 0
        # Its columns stand as they are stored: a branch's factor may read a permuted activation.
        for held in packed.dense_rows(program.store):
            rows = program.store.load_rows(key, start, start + held.shape[0]).float()
            start += held.shape[0]
            small = rows.abs() < torch.finfo(torch.float16).tiny
            error += float((rows.double() - held.double())[small].square().sum())
            total += float(rows.double().square().sum())
            largest = max(largest, float(rows.abs().max()))
        if error > _FLOAT_ERROR * total:
            raise HikuiError(
                f"{what} {site}: its weights are so small (the largest is {largest:.3g}) that float16 does not hold "
                "them; pack it as float32."
            )


def _lost_share(program: Program, packed: PackedLinear | PackedEmbedding, key: str) -> tuple[float, float]:
    """Share of the squared weights that lies in groups whose scale is lost, and the largest of them."""
    assert packed.scale is not None, "integer formats have scales"
    stored = program.store.load(Program.weight_of(packed.scale))
    k, fmt = packed.columns, packed.format
    if not bool((stored.float().abs() < LEAST_SCALE).any()):
        return 0.0, 0.0
    lost = total = largest = 0.0
    start = 0
    for rows, _ in float_and_packed_rows(program, packed.node, program.store, key):
        count = rows.shape[0]
        scale = unpack_scale(fmt, stored[start // ROWS : -(-(start + count) // ROWS)], count, k)
        start += count
        weights = _lost_weights(rows, scale, fmt.group_size(k))
        lost += float(weights.square().sum())
        largest = max(largest, float(weights.abs().max()))
        total += float(rows.double().square().sum())
    return (lost / total if total else 0.0), largest


def _lost_weights(rows: Tensor, scale: Tensor, group: int) -> Tensor:
    """The weights whose scale is lost, the others zero: float64 [n, groups, group]."""
    n, groups = scale.shape
    grouped = F.pad(rows, (0, groups * group - rows.shape[1])).view(n, groups, group).double()
    return torch.where((scale.abs() < LEAST_SCALE).unsqueeze(-1), grouped, 0.0)

"""Large stored matrices, some rows at a time."""

from torch import Tensor, fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import ROWS
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import WeightStore

PART = 1 << 22
"""Weights worked on at a time: the head of a large vocabulary takes a gigabyte in float32 alone."""


def load_finite(program: Program, weight: fx.Node, site: str, rows: slice | None = None) -> Tensor:
    """A float32 matrix of the store, or some of its rows.

    Raises:
        HikuiError: it holds NaN or infinite values.
    """
    return finite_rows(program.store, program.weight_of(weight), site, rows)


def finite_rows(store: WeightStore, key: str, site: str, rows: slice | None = None) -> Tensor:
    """A float32 matrix of a store, or some of its rows; see `load_finite`."""
    tensor = (store.load(key) if rows is None else store.load_rows(key, rows.start, rows.stop)).float()
    bad = int(tensor.numel() - tensor.isfinite().sum())
    if bad:
        raise HikuiError(
            f"Site {site}: {bad} of {tensor.numel()} values of '{key}' are NaN or infinite; "
            "mend or replace the checkpoint."
        )
    return tensor


def row_parts(n: int, k: int, times: int = 1) -> list[slice]:
    """The rows of an [n, k] matrix in parts of whole blocks of the packed layout, small enough to be worked on at once.

    Args:
        n: rows.
        k: columns.
        times: how many of the usual parts make one.
    """
    step = max(1, times * PART // (max(1, k) * ROWS)) * ROWS
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]

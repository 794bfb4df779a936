"""The table of kernels: which there are, and under which symbol."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from hikui.lowering import formats

KINDS = (*formats.KINDS, formats.MIXED)
"""Low-bit weights that there are kernels for."""

DENSE = ("float16", "float32")
"""Float weights that there are kernels for."""

INTEGER_ROWS = (1, 4, 8)
FLOAT_ROWS = (1, 4)
"""Rows of activations that a kernel computes at once: one kernel for each, more rows take more blocks of threads."""

QUANTIZERS = {"": (127, False), "_int4": (7, False), "_static": (127, True)}
"""What is appended to `hikui_quantize_activation`: the largest code, and whether the step is given."""


def integer_symbol(kind: str, rows: int) -> str:
    """The product of a kind of weights with quantised activations."""
    return f"hikui_linear_a8_{kind}_m{rows}"


def weight_only_symbol(kind: str, dtype: str, rows: int) -> str:
    """The product of a kind of weights with float activations of that dtype."""
    return f"hikui_linear_{kind}_{dtype}_m{rows}"


def dense_symbol(kind: str, rows: int) -> str:
    """The product of float weights with float32 activations."""
    return f"hikui_linear_{kind}_m{rows}"


def served(activations: str) -> tuple[str, str, str]:
    """What `hikui targets --kernels` says of 1, of 2…15 and of 16 and more rows; every kind has the same.

    Args:
        activations: as in `hikui.backends.kernels.table.ACTIVATIONS`.
    """
    name, rows = ("fma", FLOAT_ROWS[-1]) if activations.startswith("float") else ("dp4a", INTEGER_ROWS[-1])
    return (name, f"{name} by {rows}", f"{name} by {rows}, repeated")


def makers() -> dict[str, Callable[[str], Any]]:
    """For every symbol, what makes its TIR when given the symbol; TVM is imported when one is called."""
    table: dict[str, Callable[[str], Any]] = {}
    for kind in KINDS:
        for rows in INTEGER_ROWS:
            table[integer_symbol(kind, rows)] = partial(_made, "integer.integer", kind, rows)
        for dtype in ("float32", "float16"):
            for rows in FLOAT_ROWS:
                made = partial(_made, "weight_only.weight_only", kind, dtype, rows)
                table[weight_only_symbol(kind, dtype, rows)] = made
    for kind in DENSE:
        for rows in FLOAT_ROWS:
            table[dense_symbol(kind, rows)] = partial(_made, "dense.dense", kind, rows)
    for suffix, (largest, static) in QUANTIZERS.items():
        made = partial(_made, "activation.quantize_activation", largest, static)
        table[f"hikui_quantize_activation{suffix}"] = made
    return table


def _made(maker: str, *arguments: object) -> Any:
    """What a function of a module beside this one makes."""
    module, function = maker.split(".")
    return getattr(import_module(f"hikui.backends.kernels.cuda.{module}"), function)(*arguments)

"""What the printer and the reader of the program's text share: names of dtypes, functions and annotations."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hikui.lowering.ir.program import (
    BLOCK,
    BRANCH,
    COLUMNS,
    CORRECTION,
    FACTOR,
    FIXED,
    FLOAT_WEIGHT,
    FORMAT,
    GROUP,
    LATENT,
    ROTATED,
    SENSITIVITY,
    SITE,
    STATISTICS,
    TRANSFORMED,
)

DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        torch.sym_int,
        torch.sym_float,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
        torch.sym_ite,
        torch.sym_sum,
    )
}
"""Plain functions that a program may call: they take apart tuples and compute with T. Powers and shifts are not among
them, so that no text makes the reader compute a number of a million digits."""

OBJECTS: Mapping[str, object] = {
    str(value): value
    for value in (
        *DTYPES,
        torch.strided,
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
    )
}
"""Constants of torch that may be arguments, as torch names them: `torch.float32`, …"""

WORDS: Mapping[str, object] = {"None": None, "True": True, "False": False}

MODULE = "nn_module_stack"
"""Of the modules that a node was traced in, passes read the innermost one's path; the text holds that."""

ANNOTATIONS: Mapping[str, tuple[str, str]] = {
    "site": (SITE, "text"),
    "group": (GROUP, "text"),
    "block": (BLOCK, "integer"),
    "format": (FORMAT, "format"),
    "fixed_format": (FIXED, "format"),
    "correction": (CORRECTION, "text"),
    "columns": (COLUMNS, "text"),
    "sensitivity": (SENSITIVITY, "numbers"),
    "statistics": (STATISTICS, "texts"),
    "transformed": (TRANSFORMED, "list"),
    "rotated": (ROTATED, "list"),
    "float_weight": (FLOAT_WEIGHT, "text"),
    "branch": (BRANCH, "text"),
    "factor": (FACTOR, "text"),
    "latent": (LATENT, "text"),
    "module": (MODULE, "module"),
}
"""Annotations in the order in which they stand: the metadata that each holds, and how its value is written."""


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in; empty where nothing is known."""
    stack = node.meta.get(MODULE) or {}
    return str(list(stack.values())[-1][0]) if stack else ""

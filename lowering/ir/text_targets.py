"""Which operator a name in a program's text means; nothing but the ops and functions listed here can be named."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from hikui.lowering.errors import did_you_mean
from hikui.lowering.ir.dialect import NAMESPACE
from hikui.lowering.ir.text_cursor import Cursor
from hikui.lowering.ir.text_tables import FUNCTIONS

_NAMESPACES = ("aten", NAMESPACE)

_REFUSED = ("aten.from_file",)
"""Ops that reach out of the program: this one maps a file of any name."""


@cache
def _ops() -> frozenset[str]:
    """Every op of the namespaces as the text writes it, without `.default`."""
    names = (str(name).replace("::", ".") for name in torch._C._dispatch_get_all_op_names())
    return frozenset(name.removesuffix(".default") for name in names if name.split(".")[0] in _NAMESPACES)


def target_of(cursor: Cursor, name: str) -> Callable[..., Any]:
    """The operator or function of a name.

    Raises:
        UsageError: a program cannot call it.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    space, _, op = name.partition(".")
    if op and space not in _NAMESPACES:
        raise cursor.fail(f"'{name}' is of no namespace that a text may name; those are {' and '.join(_NAMESPACES)}.")
    if name not in _ops():
        raise cursor.fail(f"no op is called '{name}'.{did_you_mean(name, _known(space))}")
    packet, _, overload = op.partition(".")
    target = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    assert isinstance(target, OpOverload), f"{name} is registered"
    if target._schema.is_mutable or name.startswith(_REFUSED):
        raise cursor.fail(f"'{name}' changes its operands or reads files; a program's ops do neither.")
    return target


def _known(space: str) -> frozenset[str]:
    return _ops() if space == "aten" else frozenset({*FUNCTIONS, *(op for op in _ops() if op.startswith(NAMESPACE))})

"""Programs as text: stable, one node a line, for people, tests and diffs."""

import difflib
from collections.abc import Iterable

import torch
from torch import fx

from hikui.lowering.ir.program import BLOCK, CORRECTION, FORMAT, GROUP, SENSITIVITY, SITE, WEIGHT, Program

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_ANNOTATIONS = (SITE, GROUP, BLOCK, FORMAT, CORRECTION, SENSITIVITY)


class _Symbols:
    """Gives the symbols of torch's shape environment short names in the order in which they are met: T, T1, …"""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def text(self, value: object) -> str:
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(value)
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self._names.setdefault(str(symbol), "T" if not self._names else f"T{len(self._names)}")
        out = str(expression)
        for name in sorted(self._names, key=len, reverse=True):
            out = out.replace(name, self._names[name])
        return out


def _type(value: object, symbols: _Symbols) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(symbols.text, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_type(item, symbols) for item in value)})"
    return symbols.text(value)


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        text = str(node.target)
        return text.removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _annotations(node: fx.Node) -> str:
    found = []
    for key in _ANNOTATIONS:
        if key in node.meta:
            value = node.meta[key]
            if isinstance(value, dict):
                value = "{" + ", ".join(f"{k}: {value[k]:.6g}" for k in sorted(value)) + "}"
            found.append(f"{key.removeprefix('hikui.')}={value}")
    return f"  // {' '.join(found)}" if found else ""


def _lines(program: Program) -> Iterable[str]:
    symbols, config = _Symbols(), program.config
    yield f"program {config.architecture} context={config.context_length} vocabulary={config.vocabulary}"
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = f' weight "{program.weight_of(node)}"' if WEIGHT in node.meta else " input"
            yield f"  %{node.name} ={kind} : {_type(node.meta['val'], symbols)}"
        elif node.op == "output":
            yield f"  return {', '.join(map(_argument, program.outputs()))}"
        else:
            arguments = [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in sorted(node.kwargs.items()))]
            value = _type(node.meta["val"], symbols) if "val" in node.meta else "?"
            yield f"  %{node.name} = {_target(node)}({', '.join(arguments)}) : {value}{_annotations(node)}"


def to_text(program: Program) -> str:
    """The program as text; two equal programs give equal text."""
    return "\n".join(_lines(program)) + "\n"


def diff(before: str, after: str, title: str) -> str:
    """A unified diff of two texts of `to_text`; empty where they are equal."""
    return "".join(
        difflib.unified_diff(
            before.splitlines(keepends=True), after.splitlines(keepends=True), f"before {title}", f"after {title}", n=1
        )
    )

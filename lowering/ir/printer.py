"""Programs as text: complete, stable, one node a line; `reader.from_text` reads it back.

docs/architecture.md gives the grammar and says what the text leaves out.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import fx
from torch.utils._sympy.numbers import IntInfinity

from hikui.lowering.ir.cache_shape import FLOAT_CACHE, CacheShape
from hikui.lowering.ir.program import WEIGHT, Program
from hikui.lowering.ir.store import TensorInfo
from hikui.lowering.ir.text_tables import ANNOTATIONS, DTYPES, MODULE, module_of

BARE = r"[\w.+#/-]+"
"""Texts that stand without quotation marks in annotations; so does the architecture."""


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


def type_text(value: object, symbols: _Symbols | None = None) -> str:
    """The type of a value, such as `f32[1, T, 48]`; a tuple's is the types of its parts in parentheses."""
    symbols = symbols or _Symbols()
    if isinstance(value, torch.Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(symbols.text, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(item, symbols) for item in value)})"
    return symbols.text(value)


def info_text(info: TensorInfo) -> str:
    """The type of a stored tensor."""
    return f"{DTYPES.get(info.dtype, str(info.dtype))}[{', '.join(map(str, info.shape))}]"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _bare(text: str) -> str:
    return text if re.fullmatch(BARE, text) else _string(text)


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))})"
    if isinstance(value, torch.device):
        return f"device({_string(str(value))})"
    if isinstance(value, str):
        return _string(value)
    return str(value)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        text = str(node.target)
        return text.removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _annotation(node: fx.Node, key: str, kind: str) -> str:
    if key == MODULE:
        return _bare(path) if (path := module_of(node)) else ""
    if key not in node.meta:
        return ""
    value = node.meta[key]
    if kind == "numbers":
        return f"{{{', '.join(f'{_bare(name)}: {float(value[name])!r}' for name in sorted(value))}}}"
    if kind == "texts":
        return f"{{{', '.join(f'{_bare(name)}: {_bare(str(value[name]))}' for name in sorted(value))}}}"
    if kind == "list":
        return f"[{', '.join(map(_bare, value))}]"
    return _bare(str(value))


def _annotations(node: fx.Node) -> str:
    texts = {name: _annotation(node, key, kind) for name, (key, kind) in ANNOTATIONS.items()}
    found = [f"{name}={text}" for name, text in texts.items() if text]
    return f"  // {' '.join(found)}" if found else ""


def _range(program: Program) -> str:
    """The range of T: 1 to the context length in what `trace` makes, something narrower where a program says so."""
    tokens = program.input_nodes()[0].meta.get("val") if program.input_nodes() else None
    size = tokens.shape[-1] if isinstance(tokens, torch.Tensor) and tokens.dim() else None
    if not isinstance(size, torch.SymInt):
        return ""
    found = size.node.shape_env.var_to_range.get(size.node.expr)
    if found is None:
        return ""
    upper = program.config.context_length if isinstance(found.upper, IntInfinity) else int(found.upper)
    return f" T={int(found.lower)}..{upper}"


def _caches(caches: Sequence[CacheShape]) -> str:
    """Each layer's cache as `heads x size : format`, what repeats as `… *layers`."""
    texts = []
    for cache, run in groupby(caches):
        count = len(list(run))
        stored = "" if cache.format == FLOAT_CACHE else f":{cache.format}"
        texts.append(f"{cache.heads}x{cache.head_size}{stored}{f' *{count}' if count > 1 else ''}")
    return f" caches=[{', '.join(texts)}]" if texts else ""


def _header(program: Program) -> str:
    config = program.config
    bos = "" if config.bos_token_id is None else f" bos={config.bos_token_id}"
    eos = f" eos=[{', '.join(map(str, config.eos_token_ids))}]" if config.eos_token_ids else ""
    return (
        f"program {_bare(config.architecture)} context={config.context_length} vocabulary={config.vocabulary}"
        f"{_range(program)}{_caches(config.caches)}{bos}{eos}"
    )


def _call(node: fx.Node, symbols: _Symbols) -> str:
    arguments = [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in sorted(node.kwargs.items()))]
    value = type_text(node.meta["val"], symbols) if "val" in node.meta else "?"
    return f"  %{node.name} = {_target(node)}({', '.join(arguments)}) : {value}{_annotations(node)}"


def _lines(program: Program) -> Iterable[str]:
    symbols = _Symbols()
    yield _header(program)
    placed = {program.weight_of(node) for node in program.weight_nodes()}
    for key in program.store.keys():
        if key not in placed:
            yield f"  stored {_string(key)} : {info_text(program.store.info(key))}"
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = f" weight {_string(program.weight_of(node))}" if WEIGHT in node.meta else " input"
            yield f"  %{node.name} ={kind} : {type_text(node.meta['val'], symbols)}"
        elif node.op == "output":
            yield f"  return {', '.join(map(_argument, program.outputs()))}"
        else:
            yield _call(node, symbols)


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

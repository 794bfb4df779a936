"""The header and the annotations of a program's text: what stands beside the calls."""

from dataclasses import dataclass
from typing import Any

import torch

from hikui.lowering.errors import UsageError, did_you_mean
from hikui.lowering.formats import Format
from hikui.lowering.ir.cache_shape import CACHE_FORMATS, FLOAT_CACHE, CacheShape
from hikui.lowering.ir.printer import BARE
from hikui.lowering.ir.program import CORRECTION, ModelConfig
from hikui.lowering.ir.store import TensorInfo
from hikui.lowering.ir.text_cursor import Cursor
from hikui.lowering.ir.text_tables import ANNOTATIONS, DTYPES

_LAYERS = 1 << 14
"""More layers than a model has; a text may not make the reader build cache shapes without end."""

_FIELDS = ("context", "vocabulary", "T", "caches", "bos", "eos")


@dataclass(frozen=True)
class Header:
    """The first line: what a runner must know, and the range of T."""

    config: ModelConfig
    shortest: int
    longest: int


def read_header(cursor: Cursor) -> Header:
    """Reads `program NAME context=… vocabulary=… [T=a..b] [caches=[…]] [bos=…] [eos=[…]]`.

    Raises:
        UsageError: the line is another.
    """
    if not cursor.sign("program "):
        raise cursor.fail(f"a program's text begins with `program NAME context=… vocabulary=…`, not {cursor.found()}.")
    architecture = cursor.text(BARE, "the architecture's name")
    fields: dict[str, Any] = {}
    while not cursor.at_end():
        name = cursor.form(r"[A-Za-z]+(?==)", "a field such as context=64")
        if name not in _FIELDS:
            raise cursor.fail(f"the program has no field '{name}'; it has {', '.join(_FIELDS)}.")
        if name in fields:
            raise cursor.fail(f"'{name}' is given twice.")
        cursor.want("=", f"after {name}")
        fields[name] = _field(cursor, name)
    for name in _FIELDS[:2]:
        if name not in fields:
            raise cursor.fail(f"the program does not say its {name}; write {name}=64 for example.")
    config = ModelConfig(
        context_length=fields["context"],
        vocabulary=fields["vocabulary"],
        caches=tuple(fields.get("caches", ())),
        architecture=architecture,
        bos_token_id=fields.get("bos"),
        eos_token_ids=tuple(fields.get("eos", ())),
    )
    shortest, longest = fields.get("T", (1, config.context_length))
    if not shortest <= longest <= config.context_length:
        raise cursor.fail(f"T={shortest}..{longest} is no range within the context of {config.context_length} tokens.")
    return Header(config, shortest, longest)


def _field(cursor: Cursor, name: str) -> object:
    if name == "T":
        shortest = cursor.integer("the smallest T", 1)
        cursor.want("..", "after the smallest T")
        return shortest, cursor.integer("the largest T", 1)
    if name == "caches":
        cursor.want("[", "before caches")
        caches = [cache for run in cursor.items("]", lambda: _cache(cursor), "a cache") for cache in run]
        if len(caches) > _LAYERS:
            raise cursor.fail(f"there are {len(caches)} layers of caches; {_LAYERS} is the most.")
        return caches
    if name == "eos":
        cursor.want("[", "before the tokens that end a text")
        return cursor.items("]", lambda: cursor.integer("a token"), "a token")
    return cursor.integer(f"the {name}", 2 if name == "context" else 0, 1 << 31)


def _cache(cursor: Cursor) -> list[CacheShape]:
    heads = cursor.integer("the number of heads", 1, 1 << 20)
    cursor.want("x", "between the heads of a cache and their size")
    size, stored, count = cursor.integer("the size of a head", 1, 1 << 20), FLOAT_CACHE, 1
    if cursor.sign(":"):
        stored = cursor.form(r"\w+", "a cache's format")
        if stored not in CACHE_FORMATS:
            raise cursor.fail(f"a cache is not stored as '{stored}'; the formats are {', '.join(CACHE_FORMATS)}.")
    if cursor.sign("*"):
        count = cursor.integer("the number of layers", 1, _LAYERS)
    return [CacheShape(heads, size, stored)] * count


def read_info(cursor: Cursor, length: object = None) -> tuple[torch.dtype, tuple[Any, ...]]:
    """Reads the dtype and shape of a placeholder or of a stored tensor.

    Args:
        cursor: where.
        length: what T stands for; None where only numbers may stand.

    Raises:
        UsageError: no tensor's type stands here.
    """
    name = cursor.form(r"\w+", "a type such as f32[1, T, 48]")
    dtypes = {text: dtype for dtype, text in DTYPES.items()}
    if name not in dtypes:
        raise cursor.fail(f"'{name}' is no dtype; those are {', '.join(dtypes)}.")
    cursor.want("[", "after a dtype")

    def size() -> object:
        if length is not None and cursor.sign("T"):
            return length
        return cursor.integer("a size")

    return dtypes[name], tuple(cursor.items("]", size, "a size"))


def read_stored(cursor: Cursor) -> tuple[str, TensorInfo]:
    """Reads `"KEY" : TYPE`, the name of a stored tensor and what it is."""
    key = cursor.string("the name of a weight")
    cursor.want(":", "before a type")
    dtype, shape = read_info(cursor)
    cursor.end()
    return key, TensorInfo(dtype, shape)


def read_annotations(cursor: Cursor) -> dict[str, Any]:
    """Reads what stands behind `//`: the metadata of a node.

    Raises:
        UsageError: an annotation is not known, given twice or malformed.
    """
    meta: dict[str, Any] = {}
    while not cursor.at_end():
        name = cursor.form(r"\w+(?==)", "an annotation such as block=0")
        if name not in ANNOTATIONS:
            raise cursor.fail(f"no annotation is called '{name}'.{did_you_mean(name, ANNOTATIONS)}")
        key, kind = ANNOTATIONS[name]
        if key in meta:
            raise cursor.fail(f"'{name}' is given twice.")
        cursor.want("=", f"after {name}")
        meta[key] = _value(cursor, name, kind)
        if key == CORRECTION:
            _check_correction(cursor, meta[key])
    return meta


def _value(cursor: Cursor, name: str, kind: str) -> object:
    def text() -> str:
        return cursor.text(BARE, f"a text for {name}")

    if kind == "integer":
        return cursor.integer(f"a number for {name}")
    if kind == "list":
        cursor.want("[", f"after {name}=")
        return tuple(cursor.items("]", text, "a name"))
    if kind in ("numbers", "texts"):
        cursor.want("{", f"after {name}=")
        return dict(cursor.items("}", lambda: _entry(cursor, name, kind), "an entry"))
    if kind == "module":
        path = text()
        return {path: (path, "")}
    if kind == "format":
        return _format(cursor, text())
    return text()


def _entry(cursor: Cursor, name: str, kind: str) -> tuple[str, float | str]:
    key = cursor.text(BARE, f"a name in {name}")
    cursor.want(":", f"after a name in {name}")
    if kind == "texts":
        return key, cursor.text(BARE, f"the name of a weight in {name}")
    if (number := cursor.number_or_none()) is None:
        raise cursor.fail(f"a number is due for {key} in {name}, not {cursor.found()}.")
    return key, float(number)


def _format(cursor: Cursor, text: str) -> str:
    try:
        Format.parse(text)
    except UsageError as error:
        raise cursor.fail(str(error)) from None
    return text


def _check_correction(cursor: Cursor, text: str) -> None:
    try:
        count = len([float(part) for part in text.split("/")])
    except ValueError:
        count = 0
    if count not in (2, 3):
        raise cursor.fail(f"a correction is alpha/damping, or alpha/damping/residual, as in 0.5/0.01, not '{text}'.")

"""The files beside the library: `model.params` (weights), `model.index` (what they are), `model.tokens` (text).

Both runners map the weights and read them in place, so each tensor starts on a multiple of 64 bytes. The index is plain
lines of words, because the runner on the board has no JSON library:

    hikui-tvm 1
    target raspberry-pi-4 aarch64-linux-gnu cortex-a72      name, triple, CPU of the emulator or -
    context 256
    vocabulary 512
    cache 4 8 int8                          heads, head size, format (left out: float32), once a layer
    eos 2                                   once for each token that ends a text
    feature asimd                           once for each, as /proc/cpuinfo names it
    parameters 1048576                      bytes of model.params
    weight int8 4096 65536 3 8 64 16 name   dtype, offset, bytes, rank, shape, name; in the order of the program
    end

One space parts two words, numbers are digits without zeros ahead, and tensors lie in order and apart. Both readers (the
other one is `native/index.h`) refuse what another line, the file's size or the program itself contradicts.

`model.tokens` gives the bytes of each token: magic, the count as uint32, count + 1 offsets as uint32, the bytes.

Nothing here needs torch, so that a runner starts quickly.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.cache_shape import CACHE_FORMATS, FLOAT_CACHE, CacheShape

LIBRARY = "model.so"
PARAMETERS = "model.params"
INDEX = "model.index"
TOKENS = "model.tokens"

ALIGNMENT = 64
_VERSION = "hikui-tvm 1"

_MOST_BYTES = 64 << 20
"""Of an index: some 500,000 tensors."""

_MOST_TOKENS = 2**31 - 1
_MOST_SIZE = 2**40
_MOST_RANK = 8
_MOST_ADDRESSES = 2**47
_MOST_FEATURE = 31
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1}
_ONCE = ("target", "context", "vocabulary", "parameters")
_OFTEN = ("cache", "eos", "feature", "weight")


def _number(word: str, least: int, most: int) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", word) or not least <= int(word) <= most:
        raise ValueError(f"'{word}' is no number from {least} to {most}")
    return int(word)


@dataclass(frozen=True)
class Weight:
    """Where a tensor lies in `model.params`."""

    name: str
    dtype: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]

    def line(self) -> str:
        # The name is for whoever reads the file; no runner looks it up.
        name = "".join(c if c.isprintable() and c != " " else "_" for c in self.name) or "_"
        return " ".join(map(str, ("weight", self.dtype, self.offset, self.nbytes, len(self.shape), *self.shape, name)))

    @staticmethod
    def parse(words: list[str]) -> "Weight":
        dtype, offset, nbytes, rank, *rest = words
        *shape, name = rest
        if _number(rank, 0, _MOST_RANK) != len(shape):
            raise ValueError(f"a tensor of rank {rank} has {len(shape)} dimensions")
        sizes = tuple(_number(size, 0, _MOST_SIZE) for size in shape)
        weight = Weight(name, dtype, _number(offset, 0, _MOST_ADDRESSES), _number(nbytes, 0, _MOST_ADDRESSES), sizes)
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"no tensor is {dtype}")
        # Strides are products too, whose factors are no zeros.
        if math.prod(max(size, 1) for size in sizes) * _ITEM_BYTES[dtype] >= 2**63:
            raise ValueError("a tensor is larger than any memory")
        if math.prod(sizes) * _ITEM_BYTES[dtype] != weight.nbytes:
            raise ValueError(f"the tensor's shape does not have its {nbytes} bytes")
        return weight


@dataclass(frozen=True)
class Index:
    """What `model.index` says."""

    target: str
    triple: str
    emulator_cpu: str | None
    context_length: int
    vocabulary: int
    caches: tuple[CacheShape, ...]
    eos_token_ids: tuple[int, ...]
    features: tuple[str, ...]
    weights: tuple[Weight, ...]
    parameters: int

    def lines(self) -> Iterator[str]:
        yield _VERSION
        yield f"target {self.target} {self.triple} {self.emulator_cpu or '-'}"
        yield f"context {self.context_length}"
        yield f"vocabulary {self.vocabulary}"
        yield from map(_cache_line, self.caches)
        yield from (f"eos {token}" for token in self.eos_token_ids)
        yield from (f"feature {feature}" for feature in self.features)
        yield f"parameters {self.parameters}"
        yield from (weight.line() for weight in self.weights)
        yield "end"


def _cache_line(cache: CacheShape) -> str:
    line = f"cache {cache.heads} {cache.head_size}"
    return line if cache.format == FLOAT_CACHE else f"{line} {cache.format}"


def _parse_cache(words: list[str]) -> CacheShape:
    heads, size, *rest = words
    (fmt,) = rest or [FLOAT_CACHE]
    if fmt not in CACHE_FORMATS:
        raise ValueError(f"no cache is {fmt}")
    cache = CacheShape(_number(heads, 1, _MOST_TOKENS), _number(size, 1, _MOST_TOKENS), fmt)
    if fmt == "int4" and cache.head_size % 2:
        raise ValueError(f"heads of {size} cannot be stored as two codes a byte")
    return cache


def _one(words: list[str]) -> str:
    (word,) = words
    return word


def _parse_feature(words: list[str]) -> str:
    if len(_one(words).encode()) > _MOST_FEATURE:
        raise ValueError("no feature has so long a name")
    return _one(words)


def read_index(directory: Path) -> Index:
    """Reads `model.index`.

    Raises:
        HikuiError: the file is missing, cut short, damaged, of another version, or contradicts itself.
    """
    path = directory / INDEX
    text = _text(path)
    if not text.startswith(f"{_VERSION}\n"):
        raise HikuiError(f"{path} does not begin with '{_VERSION}'; lower the model again with this version of hikui.")
    if not text.endswith("\nend\n"):
        raise HikuiError(f"{path} is cut short; copy the artefact again.")
    fields: dict[str, list[list[str]]] = {word: [] for word in (*_ONCE, *_OFTEN)}
    for number, line in enumerate(text.split("\n")[1:-2], 2):
        word, *rest = line.split(" ")
        if word not in fields or not all(rest) or re.search(r"[\0-\x1f]", line):
            raise HikuiError(f"{path} is damaged in line {number}: it is no line of an index; copy the artefact again.")
        if word in _ONCE and fields[word]:
            raise HikuiError(
                f"{path} is damaged in line {number}: another line has said '{word}'; copy the artefact again."
            )
        fields[word].append(rest)
    try:
        index = _index(fields)
        _check_whole(index)
    except (IndexError, ValueError) as error:
        missing = [word for word in _ONCE if not fields[word]]
        reason = f"it lacks a line '{missing[0]}'" if missing else str(error)
        raise HikuiError(f"{path} is damaged: {reason}; copy the artefact again.") from None
    end = 0
    for weight in index.weights:
        if weight.offset % ALIGNMENT or weight.offset < end or weight.offset + weight.nbytes > index.parameters:
            raise HikuiError(
                f"{path} and {PARAMETERS} do not belong together: '{weight.name}' does not lie where it could; copy "
                "the artefact again."
            )
        end = weight.offset + weight.nbytes
    return index


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise HikuiError(f"{path} has {path.stat().st_size} bytes, which no index has; copy the artefact again.")
        # Read as bytes, so that no carriage return is taken for the end of a line.
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise HikuiError(f"{path} cannot be read: {reason}; copy the artefact again.") from None


def _index(fields: dict[str, list[list[str]]]) -> Index:
    target, triple, emulator = fields["target"][0]
    return Index(
        target=target,
        triple=triple,
        emulator_cpu=None if emulator == "-" else emulator,
        context_length=_number(_one(fields["context"][0]), 1, _MOST_TOKENS),
        vocabulary=_number(_one(fields["vocabulary"][0]), 1, _MOST_TOKENS),
        caches=tuple(map(_parse_cache, fields["cache"])),
        eos_token_ids=tuple(_number(_one(words), 0, _MOST_TOKENS) for words in fields["eos"]),
        features=tuple(map(_parse_feature, fields["feature"])),
        weights=tuple(map(Weight.parse, fields["weight"])),
        parameters=_number(_one(fields["parameters"][0]), 0, _MOST_ADDRESSES),
    )


def _check_whole(index: Index) -> None:
    """Raises ValueError where a line contradicts another one."""
    for token in index.eos_token_ids:
        if token >= index.vocabulary:
            raise ValueError(f"token {token} ends a text, but the vocabulary has {index.vocabulary}")
    for cache in index.caches:
        if 4 * cache.heads * cache.head_size * index.context_length > _MOST_ADDRESSES:
            raise ValueError(f"no cache is {cache.heads} heads of {cache.head_size}")


def map_parameters(directory: Path, index: Index) -> npt.NDArray[np.uint8]:
    """The bytes of `model.params`, mapped, not read.

    Raises:
        HikuiError: the file is missing or has another size than the index says.
    """
    path = directory / PARAMETERS
    try:
        size = path.stat().st_size
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}; copy the artefact again.") from None
    if size != index.parameters:
        raise HikuiError(f"{path} has {size} bytes, but {INDEX} says {index.parameters}; copy the artefact again.")
    if size == 0:
        return np.zeros(0, np.uint8)
    # Copy-on-write, because numpy lends only writable memory to other libraries; nobody writes.
    return np.memmap(path, dtype=np.uint8, mode="c")

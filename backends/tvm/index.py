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

`model.tokens` gives the bytes of each token: magic, the count as uint32, count + 1 offsets as uint32, the bytes.

Nothing here needs torch, so that a runner starts quickly.
"""

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


@dataclass(frozen=True)
class Weight:
    """Where a tensor lies in `model.params`."""

    name: str
    dtype: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]

    def line(self) -> str:
        name = "_".join(self.name.split())
        return " ".join(map(str, ("weight", self.dtype, self.offset, self.nbytes, len(self.shape), *self.shape, name)))

    @staticmethod
    def parse(words: list[str]) -> "Weight":
        dtype, offset, nbytes, rank, *rest = words
        shape, (name,) = rest[: int(rank)], rest[int(rank) :]
        return Weight(name, dtype, int(offset), int(nbytes), tuple(map(int, shape)))


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
    return CacheShape(int(heads), int(size), fmt)


def read_index(directory: Path) -> Index:
    """Reads `model.index`.

    Raises:
        HikuiError: the file is missing, cut short, damaged or of another version.
    """
    path = directory / INDEX
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise HikuiError(f"{path} cannot be read: {reason}; copy the artefact again.") from None
    if not lines or lines[0] != _VERSION:
        raise HikuiError(f"{path} does not begin with '{_VERSION}'; lower the model again with this version of hikui.")
    if lines[-1] != "end":
        raise HikuiError(f"{path} is cut short; copy the artefact again.")
    fields: dict[str, list[list[str]]] = {}
    for line in lines[1:-1]:
        word, *rest = line.split()
        fields.setdefault(word, []).append(rest)
    try:
        target, triple, emulator = fields["target"][0]
        return Index(
            target=target,
            triple=triple,
            emulator_cpu=None if emulator == "-" else emulator,
            context_length=int(fields["context"][0][0]),
            vocabulary=int(fields["vocabulary"][0][0]),
            caches=tuple(map(_parse_cache, fields.get("cache", []))),
            eos_token_ids=tuple(int(words[0]) for words in fields.get("eos", [])),
            features=tuple(words[0] for words in fields.get("feature", [])),
            weights=tuple(map(Weight.parse, fields.get("weight", []))),
            parameters=int(fields["parameters"][0][0]),
        )
    except (KeyError, ValueError, IndexError):
        raise HikuiError(f"{path} is damaged; copy the artefact again.") from None


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
    # Copy-on-write, because numpy lends only writable memory to other libraries; nobody writes.
    return np.memmap(path, dtype=np.uint8, mode="c")

"""What a GGUF file says before its data: header, metadata and the table of tensors, each number held to the file.

The layout is that of llama.cpp, versions 2 and 3, little-endian: `GGUF`, the version, how many tensors and how many
keys; each key with its type and value; each tensor with its name, dimensions (the fastest first), type and offset; then
the data, aligned. Other readers believe these numbers: here none is used before it was compared with what is left of
the file, so that a damaged one costs neither memory nor time. Long lists, such as the tokens, are counted and not kept.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from hikui.lowering.errors import HikuiError

MAGIC = b"GGUF"
SUFFIX = ".gguf"

FLOAT_KINDS = {"F32", "F16", "BF16"}
"""ggml's types that are floats one by one."""

_VERSIONS = (2, 3)
_ALIGNMENT = 32
"""Where the metadata names no other."""

_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16
"""Bytes of a key or a tensor's name; the format says as much of keys."""

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_LEAST_ENTRY = 8 + 4 + 1
"""Bytes that the shortest key with its value takes."""

_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8
"""And the shortest entry of the table of tensors."""


@dataclass(frozen=True)
class GgufList:
    """A list of the metadata, of which only the length is kept."""

    length: int


GgufValue = int | float | bool | str | GgufList


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor lies.

    Attributes:
        kind: name of ggml's type, such as `Q4_0`.
        shape: as torch has it, the fastest dimension last.
        offset: of its first byte in the file.
        nbytes: that it takes there.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file without its data.

    Attributes:
        metadata: by key; lists as their lengths.
        tensors: by the names of the file, which are llama.cpp's.
    """

    path: Path
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufEntry]

    def text(self, key: str) -> str | None:
        """A string of the metadata, None where the key is not there.

        Raises:
            HikuiError: it is something else.
        """
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise HikuiError(f"{self.path} sets {key} to {_shown(value)}, where a text is due.")
        return value

    def integer(self, key: str) -> int | None:
        """A whole number of the metadata, none below 0; None where the key is not there.

        Raises:
            HikuiError: it is something else.
        """
        value = self.metadata.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise HikuiError(f"{self.path} sets {key} to {_shown(value)}, where a whole number from 0 on is due.")
        return value

    def number(self, key: str) -> float | None:
        """A number of the metadata, None where the key is not there.

        Raises:
            HikuiError: it is something else, or not finite.
        """
        value = self.metadata.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):  # type: ignore[arg-type]
            raise HikuiError(f"{self.path} sets {key} to {_shown(value)}, where a finite number is due.")
        return None if value is None else float(value)  # type: ignore[arg-type]

    def kinds(self) -> dict[str, int]:
        """How many tensors there are of each type, by its name."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.kind] = found.get(tensor.kind, 0) + 1
        return dict(sorted(found.items()))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Reads everything but the data.

    Raises:
        HikuiError: the file cannot be read, is truncated, of another version, one of several parts, or holds a number
            that cannot be, with the key or the tensor; or a tensor is of a type that is not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(path, file, size).read()
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}.") from error


def _shown(value: object) -> str:
    return f"a list of {value.length}" if isinstance(value, GgufList) else f"{value!r:.60}"


class _Reader:
    """Goes through the file once, from the front; `where` says for what, in messages."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._at = 0
        self._where = "its header"

    def read(self) -> GgufFile:
        tensor_count, key_count = self._header()
        if key_count * _LEAST_ENTRY > self._left:
            self._corrupt(f"its header counts {key_count} keys, for which {self._left} bytes are left")
        metadata = {}
        for index in range(key_count):
            self._where = f"key {index + 1} of {key_count}"
            key = self._name()
            if key in metadata:
                self._corrupt(f"it has the key {key[:80]!r} twice")
            self._where = f"the value of {key[:80]!r}"
            metadata[key] = self._value()
        if tensor_count * _LEAST_TENSOR > self._left:
            self._corrupt(f"its header counts {tensor_count} tensors, for which {self._left} bytes are left")
        alignment = self._alignment(metadata)
        self._refuse_parts(metadata)
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(tensor_count):
            self._where = f"tensor {index + 1} of {tensor_count}"
            name = self._name()
            if name in found:
                self._corrupt(f"it has the tensor {name[:80]!r} twice")
            self._where = f"the entry of {name[:80]!r}"
            found[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: GgufEntry(kind, shape, start + offset, nbytes)
            for name, (kind, shape, offset, nbytes) in found.items()
        }
        self._refuse_overlaps(tensors)
        return GgufFile(self._path, metadata, tensors)

    @property
    def _left(self) -> int:
        return self._size - self._at

    def _corrupt(self, what: str) -> NoReturn:
        raise HikuiError(f"{self._path} is corrupt: {what}; fetch it again.")

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise HikuiError(
                f"{self._path} is truncated: {self._where} goes on for {count} bytes from byte {self._at}, and the "
                f"file has {self._size}; fetch it again."
            )
        data = self._file.read(count)
        self._at += len(data)
        if len(data) < count:
            raise HikuiError(f"{self._path} ends inside {self._where}; fetch it again.")
        return data

    def _skip(self, count: int) -> None:
        if count > self._left:
            self._bytes(count)
        self._file.seek(count, 1)
        self._at += count

    def _scalar(self, kind: int) -> int | float | bool:
        data = self._bytes(struct.calcsize(_SCALARS[kind]))
        if kind == 7 and data not in (b"\0", b"\1"):
            self._corrupt(f"{self._where} is {data[0]}, and true or false is due")
        value: int | float | bool = struct.unpack(_SCALARS[kind], data)[0]
        return value

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return number

    def _header(self) -> tuple[int, int]:
        if self._bytes(4) != MAGIC:
            raise HikuiError(f"{self._path} is no GGUF file: it does not begin with the bytes GGUF.")
        version = self._number("<I")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            told = f"{swapped} in big-endian" if swapped in (1, *_VERSIONS) else str(version)
            raise HikuiError(
                f"{self._path} is a GGUF file of version {told}; hikui reads versions 2 and 3 in little-endian, so "
                "convert it anew."
            )
        return self._number("<Q"), self._number("<Q")

    def _text(self, most: int | None = None) -> str:
        length = self._number("<Q")
        if most is not None and length > most:
            self._corrupt(f"the name at {self._where} has {length} bytes")
        data = self._bytes(length)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self._corrupt(f"{self._where} is not UTF-8 at byte {error.start}")

    def _name(self) -> str:
        return self._text(_LONGEST_NAME)

    def _value(self) -> GgufValue:
        kind = self._number("<I")
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._list()
        if kind not in _SCALARS:
            self._corrupt(f"{self._where} has type {kind}, which the format does not know")
        return self._scalar(kind)

    def _list(self) -> GgufList:
        kind, length = self._number("<I"), self._number("<Q")
        if kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            if length * 8 > self._left:
                self._corrupt(f"{self._where} counts {length} texts, for which {self._left} bytes are left")
            for _ in range(length):
                self._skip(self._number("<Q"))
        else:
            self._corrupt(f"{self._where} is a list of type {kind}, which the format does not know in a list")
        return GgufList(length)

    def _alignment(self, metadata: Mapping[str, GgufValue]) -> int:
        value = metadata.get("general.alignment", _ALIGNMENT)
        if type(value) is not int or value <= 0 or value & (value - 1) or value > self._size:
            self._corrupt(f"general.alignment is {_shown(value)}, and a power of two within the file is due")
        return value

    def _refuse_parts(self, metadata: Mapping[str, GgufValue]) -> None:
        count = metadata.get("split.count", 0)
        if type(count) is int and count > 1:
            number = metadata.get("split.no", 0)
            part = number + 1 if type(number) is int else "one"
            raise HikuiError(
                f"{self._path} is part {part} of the {count} parts of a split GGUF, which hikui does not join; join "
                "them with llama.cpp's `llama-gguf-split --merge` and give the result."
            )

    def _tensor(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self._corrupt(f"the tensor {name[:80]!r} has {dimensions} dimensions, and 1 to {_MOST_DIMENSIONS} are due")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        kind, block, width = self._type(name, self._number("<I"))
        offset = self._number("<Q")
        if 0 in shape:
            self._corrupt(f"the tensor {name[:80]!r} has the shape {list(shape)}, which holds nothing")
        if shape[-1] % block:
            self._corrupt(f"the rows of {name[:80]!r} have {shape[-1]} values, no multiple of the {block} of {kind}")
        nbytes = math.prod(shape) // block * width
        if offset % alignment:
            self._corrupt(f"the tensor {name[:80]!r} lies at {offset}, no multiple of the alignment of {alignment}")
        if nbytes > self._size or offset > self._size:
            self._past_the_end(name, offset + nbytes)
        return kind, shape, offset, nbytes

    def _type(self, name: str, number: int) -> tuple[str, int, int]:
        """Name, values and bytes of a block of a type, if gguf can turn it into floats."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
            told = kind.name
            block, width = GGML_QUANT_SIZES[kind]
            readable = dequantiser(told) is not None
        except (KeyError, ValueError):
            told, readable, block, width = f"number {number}", False, 1, 1
        if not readable:
            raise HikuiError(
                f"The tensor {name[:80]!r} in {self._path} is of ggml's type {told}, which hikui does not read; give a "
                "file whose tensors are floats or of the usual Q and IQ types."
            )
        return told, block, width

    def _past_the_end(self, name: str, end: int) -> NoReturn:
        raise HikuiError(
            f"{self._path} is truncated: the tensor {name[:80]!r} ends at byte {end}, and the file has {self._size}; "
            "fetch it again."
        )

    def _refuse_overlaps(self, tensors: Mapping[str, GgufEntry]) -> None:
        end, last = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda entry: (entry[1].offset, entry[0])):
            if tensor.offset + tensor.nbytes > self._size:
                self._past_the_end(name, tensor.offset + tensor.nbytes)
            if tensor.offset < end:
                self._corrupt(f"the tensor {name[:80]!r} lies where {last[:80]!r} does")
            end, last = tensor.offset + tensor.nbytes, name


@cache
def dequantiser(kind: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """What turns rows of blocks into floats: uint8 [rows, bytes] → float32 [rows, values]; None for other types."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    number = GGMLQuantizationType[kind]

    def floats(blocks: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # a scale that is no number is found where the weights are looked at
            return dequantize(blocks, number)

    try:
        floats(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8))
    except NotImplementedError:
        return None
    return floats

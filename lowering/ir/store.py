"""Where weights live: outside the graph, named, loaded one at a time.

A store maps a key to a source. Sources of a checkpoint read from its files on demand; tensors that a pass makes go to a
scratch folder, or stay in memory where there is none. Tensors never change once stored, so a fork is a copied index.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.files import write_whole

_PART = 1 << 24
"""Elements widened at a time."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of what `load` gives."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Something that can produce one tensor, again and again, always the same."""

    @property
    def info(self) -> TensorInfo: ...

    def load(self) -> Tensor: ...


@runtime_checkable
class RowSource(TensorSource, Protocol):
    """A source that can produce a part of its tensor, along the first dimension, without the rest."""

    def rows(self, start: int, stop: int) -> TensorSource: ...


@runtime_checkable
class CodedSource(TensorSource, Protocol):
    """A source whose values are made from one piece of a file, so that the piece and `reading` stand for them."""

    @property
    def stored(self) -> "FileTensor": ...

    @property
    def reading(self) -> str: ...


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that is simply kept."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.tensor.dtype, tuple(self.tensor.shape))

    def load(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class FileTensor:
    """A contiguous little-endian tensor inside a file, read anew at each load so that nothing of it stays resident.

    Attributes:
        widen: give bf16 and f16 as float32 (checkpoints); packed weights and scales keep their dtype.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    widen: bool = False

    @property
    def info(self) -> TensorInfo:
        narrow = self.widen and self.dtype in (torch.bfloat16, torch.float16)
        return TensorInfo(torch.float32 if narrow else self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "FileTensor":
        """A part of the tensor, along its first dimension."""
        width = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        return replace(self, offset=self.offset + start * width, shape=(stop - start, *self.shape[1:]))

    def load(self) -> Tensor:
        """Reads the tensor.

        Raises:
            HikuiError: the file is gone or ends before the tensor does.
        """
        dtype = self.info.dtype
        if dtype == self.dtype or not self.shape:
            return self._read().to(dtype)
        # Widened part by part, so that a large table is never in memory in both widths.
        out = torch.empty(self.shape, dtype=dtype)
        step = max(1, _PART // max(1, torch.Size(self.shape[1:]).numel()))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out[start:stop] = self.rows(start, stop)._read()
        return out

    def _read(self) -> Tensor:
        buffer = bytearray(self.nbytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                read, view = 0, memoryview(buffer)
                while read < self.nbytes and (got := file.readinto(view[read:])):
                    read += got
        except OSError as error:
            raise HikuiError(f"{self.path} cannot be read: {error.strerror}.") from error
        if read < self.nbytes:
            missing = self.nbytes - read
            raise HikuiError(f"{self.path} ends inside a tensor: {missing} bytes are missing; fetch it again.")
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)


@dataclass(frozen=True)
class Transposed:
    """A tensor source: the transpose of a stored matrix, made when it is loaded."""

    source: TensorSource

    @property
    def info(self) -> TensorInfo:
        inner = self.source.info
        return TensorInfo(inner.dtype, tuple(reversed(inner.shape)))

    def load(self) -> Tensor:
        return self.source.load().t().contiguous()


class WeightStore:
    """A named set of immutable tensors.

    Args:
        sources: where each tensor comes from.
        scratch: folder for tensors that passes make; None keeps them in memory.
    """

    def __init__(self, sources: dict[str, TensorSource], scratch: Path | None = None) -> None:
        self._sources = dict(sources)
        self.scratch = scratch

    @staticmethod
    def in_memory(tensors: dict[str, Tensor]) -> "WeightStore":
        return WeightStore({key: MemoryTensor(tensor) for key, tensor in tensors.items()})

    def keys(self) -> list[str]:
        return sorted(self._sources)

    def __contains__(self, key: str) -> bool:
        return key in self._sources

    def _source(self, key: str) -> TensorSource:
        if key not in self._sources:
            raise HikuiError(f"The weight store has no tensor '{key}'.")
        return self._sources[key]

    def info(self, key: str) -> TensorInfo:
        return self._source(key).info

    def load(self, key: str) -> Tensor:
        """The tensor of that name; treat it as read-only."""
        return self._source(key).load()

    def load_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first dimension; the rest is not read where the source can do without."""
        source = self._source(key)
        return source.rows(start, stop).load() if isinstance(source, RowSource) else source.load()[start:stop]

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor under a name, replacing what this store (not its forks) had there."""
        tensor = tensor.detach().contiguous()
        self._sources[key] = MemoryTensor(tensor) if self.scratch is None else self._write(key, tensor, self.scratch)

    def alias(self, key: str, source: TensorSource) -> None:
        """Names a source that is read lazily, such as a transposed view of another tensor."""
        self._sources[key] = source

    def source(self, key: str) -> TensorSource:
        return self._source(key)

    def free_name(self, name: str) -> str:
        """A name that nothing has: this one, or with the first free number behind it."""
        free, number = name, 2
        while free in self:
            free, number = f"{name}#{number}", number + 1
        return free

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._sources.pop(key, None)

    def fork(self) -> "WeightStore":
        """A store with the same tensors, whose changes this one does not see."""
        return WeightStore(self._sources, self.scratch)

    @staticmethod
    def _write(key: str, tensor: Tensor, scratch: Path) -> FileTensor:
        # The name holds the content, because a fork may put another tensor under the same key.
        data = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        digest = hashlib.sha256(data)
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        path = scratch / f"{digest.hexdigest()}.bin"
        if not path.exists():
            try:
                write_whole(path, lambda beside: beside.write_bytes(data), durable=False)
            except OSError as error:
                raise HikuiError(f"{scratch} cannot take the tensor '{key}': {error.strerror}.") from error
        return FileTensor(path, 0, tensor.dtype, tuple(tensor.shape))

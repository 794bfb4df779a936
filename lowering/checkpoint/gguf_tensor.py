"""One tensor of a GGUF file as a source of floats, and the integer codes behind it where they are on a grid of ours."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hikui.lowering.checkpoint.quantised_matrix import Grid
from hikui.lowering.huggingface.gguf_file import GgufEntry, dequantiser
from hikui.lowering.ir.store import FileTensor, TensorInfo

_PART = 1 << 22
"""Weights dequantised at a time."""

_GRIDS = {"Q4_0": 8, "Q8_0": 128}
"""The types that are a half-precision scale times an integer, by the zero of their unsigned fields."""

_GROUP = 32
"""Values that share a scale in both of them."""

_SCALE = 2
"""Bytes of the scale, which comes first."""


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """Rows `start`…`stop`−1 of a tensor, dequantised to float32 each time they are loaded; no other row is.

    Attributes:
        name: in the file.
        kind: ggml's type.
        stored: its bytes, uint8 [rows, bytes of a row]; a vector is one row.
        shape: of the whole tensor, float32.
        order: int64 [rows], the stored row of each row where llama.cpp has changed their order; None where not.
        added: what is to be added to every value, as llama.cpp has taken it off.
        start: first row.
        stop: row after the last.
        alone: whether what lies beside the file is no part of the checkpoint.
        plain: whether nobody is to ask for its codes.
    """

    name: str
    kind: str
    stored: FileTensor
    shape: tuple[int, ...]
    order: Tensor | None
    added: float
    start: int
    stop: int
    alone: bool = False
    plain: bool = False

    @staticmethod
    def of(path: Path, name: str, entry: GgufEntry, *, alone: bool = False) -> "GgufTensor":
        """The whole tensor as it lies in the file."""
        rows = 1 if len(entry.shape) == 1 else int(np.prod(entry.shape[:-1]))
        stored = FileTensor(path, entry.offset, torch.uint8, (rows, entry.nbytes // rows))
        return GgufTensor(name, entry.kind, stored, entry.shape, None, 0.0, 0, entry.shape[0], alone)

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(torch.float32, (self.stop - self.start, *self.shape[1:]))

    @property
    def source(self) -> FileTensor:
        """Where the bytes lie, for whoever asks which file a tensor comes from."""
        return self.stored

    @property
    def reading(self) -> str:
        """How the bytes become these values, for whoever tells two sources apart by their bytes."""
        order = "" if self.order is None else " ".join(map(str, self.order.tolist()))
        return f"{self.kind} {self.start}:{self.stop} {self.added} {order}"

    @property
    def origin(self) -> str:
        """What left the codes, in words."""
        return f"{self.kind} of the GGUF left it"

    @property
    def is_coded(self) -> bool:
        """Whether its values are codes times half-precision scales, so that `grid` gives them."""
        return not self.plain and self.kind in _GRIDS and len(self.shape) == 2 and self.added == 0

    def as_floats(self) -> "GgufTensor":
        """The same values, without their codes."""
        return replace(self, plain=True)

    def rows(self, start: int, stop: int) -> "GgufTensor":
        """A part of these rows."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def load(self) -> Tensor:
        """The values: float32, `info.shape`.

        Raises:
            HikuiError: the file is gone or ends before the tensor does.
        """
        turn = _turning(self.kind)
        if len(self.shape) == 1:
            values = torch.from_numpy(np.array(turn(self.stored.load().numpy())[0]))
            values = (values if self.order is None else values[self.order])[self.start : self.stop]
            return values + self.added if self.added else values
        out = torch.empty(self.stop - self.start, int(np.prod(self.shape[1:])))
        for at, blocks in self._parts():
            out[at : at + blocks.shape[0]] = torch.from_numpy(turn(blocks))
        if self.added:
            out += self.added
        return out.view(self.info.shape)

    def groups(self) -> Tensor:
        """The group of each input column: int64 [K]."""
        return torch.arange(self.shape[1]) // _GROUP

    def grid(self) -> Grid:
        """Fields, zeros and scales of these rows, where `is_coded`.

        Raises:
            HikuiError: as `load`.
        """
        zero = _GRIDS[self.kind]
        n, k = self.info.shape
        fields = torch.empty(n, k, dtype=torch.uint8)
        scale = torch.empty(n, k // _GROUP)
        for at, part in self._parts():
            blocks = part.reshape(part.shape[0], k // _GROUP, -1)
            halves = np.ascontiguousarray(blocks[..., :_SCALE]).view(np.float16)[..., 0]
            codes = _fields(self.kind, blocks[..., _SCALE:])
            fields[at : at + len(part)] = torch.from_numpy(codes.reshape(len(part), k))
            scale[at : at + len(part)] = torch.from_numpy(halves.astype(np.float32))
        return Grid(fields, torch.full((n, k // _GROUP), zero, dtype=torch.int16), scale)

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """The stored bytes of these rows in their order, some at a time, each with its first row: uint8 [rows, bytes].

        Raises:
            HikuiError: as `load`.
        """
        first = self.stored.shape[0] // self.shape[0]  # stored rows that one row of a tensor of more dimensions takes
        start, stop = self.start * first, self.stop * first
        step = max(1, _PART // max(1, self.shape[-1]))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            if self.order is None:
                yield begin - start, self.stored.rows(begin, end).load().numpy()
                continue
            # Rows keep within their head, so what lies between the first and the last of them is little.
            wanted = self.order[begin:end]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            span = self.stored.rows(low, high).load()
            yield begin - start, span[wanted - low].numpy()


def _fields(kind: str, codes: np.ndarray) -> np.ndarray:
    """The unsigned fields of blocks without their scales, uint8."""
    if kind == "Q4_0":
        # Column j of a group is the low nibble of byte j, column 16 + j its high one.
        return np.concatenate([codes & 15, codes >> 4], axis=-1)
    return codes ^ 128  # two's complement, moved to begin at 0


def _turning(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    found = dequantiser(kind)
    assert found is not None, "a file with such a tensor is refused when it is opened"
    return found

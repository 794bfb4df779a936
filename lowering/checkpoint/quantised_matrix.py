"""A matrix of a GPTQ or AWQ checkpoint as a source of floats, with the integer grid behind it.

The layouts are those that AutoGPTQ, GPTQModel and AutoAWQ (`gemm`) write. With K input and N output features, G groups
and b bits, all words int32:

    gptq  qweight [K·b/32, N]: each column one little-endian stream of fields, field k at bit b·k (so the fields of
          3 bits cross words); qzeros [G, N·b/32] the same along N; scales [G, N]; g_idx [K], the group of each column
    awq   qweight [K, N/8], qzeros [G, N/8]: nibble i of word j belongs to output 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i];
          scales [G, N]; groups follow each other

A weight is scale · (field − zero). Its product in float32 is exact: fields have at most 8 bits, float16 scales 11.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import FileTensor, TensorInfo

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output, of eight neighbours, that nibble i of an AWQ word belongs to."""

Zeros = Literal["plain", "less_one", "less_one_words"]
"""How zeros are stored: as they are; minus one; or minus one in every field of a whole word, borrows and all."""

_PART = 1 << 22
"""Weights dequantised at a time."""


class Grid(NamedTuple):
    """Some rows of a quantised matrix: weight [n, k] = scale[n, g(k)] · (fields[n, k] − zeros[n, g(k)]).

    `fields` uint8 [n, K], `zeros` int16 [n, G], `scale` float32 [n, G].
    """

    fields: Tensor
    zeros: Tensor
    scale: Tensor

    def codes(self, groups: Tensor) -> Tensor:
        """Field minus zero: int16 [n, K]; `groups` int64 [K] is the group of each column."""
        return self.fields.to(torch.int16) - self.zeros[:, groups]


class CodedMatrix(Protocol):
    """A matrix [N, K] of floats that are codes times scales, such as a checkpoint holds that is quantised already."""

    @property
    def info(self) -> TensorInfo: ...

    @property
    def origin(self) -> str:
        """What left the codes, in words."""

    def rows(self, start: int, stop: int) -> "CodedMatrix": ...

    def groups(self) -> Tensor:
        """The group of each input column: int64 [K]."""

    def grid(self) -> Grid:
        """Fields, zeros and scales of these rows."""


@dataclass(frozen=True)
class QuantisedMatrix:
    """Rows `start`…`stop`−1 of a quantised matrix [N, K], dequantised to float32 each time it is loaded.

    Attributes:
        name: the module's path in the checkpoint.
        method: `gptq` or `awq`.
        bits: of a field: 2, 3, 4 or 8; 4 for `awq`.
        qweight: the packed fields.
        qzeros: the packed zeros.
        scales: float [G, N].
        g_idx: integer [K]; None where each `group` columns have one.
        group: columns of a group, where `g_idx` is None.
        zeros: how `qzeros` is to be understood.
        symmetric: whether the checkpoint promises zeros in the middle; None where it says nothing.
        start: first row.
        stop: row after the last.
    """

    name: str
    method: Literal["gptq", "awq"]
    bits: int
    qweight: FileTensor
    qzeros: FileTensor
    scales: FileTensor
    g_idx: FileTensor | None
    group: int
    zeros: Zeros
    symmetric: bool | None
    start: int
    stop: int

    @property
    def in_features(self) -> int:
        words = self.qweight.shape[0]
        return words if self.method == "awq" else words * 32 // self.bits

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(torch.float32, (self.stop - self.start, self.in_features))

    @property
    def origin(self) -> str:
        """What left the codes, in words."""
        return f"{self.method} left it in {self.bits} bits"

    @property
    def source(self) -> FileTensor:
        """Where the fields lie, for whoever asks which file a tensor comes from."""
        return self.qweight

    def rows(self, start: int, stop: int) -> "QuantisedMatrix":
        """A part of these rows; nothing else of the fields is read then."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def load(self) -> Tensor:
        """The weights: float32 [rows, K].

        Raises:
            HikuiError: as `grid` and `groups`.
        """
        n, k = self.info.shape
        groups = self.groups()
        out = torch.empty(n, k)
        step = max(1, _PART // max(1, k))
        for start in range(0, n, step):
            part = self.rows(start, min(start + step, n)).grid()
            out[start : start + step] = part.codes(groups).float().mul_(part.scale[:, groups])
        return out

    def groups(self) -> Tensor:
        """The group of each input column: int64 [K].

        Raises:
            HikuiError: `g_idx` names a group that is not there, or its file is gone.
        """
        if self.g_idx is None:
            return torch.arange(self.in_features) // self.group
        found, count = self.g_idx.load().long(), self.scales.shape[0]
        if found.numel() and (int(found.min()) < 0 or int(found.max()) >= count):
            raise HikuiError(
                f"'{self.name}.g_idx' in {self.g_idx.path} names groups from {int(found.min())} to {int(found.max())}, "
                f"but its scales have {count}; give another copy of the checkpoint."
            )
        return found

    def grid(self) -> Grid:
        """Fields, zeros and scales of these rows.

        Raises:
            HikuiError: a file is gone or truncated, or the zeros do not say what they mean.
        """
        scale = read_columns(self.scales, self.start, self.stop).t().float().contiguous()
        return Grid(self._fields(), self._zeros()[:, self.start : self.stop].t().contiguous(), scale)

    def _fields(self) -> Tensor:
        if self.method == "gptq":
            words = read_columns(self.qweight, self.start, self.stop)
            return unpack_fields(words, self.bits).t().contiguous()
        first = self.start // 8
        words = read_columns(self.qweight, first, -(-self.stop // 8))
        return unpack_interleaved(words)[:, self.start - 8 * first : self.stop - 8 * first].t().contiguous()

    def _zeros(self) -> Tensor:
        """int16 [G, N], of all rows: they are few."""
        words = self.qzeros.load()
        if self.method == "awq":
            return unpack_interleaved(words).to(torch.int16)
        whole = self.zeros == "less_one_words" and 32 % self.bits == 0
        if whole:
            words = words + _one_in_each_field(self.bits)
        fields = unpack_fields(words.t(), self.bits).t().to(torch.int16)
        highest = (1 << self.bits) - 1
        if self.zeros == "less_one_words" and not whole:
            fields = (fields + 1) & highest
        elif self.zeros == "less_one":
            if bool((fields == highest).any()):
                raise HikuiError(
                    f"'{self.name}.qzeros' in {self.qzeros.path} holds {highest} where format gptq stores zeros minus "
                    f"one, and programs disagree whether that means 0 or {highest + 1}; write the checkpoint anew as "
                    "gptq_v2."
                )
            fields = fields + 1
        self._check_middle(fields)
        return fields

    def _check_middle(self, zeros: Tensor) -> None:
        """Zeros that are all one beside the middle come of a config that names the wrong one of the two formats."""
        middle = 1 << (self.bits - 1)
        beside = {"plain": middle - 1}.get(self.zeros, middle + 1)
        if self.symmetric is not False and zeros.numel() and bool((zeros == beside).all()):
            told, meant = ("gptq_v2", "gptq") if self.zeros == "plain" else ("gptq", "gptq_v2")
            raise HikuiError(
                f"All zeros of '{self.name}' are {beside}, one beside the middle of {self.bits} bits: the config says "
                f"checkpoint_format {told}, but the tensors in {self.qzeros.path} look like {meant}; mend the config."
            )


def unpack_fields(words: Tensor, bits: int) -> Tensor:
    """The fields of little-endian streams that run down the columns.

    Args:
        words: int32 [W, n], W a multiple of the words after which fields meet word boundaries again (3 for 3 bits).
        bits: of a field.

    Returns:
        uint8 [W·32/bits, n].
    """
    period = bits // math.gcd(32, bits)
    count, mask = 32 * period // bits, (1 << bits) - 1
    steps = words.unflatten(0, (-1, period))
    out = torch.empty(steps.shape[0], count, words.shape[1], dtype=torch.uint8)
    for field in range(count):
        word, bit = divmod(field * bits, 32)
        held = min(bits, 32 - bit)
        # A shift to the right copies the sign of a word; the mask takes that off again.
        value = (steps[:, word] >> bit) & ((1 << held) - 1)
        if held < bits:
            value = value | ((steps[:, word + 1] << held) & mask)
        out[:, field] = value
    return out.flatten(0, 1)


def unpack_interleaved(words: Tensor) -> Tensor:
    """The nibbles of AWQ words: int32 [rows, W] → uint8 [rows, 8·W], outputs in their order."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for nibble, output in enumerate(AWQ_ORDER):
        out[..., output] = (words >> (4 * nibble)) & 15
    return out.flatten(-2)


def read_columns(tensor: FileTensor, start: int, stop: int) -> Tensor:
    """Columns of a matrix in a file, [rows, stop − start]; no others are read.

    Raises:
        HikuiError: the file is gone or ends before the matrix does.
    """
    rows, columns = tensor.shape
    size = tensor.dtype.itemsize
    width = (stop - start) * size
    buffer = bytearray(rows * width)
    if not buffer:
        return torch.empty(rows, stop - start, dtype=tensor.dtype)
    view = memoryview(buffer)
    try:
        with tensor.path.open("rb") as file:
            for row in range(rows):
                file.seek(tensor.offset + (row * columns + start) * size)
                if file.readinto(view[row * width : (row + 1) * width]) < width:
                    raise HikuiError(f"{tensor.path} ends inside a tensor; fetch it again.")
    except OSError as error:
        raise HikuiError(f"{tensor.path} cannot be read: {error.strerror}.") from error
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(rows, stop - start)


def _one_in_each_field(bits: int) -> int:
    """The word whose every field is 1; below 2³¹ for every width."""
    return sum(1 << at for at in range(0, 32, bits))

"""Where the tensors lie inside a safetensors or `torch.save` file, without their data.

Safetensors headers are parsed here rather than by the library because a damaged file must be described by its sizes,
and because a tensor is read by offset, so that neither a mapping nor a handle stays open.
"""

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import FileTensor
from hikui.lowering.json_text import DuplicateKeyError, parse_json

_SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_HEADER_LIMIT = 100_000_000
"""The safetensors format allows no longer header."""


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """Parses the header of a safetensors file.

    Format: https://github.com/huggingface/safetensors#format.

    Returns:
        Where each tensor lies; nothing of the data is read.

    Raises:
        HikuiError: The file is truncated or malformed, or has a dtype that is not supported.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            text = file.read(min(length, size, _HEADER_LIMIT))
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}.") from error
    if len(head) < 8:
        raise HikuiError(f"{path} is truncated: {size} bytes do not hold a safetensors header; fetch it again.")
    if length > _HEADER_LIMIT:
        raise HikuiError(f"{path} is no safetensors file: it claims a header of {length} bytes.")
    if len(text) < length:
        raise HikuiError(f"{path} is truncated: its header alone takes {8 + length} bytes, the file has {size}.")
    try:
        header = parse_json(text, unique=True)
        entries = {key: entry for key, entry in sorted(header.items()) if key != "__metadata__"}
    except DuplicateKeyError as error:
        raise HikuiError(f"{path} is corrupt: its safetensors header holds {error}.") from error
    except (ValueError, AttributeError) as error:
        raise HikuiError(f"{path} is corrupt: its safetensors header is not a JSON object.") from error
    tensors = {key: _entry(path, key, entry, 8 + length) for key, entry in entries.items()}
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if size < expected:
        raise HikuiError(f"{path} is truncated: {expected} bytes are expected, {size} found; fetch it again.")
    if size > expected:
        raise HikuiError(f"{path} is corrupt: {expected} bytes are expected, {size} found.")
    _refuse_overlaps(path, tensors, 8 + length)
    return tensors


def _refuse_overlaps(path: Path, tensors: dict[str, FileTensor], start: int) -> None:
    """The format wants the tensors side by side: no byte is of two of them, and none of no one."""
    end, last = start, ""
    for key, tensor in sorted(tensors.items(), key=lambda entry: (entry[1].offset, entry[1].nbytes, entry[0])):
        if tensor.offset < end:
            raise HikuiError(f"{path} is corrupt: '{key}' lies where '{last}' does, by the header.")
        if tensor.offset > end:
            raise HikuiError(f"{path} is corrupt: by the header {tensor.offset - end} bytes before '{key}' are unused.")
        end, last = tensor.offset + tensor.nbytes, key


def _entry(path: Path, key: str, entry: Any, start: int) -> FileTensor:
    try:
        name, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int for number in (*shape, begin, end)):
            raise TypeError("no whole number")
    except (KeyError, TypeError, ValueError) as error:
        raise HikuiError(f"{path} is corrupt: the header entry of '{key}' is malformed.") from error
    if name not in _SAFETENSORS_DTYPES:
        raise HikuiError(f"The tensor '{key}' in {path} has dtype {name}; hikui reads float and plain integer tensors.")
    dtype = _SAFETENSORS_DTYPES[name]
    need = math.prod(shape) * dtype.itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != need:
        raise HikuiError(
            f"{path} is corrupt: '{key}' ({name} {list(shape)}) takes {need} bytes, its header says {end - begin}."
        )
    return FileTensor(path, start + begin, dtype, shape)


def read_pickle(path: Path) -> dict[str, FileTensor]:
    """Finds the tensors inside a `torch.save` file, without running code from it or loading its data.

    Raises:
        HikuiError: The file is damaged, older than torch 1.6's zip format, or holds something else than tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        # Under a fake mode torch.load builds no storages and notes where each one starts in the file.
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for one kind of damage
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise HikuiError(f"{path} cannot be read ({reason}); fetch it again or convert it to safetensors.") from error
    if not isinstance(content, dict):
        raise HikuiError(f"{path} holds a {type(content).__name__}, not named tensors.")
    size = path.stat().st_size
    tensors = {}
    for key, value in sorted(content.items(), key=lambda entry: str(entry[0])):
        if not isinstance(value, Tensor):
            continue
        if not isinstance(key, str):
            raise HikuiError(f"{path} names a tensor {key!r:.80}, which is no text; convert it to safetensors.")
        if value.layout != torch.strided:
            raise HikuiError(f"The tensor '{key}' in {path} is sparse; convert it to a dense one.")
        base = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if base is None or not value.is_contiguous():
            raise HikuiError(f"The tensor '{key}' in {path} is not stored in one piece; convert it to safetensors.")
        offset = base + value.storage_offset() * value.dtype.itemsize
        tensors[key] = FileTensor(path, offset, value.dtype, tuple(value.shape))
        if offset + tensors[key].nbytes > size:
            raise HikuiError(f"{path} is truncated: '{key}' ends at byte {offset + tensors[key].nbytes} of {size}.")
    return tensors

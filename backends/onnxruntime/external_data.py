"""The weights' file: written tensor by tensor from the store, mapped by ONNX Runtime and read in place."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import WeightStore

ALIGNMENT = 4096
"""A page, so that every tensor of the mapping is aligned for the kernels' vector loads."""


_INTEGERS = (torch.int64, torch.int32)

_SMALL = 1024
"""Integers up to so many bytes are part of the model itself: operators may take shapes, axes and bounds from them, and
ONNX Runtime reads those before it maps the file."""


def write(
    weights: dict[str, ir.Value],
    store: WeightStore,
    path: Path,
    progress: Callable[[str, int, int], None],
) -> None:
    """Writes the tensors of `weights` to `path`, in their order, and makes each value refer to its place there.

    Small integers become part of their values instead.

    Only one tensor is in memory at a time.

    Raises:
        HikuiError: the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            for done, (key, value) in enumerate(weights.items()):
                progress("weights", done, len(weights))
                tensor = store.load(key).contiguous()
                if tensor.dtype in _INTEGERS and tensor.numel() * tensor.element_size() <= _SMALL:
                    value.const_value = ir.Tensor(tensor.numpy(), name=key)
                    continue
                offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                file.seek(offset)
                file.write(tensor.numpy().data)
                length = tensor.numel() * tensor.element_size()
                assert value.dtype is not None, f"the exporter types the weight {key}"
                value.const_value = ir.ExternalTensor(
                    path.name, offset, length, value.dtype, shape=ir.Shape(tensor.shape), name=key, base_dir=path.parent
                )
    except OSError as error:
        raise HikuiError(
            f"{path} cannot be written: {error.strerror}; free some space or choose another folder."
        ) from error
    progress("weights", len(weights), len(weights))

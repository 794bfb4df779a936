"""Runs an artefact of the backend `tvm` with TVM's runtime alone: no compiler is loaded."""

import ctypes
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from hikui.backends.tvm.index import ALIGNMENT, INDEX, LIBRARY, Index, map_parameters, read_index
from hikui.backends.tvm.native.board import Board, BoardRunner
from hikui.lowering.artefact.target import core_count, cpu_features
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.steps import check_ids, check_length

if TYPE_CHECKING:
    from hikui.lowering.artefact.generate import Runner

_CPU = 1
_POOLED_ALLOCATOR = 2


class TvmRunner:
    """A lowered model.

    Args:
        directory: the artefact.
        emulate: run the artefact's own program under qemu-user, instead of its library in this process.

    Raises:
        HikuiError: a file is missing or damaged, the CPU lacks a feature, or there is no emulator.
    """

    def __init__(self, directory: str | Path, *, emulate: bool = False) -> None:
        directory = Path(directory)
        index = read_index(directory)
        self.context_length = index.context_length
        self.vocabulary = index.vocabulary
        self._index = index
        if emulate and index.emulator_cpu is None:
            raise HikuiError(f"Target {index.target} cannot be emulated; run the artefact on a machine of its kind.")
        board = Board(index.triple, index.emulator_cpu)
        self._inner: Runner = BoardRunner(directory, board) if emulate else _InProcess(directory, index)

    def claims(self) -> dict[str, object]:
        """What `model.index` says of what the manifest says too, under the manifest's names."""
        index = self._index
        return {
            "target.name": index.target,
            "target.triple": index.triple,
            "target.features": index.features,
            "target.emulator_cpu": index.emulator_cpu,
            "model.context_length": index.context_length,
            "model.vocabulary": index.vocabulary,
            "model.layers": len(index.caches),
            "model.eos_token_ids": index.eos_token_ids,
        }

    def reset(self) -> None:
        """Forgets every token. The cache is left as it is: nothing reads beyond the tokens that it holds."""

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of int64 tokens [T], with `past` tokens in the cache.

        Raises:
            HikuiError: the tokens do not fit the cache or are not in the vocabulary, or the program gives something
                else than the index says.
        """
        if past < 0 or tokens.size == 0:
            raise HikuiError(f"{tokens.size} tokens after {past} are no step; give at least one, after none or more.")
        check_length(tokens.size, past, self.context_length)
        check_ids(tokens, self.vocabulary)
        return self._inner.forward(tokens, past)

    def close(self) -> None:
        """Gives up the weights and the caches."""
        self._inner.close()


class _InProcess:
    """The artefact's library in this process, with its weights mapped."""

    def __init__(self, directory: Path, index: Index) -> None:
        missing = sorted(set(index.features) - cpu_features())
        if missing:
            raise HikuiError(
                f"This machine's CPU lacks {', '.join(missing)}, which the model was lowered for; "
                "lower it for another --target."
            )
        self.context_length = index.context_length
        self._vocabulary = index.vocabulary
        self._weights: Any = tvm_ffi.Array(_map_weights(directory, index))
        tensors = [tensor for cache in index.caches for tensor in cache.tensors(index.context_length)]
        try:
            self._caches = [
                tvm_ffi.from_dlpack(_aligned_zeros(each.nbytes, each.dtype, each.shape)) for each in tensors
            ]
        except MemoryError:
            total = sum(tensor.nbytes for tensor in tensors)
            raise HikuiError(f"There is no memory for the caches of {directory}, {total} bytes.") from None
        self._main: Any = _load_main(directory / LIBRARY)

    def reset(self) -> None:
        """Nothing reads beyond the tokens that the cache holds."""

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        step, before = (
            tvm_ffi.from_dlpack(_aligned(np.asarray(values, np.int64))) for values in (tokens[None], np.array([past]))
        )
        try:
            logits = np.from_dlpack(self._main(step, before, *self._caches, self._weights))
        except (RuntimeError, TypeError, ValueError, AttributeError, BufferError) as error:
            raise HikuiError(f"The model's program failed: {str(error).strip().splitlines()[-1]}.") from None
        if logits.dtype != np.float32 or logits.shape != (1, tokens.size, self._vocabulary):
            shape = "×".join(map(str, logits.shape))
            raise HikuiError(
                f"The model gives {shape} of {logits.dtype} for {tokens.size} tokens, but {INDEX} says a vocabulary of "
                f"{self._vocabulary}; copy the artefact again."
            )
        return np.asarray(logits[0], np.float32)

    def close(self) -> None:
        self._main, self._caches, self._weights = None, [], None


@cache
def _load_runtime() -> None:
    """Makes the virtual machine known to the process; TVM's runtime registers it when it is loaded."""
    # TVM takes every x86 for one with two threads a core, and binds the calling thread to one of them.
    os.environ.setdefault("TVM_NUM_THREADS", str(core_count()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    library = metadata.distribution("apache-tvm").locate_file("tvm/lib/libtvm_runtime.so")
    ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL)


def _aligned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that begins where compiled code may load whole vectors: code that computes on ids does."""
    held = _aligned_zeros(values.nbytes, values.dtype, values.shape)
    held[...] = values
    return held


def _aligned_zeros(nbytes: int, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _map_weights(directory: Path, index: Index) -> list[Any]:
    # `read_index` has checked that every tensor lies inside the file and has the bytes of its shape.
    mapping = map_parameters(directory, index)
    tensors = []
    for weight in index.weights:
        view = mapping[weight.offset : weight.offset + weight.nbytes].view(weight.dtype).reshape(weight.shape)
        tensors.append(tvm_ffi.from_dlpack(np.asarray(view)))
    return tensors


def _load_main(library: Path) -> Any:
    if not library.is_file():
        raise HikuiError(f"{library} is missing; copy the artefact again.")
    _load_runtime()
    try:
        machine = tvm_ffi.load_module(str(library))["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        return machine["main"]
    except (RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise HikuiError(f"{library} cannot be loaded: {reason}; copy or lower the artefact again.") from None

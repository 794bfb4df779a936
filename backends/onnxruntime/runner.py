"""Runs ONNX Runtime artefacts: in this process where the machine fits, under qemu-user where it is emulated."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from hikui.backends.onnxruntime.emulation import EmulatedModel
from hikui.backends.onnxruntime.ort_run import LoadError, OrtModel, describe
from hikui.lowering.errors import HikuiError


class OrtRunner:
    """An ONNX Runtime artefact behind the interface of a runner.

    Args:
        directory: where the backend wrote the model.
        emulate: run it under qemu-user, for an artefact of another architecture.
        threads: threads for a step; None leaves the choice to ONNX Runtime.

    Raises:
        HikuiError: the machine lacks a CPU feature, ONNX Runtime is too old, a file is missing or damaged, or there is
            nothing to emulate with.
    """

    def __init__(self, directory: Path, *, emulate: bool = False, threads: int | None = None) -> None:
        self._model: OrtModel | EmulatedModel | None
        try:
            self._description = describe(directory)
            self._model = EmulatedModel(directory, threads) if emulate else OrtModel(directory, threads)
        except LoadError as error:
            raise HikuiError(str(error)) from error
        self.context_length = self._model.context_length

    def claims(self) -> dict[str, object]:
        """What `model.json` and the model say of what the manifest says too, under the manifest's names."""
        description = self._description
        return {
            "target.name": description["target"],
            "target.triple": description["triple"],
            "target.features": tuple(description["features"]),
            "model.context_length": self.context_length,
        }

    def _loaded(self) -> OrtModel | EmulatedModel:
        if self._model is None:
            raise HikuiError("The runner is closed; make a new one.")
        return self._model

    def reset(self) -> None:
        """Forgets every token."""
        self._loaded().reset()

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of int64 tokens [T] that follow `past` ones in the cache.

        Raises:
            HikuiError: the tokens do not fit the cache, or a kernel fails.
        """
        try:
            return self._loaded().forward(tokens, past)
        except LoadError as error:
            raise HikuiError(str(error)) from error

    def close(self) -> None:
        """Gives up the session and its mapping."""
        if isinstance(self._model, EmulatedModel):
            self._model.close()
        self._model = None

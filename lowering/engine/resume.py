"""Finished work on disk, so that a run that was killed goes on where it stopped.

A folder belongs to one key: a hash of the model's weights, the recipe, the calibration windows and the code. What is
saved is whole or absent: written beside, synced, renamed. With no folder nothing is kept, and everything is done anew.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.files import write_whole
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import FileTensor

_PART = 1 << 24


@dataclass(frozen=True)
class Resume:
    """A place for finished work.

    Attributes:
        folder: where; None keeps nothing.
    """

    folder: Path | None = None

    def __bool__(self) -> bool:
        return self.folder is not None

    def scope(self, name: str) -> "Resume":
        """A place of its own inside this one."""
        return self if self.folder is None else Resume(self.folder / name)

    def path(self, name: str) -> Path:
        """The file of some saved work."""
        assert self.folder is not None, "nothing is kept"
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a name; does nothing where nothing is kept.

        Raises:
            HikuiError: the folder cannot take them.
        """
        if self.folder is None:
            return
        held = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        try:
            write_whole(self.path(name), partial(save_file, held))
        except OSError as error:
            raise HikuiError(
                f"{self.folder} cannot keep what is finished: {error.strerror}; make room, or run with --no-resume."
            ) from error

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under a name, or None.

        Raises:
            HikuiError: the file is damaged.
        """
        if self.folder is None or not self.path(name).is_file():
            return None
        try:
            return {key: tensor.clone() for key, tensor in load_file(self.path(name)).items()}
        except (OSError, SafetensorError) as error:
            raise HikuiError(f"{self.path(name)} is damaged ({error}); run again with --no-resume.") from None

    def need(self, name: str) -> dict[str, Tensor]:
        """What was saved under a name.

        Raises:
            HikuiError: the file is missing or damaged.
        """
        found = self.load(name)
        if found is None:
            raise HikuiError(f"{self.path(name)} is missing; run again with --no-resume.")
        return found

    def drop(self) -> None:
        """Removes the folder with everything in it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_key(program: Program, recipe: str, chunks: Iterable[Tensor]) -> str:
    """The key of a run: 32 hexadecimal digits over all that its result depends on.

    Args:
        program: as traced, before any pass.
        recipe: the resolved recipe.
        chunks: the calibration windows, int64.
    """
    digest = hashlib.sha256(f"{code_version()}\n{recipe}\n{program.config}\n".encode())
    for key in program.store.keys():
        source = program.store.source(key)
        digest.update(f"{key} {source.info.dtype} {source.info.shape}\n".encode())
        if isinstance(source, FileTensor):
            _hash_file(digest, source)
        else:
            digest.update(_bytes(source.load()))
    for chunk in chunks:
        digest.update(f"{tuple(chunk.shape)}".encode())
        digest.update(_bytes(chunk))
    return digest.hexdigest()[:32]


def _hash_file(digest: "hashlib._Hash", source: FileTensor) -> None:
    with source.path.open("rb") as file:
        file.seek(source.offset)
        left = source.nbytes
        while left > 0 and (part := file.read(min(left, _PART))):
            digest.update(part)
            left -= len(part)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


@cache
def code_version() -> str:
    """A hash of hikui's own sources that numbers depend on, and torch's version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("lowering", "passes"):
        sources = sorted((root / folder).rglob("*.py"))
        if not sources:
            raise HikuiError(
                f"{root / folder} holds no sources, so finished work cannot be told from another version's; install "
                "hikui anew, or run with --no-resume."
            )
        for path in sources:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

"""Finished work on disk, so that a run that was killed goes on where it stopped.

A folder belongs to one key: a hash of the model's weights, the recipe, the calibration windows and the code. What is
saved is whole or absent: written beside, synced, renamed. With no folder nothing is kept, and everything is done anew.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.files import write_whole
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import CodedSource, FileTensor

_PART = 1 << 24
_ROOT = Path(__file__).resolve().parents[2]
_NUMERIC_ROOMS = ("lowering", "passes")
_LIBRARIES = ("torch", "numpy", "scipy", "transformers", "tokenizers", "gguf")
_CODE = (".py", ".so", ".c", ".cc", ".h")


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


def run_key(program: Program, recipe: str, chunks: Iterable[Tensor], passes: Iterable[type] = ()) -> str:
    """The key of a run: 32 hexadecimal digits over all that its result depends on.

    Args:
        program: as traced, before any pass.
        recipe: the resolved recipe.
        chunks: the calibration windows, int64.
        passes: the classes of the recipe's passes, whose code counts wherever it comes from.
    """
    digest = hashlib.sha256(f"{code_version(passes)}\n{recipe}\n{program.config}\n".encode())
    for key in program.store.keys():
        source = program.store.source(key)
        digest.update(f"{key} {source.info.dtype} {source.info.shape}\n".encode())
        if isinstance(source, FileTensor):
            _hash_file(digest, source)
        elif isinstance(source, CodedSource):
            digest.update(f"{source.reading}\n".encode())
            _hash_file(digest, source.stored)
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


def code_version(passes: Iterable[type] = ()) -> str:
    """A hash of all code that numbers depend on: hikui's own, third parties' passes, and the libraries by version.

    Args:
        passes: classes of passes; those of hikui itself change nothing.

    Raises:
        HikuiError: the sources of some are not to be found.
    """
    digest = hashlib.sha256(_own_version().encode())
    roots = {root: None for kind in passes for root in _foreign_roots(kind)}
    for root in sorted(roots):
        _hash_sources(digest, root)
    return digest.hexdigest()


@cache
def _own_version() -> str:
    digest = hashlib.sha256()
    for library in _LIBRARIES:
        try:
            digest.update(f"{library} {version(library)}\n".encode())
        except PackageNotFoundError:
            # An environment may bring a library without its metadata; what it then is cannot be told.
            digest.update(f"{library}\n".encode())
    for folder in _NUMERIC_ROOMS:
        _hash_sources(digest, _ROOT / folder)
    return digest.hexdigest()


def _foreign_roots(kind: type) -> Iterator[Path]:
    """Folders, or the single file, of the package that a class comes from; none for one of hikui's own."""
    name, own = kind.__module__, __name__.partition(".")[0]
    if name.partition(".")[0] == own:
        return
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        # A namespace package is shared by strangers and has no file.
        if module is not None and getattr(module, "__file__", None):
            folders = getattr(module, "__path__", None)
            yield from (Path(folder) for folder in folders) if folders else (Path(str(module.__file__)),)
            return
    raise HikuiError(
        f"The pass {kind.__name__} comes from {name}, whose sources are not to be found, so finished work cannot be "
        "told from another version's; run with --no-resume."
    )


def _hash_sources(digest: "hashlib._Hash", root: Path) -> None:
    if root.is_dir():
        sources = sorted(path for path in root.rglob("*") if path.suffix in _CODE and path.is_file())
    else:
        sources = [root] if root.is_file() else []
    if not sources:
        raise HikuiError(
            f"{root} holds no sources, so finished work cannot be told from another version's; install it anew, or run "
            "with --no-resume."
        )
    for path in sources:
        digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())

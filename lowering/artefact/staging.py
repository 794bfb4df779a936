"""Output folders that are whole or absent: everything is made in a hidden sibling, which is renamed at the very end."""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from hikui.lowering.errors import HikuiError
from hikui.lowering.files import sync

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, so that of two runs which start at once the second sees the first."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class StagedFolder:
    """Makes a folder whole or not at all.

    While it is entered, `content` is what will become the folder and `scratch` is for temporary files. A process that
    is killed leaves a hidden sibling behind, which the next one with the same destination removes. A living one holds
    a lock on its own, and a second one beside it is refused.

    Args:
        destination: the folder to make.
        marker: a file whose presence says that an existing folder may be replaced.
        publish: whether `content` becomes the folder at the end; otherwise only the place is held meanwhile.

    Raises:
        HikuiError: the destination is something else than such a folder, cannot be written, or is being made.
    """

    def __init__(self, destination: Path, marker: str, *, publish: bool = True) -> None:
        self.destination = Path(os.path.abspath(destination))
        self._marker = marker
        self._publishes = publish

    def __enter__(self) -> "StagedFolder":
        self._refuse_strangers()
        parent = self.destination.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent):
                self._remove_stale()
                self._root = Path(tempfile.mkdtemp(prefix=self._prefix, suffix=".partial", dir=parent))
                self._lock = os.open(self._root, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.content = self._root / "content"
            self.scratch = self._root / "scratch"
            self.content.mkdir()
            self.scratch.mkdir()
        except OSError as error:
            raise self.failure(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None and self._publishes:
                self._publish()
        except OSError as problem:
            raise self.failure(problem) from problem
        finally:
            os.close(self._lock)
            shutil.rmtree(self._root, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (*_FULL, errno.EACCES, errno.EROFS):
            raise self.failure(error) from error

    def failure(self, error: OSError) -> HikuiError:
        """What a failed write means to the user."""
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return HikuiError(
                f"{self.destination} cannot be written: {reason}; make room or choose another -o. No part of an "
                "artefact was left."
            )
        return HikuiError(f"{self.destination} cannot be written: {reason}; choose another -o.")

    @property
    def _prefix(self) -> str:
        return f".{self.destination.name}."

    def _refuse_strangers(self) -> None:
        at = self.destination
        if at.is_symlink() or (at.exists() and not at.is_dir()):
            raise HikuiError(f"{at} exists and is not a folder; choose another -o.")
        if at.is_dir() and any(at.iterdir()) and not (at / self._marker).is_file():
            raise HikuiError(f"{at} holds something else than an artefact; choose another -o, or empty it.")

    def _remove_stale(self) -> None:
        for stale in sorted(self.destination.parent.iterdir()):
            # tempfile's own letters, so that what `out.v2` has left is not taken for what `out` has.
            if not re.fullmatch(rf"{re.escape(self._prefix)}[a-z0-9_]+\.partial", stale.name):
                continue
            try:
                lock = os.open(stale, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its run has just ended
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
            except BlockingIOError:
                raise HikuiError(
                    f"Another run is making {self.destination} at this moment; wait for it, or choose another -o."
                ) from None
            finally:
                os.close(lock)

    def _publish(self) -> None:
        for folder, _, files in os.walk(self.content, topdown=False):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        # Somebody else may have put something there since the start.
        self._refuse_strangers()
        if self.destination.exists():
            self.destination.rename(self._root / "replaced")
        self.content.rename(self.destination)
        sync(self.destination.parent)

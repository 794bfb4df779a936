"""Files that are whole or absent: written beside, synced and renamed."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Makes a file that is whole or absent, whenever the process is killed.

    Args:
        path: the file; one that is there is replaced, and a folder that is not there is made.
        write: writes the path that it is given, which lies beside; what it had written when it failed is removed.
        durable: bring it to the disk before it takes its name; not needed for what the same process reads.

    Raises:
        OSError: as `write`, or the disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        if durable:
            sync(partial)
        partial.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        # What went wrong first is what counts: the folder may be no folder.
        with suppress(OSError):
            partial.unlink()
        raise

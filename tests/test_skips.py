"""What is skipped is brought to account."""

import os
import shutil

import pytest

from tests.conftest import ROOT
from tests.skips import OPTION, unexpected

pytest_plugins = ["pytester"]


def test_a_reason_counts_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert unexpected(["nvcc is not installed", "root may write everywhere"]) == []
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reasons = ["root may write everywhere", "nvcc is not installed", "nvcc is not installed", "it was late"]
    assert unexpected(reasons) == ["it was late", "nvcc is not installed", "root may write everywhere"]


@pytest.mark.parametrize(("options", "status"), [((), 0), ((OPTION,), 1), ((OPTION, "-n", "1"), 1)])
def test_a_run_fails_for_a_skip_that_nobody_expects(
    options: tuple[str, ...], status: int, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.conftest import pytest_addoption, pytest_configure
        """
    )
    pytester.makepyfile(
        """
        import pytest
        def test_passes(): pass
        def test_is_skipped(): pytest.skip("it was late")
        """
    )
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == status
    assert ("UNEXPECTED SKIP: it was late" in result.stdout.str()) == bool(status)

"""Fixtures that every room shares."""

import os

# Before torch and NumPy are imported: small tests are quickest on one thread, and their sums stay the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

from tests.skips import OPTION, Account

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="fail where a test is skipped for no reason that holds here")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Account(), "account-of-skips")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that may lie beside the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "assets" / "models").is_dir():
        pytest.skip("the folder `shared` with the real models and texts does not lie beside the checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model that `hikui fetch smollm2` brings, a GGUF file."""
    from hikui.models.fetched import SMOLLM2

    found = SMOLLM2.path()
    if found is None:
        pytest.skip("smollm2 was not fetched (`hikui fetch smollm2`)")
    return found


@pytest.fixture(scope="session")
def reference() -> Path:
    """The checkpoint of the reference model that the project ships."""
    from hikui.models import reference

    return reference.path()

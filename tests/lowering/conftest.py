import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.cli import run
from hikui.lowering.app.lower import build, prepare
from hikui.lowering.app.request import Request
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.artefact.target import resolve
from hikui.lowering.errors import HikuiError
from hikui.models.synthetic import tiny_checkpoint

Command = Callable[..., tuple[int, str, str]]

STORIES = "\n<|endoftext|>\n".join(
    f"Once there was a {animal} who lived in a {place}. Every day the {animal} went out of the {place} to look for "
    f"{food}. One day it rained, and the {animal} stayed at home and was glad."
    for animal, place, food in (
        ("fox", "den", "mice"),
        ("bird", "nest", "worms"),
        ("bear", "cave", "honey"),
        ("frog", "pond", "flies"),
        ("cow", "barn", "grass"),
        ("mouse", "hole", "cheese"),
    )
)


@pytest.fixture
def hikui_command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process: status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    yield call
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a tokenizer of ASCII bytes."""
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of six short documents."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(STORIES)
    return path


@pytest.fixture(scope="session")
def prepared(tiny: Path) -> Prepared:
    """The tiny model after the recipe `rtn-4bit`."""
    return prepare(Request(tiny, "rtn-4bit"))


@pytest.fixture(scope="session")
def built(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The tiny model as an artefact for this machine; not to be changed."""
    try:
        resolve("host")
    except HikuiError as error:
        pytest.skip(str(error))
    return build(prepared, tmp_path_factory.mktemp("built") / "artefact", backend="tvm")


@pytest.fixture
def artefact(built: Artefact, tmp_path: Path) -> Artefact:
    """A copy of the artefact that a test may damage."""
    return Artefact.load(shutil.copytree(built.directory, tmp_path / "artefact"))

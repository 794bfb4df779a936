"""The list of passes, and how others join it."""

from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, EntryPoints
from typing import ClassVar

import pytest

import hikui.passes
from hikui.lowering.errors import HikuiError
from hikui.lowering.pipeline.contract import Pass
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import ENTRY_POINTS, PASSES, available


@dataclass(frozen=True)
class Ours(Pass):
    name: ClassVar[str] = "ours"


@dataclass(frozen=True)
class Imposter(Pass):
    name: ClassVar[str] = "rtn"


def test_every_pass_is_a_frozen_dataclass_whose_options_round_trip() -> None:
    assert len({kind.name for kind in PASSES}) == len(PASSES)
    for kind in PASSES:
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert kind.__doc__
        step = kind()
        assert str(step) == kind.name
        options = ",".join(f'{field.name}="{getattr(step, field.name)}"' for field in fields(step))
        assert parse_pipeline(f"{kind.name}{{{options}}}", PASSES) == [step]


def test_installed_passes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*names: str) -> None:
        found = EntryPoints(EntryPoint(name, f"{__name__}:{name}", ENTRY_POINTS) for name in names)
        monkeypatch.setattr(hikui.passes, "entry_points", lambda group: found.select(group=group))

    points("Ours")
    assert available() == (*PASSES, Ours)
    points("Imposter")
    with pytest.raises(HikuiError, match="'rtn', a name that is taken"):
        available()
    points("pytest")
    with pytest.raises(HikuiError, match="is no pass"):
        available()

"""Who may import whom: docs/architecture.md, held."""

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

LOWERING = (
    ("errors", "expressions", "progress", "files", "memory", "json_text"), ("huggingface", "yaml_text"), ("formats",),
    ("ir",), ("checkpoint", "engine"), ("trace", "pipeline"), ("artefact",), ("evaluation",), ("app",),
)  # fmt: skip
PASSES = (
    ("graph", "matrices"), ("gradients", "patterns"), ("measure",), ("quantise",),
    ("transform", "precision", "rewrite"), ("",),
)  # fmt: skip
"""Rooms by floor, from the ground up; the empty name is the folder's own `__init__`."""

FLOORS = {
    **{("lowering", room): floor for floor, rooms in enumerate(LOWERING) for room in rooms},
    **{("passes", room): floor for floor, rooms in enumerate(PASSES) for room in rooms},
}
TOPS = ("lowering", "passes", "backends", "models")


def imported(source: str) -> Iterator[str]:
    """Every dotted name that a file imports, at any depth of it; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> tuple[str, str] | None:
    """(folder, room) of a module of hikui; None of anything else, and of a whole folder where its room is not said."""
    first, *parts = dotted.split(".")
    if first != "hikui" or not parts or parts[0] not in TOPS:
        return None
    folder = ROOT / parts[0]
    inside = len(parts) > 1 and ((folder / parts[1]).is_dir() or (folder / f"{parts[1]}.py").is_file())
    return parts[0], parts[1] if inside else ""


def refusal(importer: tuple[str, str], target: tuple[str, str]) -> str | None:
    """Why a room may not import another, or None."""
    (here, room), (there, other) = importer, target
    if importer == target or (here, room) == ("lowering", "app"):
        return None
    if (there, other) == ("lowering", "app"):
        return "only lowering/app sees the whole"
    if here == there:
        if here not in ("lowering", "passes") or target not in FLOORS:
            return None
        return None if FLOORS[target] < FLOORS[importer] else "it does not lie below"
    return None if there == "lowering" and here != "lowering" else f"{here} does not see {there}"


FILES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))


def test_rooms_import_only_what_lies_below() -> None:
    assert len(FILES) > 150
    wrong = []
    for path in FILES:
        relative = path.relative_to(ROOT).with_suffix("")
        importer = room_of(".".join(("hikui", *relative.parts)).removesuffix(".__init__"))
        assert importer is not None
        if importer[0] in ("lowering", "passes") and importer[1]:
            assert importer in FLOORS, f"{relative} is in no room of the plan"
        for name in imported(path.read_text("utf-8")):
            target = room_of(name)
            if target is not None and (reason := refusal(importer, target)) is not None:
                wrong.append(f"{relative} imports {name}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        (("lowering", "ir"), ("lowering", "formats"), True),
        (("lowering", "formats"), ("lowering", "ir"), False),
        (("lowering", "trace"), ("lowering", "pipeline"), False),
        (("lowering", "evaluation"), ("passes", "graph"), False),
        (("lowering", "app"), ("passes", "graph"), True),
        (("passes", "quantise"), ("lowering", "engine"), True),
        (("passes", "quantise"), ("lowering", "app"), False),
        (("passes", "quantise"), ("backends", "tvm"), False),
        (("passes", "measure"), ("passes", "quantise"), False),
        (("passes", "transform"), ("passes", "precision"), False),
        (("backends", "tvm"), ("passes", "graph"), False),
        (("backends", "tvm"), ("backends", "kernels"), True),
        (("backends", "tvm"), ("lowering", "artefact"), True),
        (("models", "synthetic"), ("passes", ""), False),
    ],
)
def test_the_rule(importer: tuple[str, str], target: tuple[str, str], allowed: bool) -> None:
    assert (refusal(importer, target) is None) == allowed


def test_every_way_to_import_is_seen() -> None:
    source = (
        "import hikui.passes.graph\ndef f():\n    from hikui.lowering import app\n    from hikui.backends import tvm"
    )
    rooms = {room_of(name) for name in imported(source)}
    assert {("passes", "graph"), ("lowering", "app"), ("backends", "tvm")} <= rooms
    assert room_of("hikui.lowering.ir.program") == ("lowering", "ir")
    assert room_of("torch.fx") is None

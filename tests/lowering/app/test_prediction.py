"""hikui lower --dry-run: what it predicts against the artefact, and that lowering goes on from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hikui.lowering.app.lower import make_artefact, resume_folder
from hikui.lowering.app.prediction import predict
from hikui.lowering.app.request import Execution, Request, load_recipe
from hikui.lowering.app.speeds import read_speeds
from hikui.lowering.artefact.manifest import MANIFEST
from hikui.lowering.artefact.staging import StagedFolder
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format
from hikui.lowering.pipeline.recipe import CalibrationSettings
from tests.lowering.conftest import Command


def request(tiny: Path, stories: Path, recipe: str = "mixed-5.5bit") -> Request:
    few = CalibrationSettings(samples=2, tokens=24)
    return Request(
        tiny,
        load_recipe(recipe).model_copy(update={"calibration": few}),
        calibration=stories,
        target_bpw=None if recipe == "int4" else 7.0,
    )


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime"])
def test_it_is_what_becomes(tiny: Path, stories: Path, tmp_path: Path, backend: str) -> None:
    asked, output = request(tiny, stories), tmp_path / "out"
    predicted = predict(asked, output, backend=backend)
    assert not output.exists() and resume_folder(output).exists()
    seen: list[str] = []
    artefact = make_artefact(
        asked, output, backend=backend, execution=Execution(progress=lambda name, done, total: seen.append(name))
    )
    # What was measured before is not measured again.
    assert "sensitivity" not in seen and "rtn" in seen
    sizes = artefact.manifest.sizes
    assert predicted.block_bpw == pytest.approx(sizes.block_bpw, rel=1e-5)
    assert predicted.weight_bytes == sizes.weight_bytes
    # Rather too much than too little.
    assert sizes.total_bytes <= predicted.artefact_bytes < sizes.total_bytes + 3e6
    found: dict[str, int] = {}
    for site in artefact.manifest.sites.values():
        found[site.format] = found.get(site.format, 0) + 1
    assert predicted.formats == found
    assert predicted.cost > 0


def test_other_budgets_go_on_from_what_one_has_measured(tiny: Path, stories: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "out", list[str]()
    asked = request(tiny, stories)
    first = predict(asked, output)
    listen = Execution(progress=lambda name, done, total: seen.append(name))
    second = predict(replace(asked, target_bpw=6.4), output, execution=listen)
    assert second.block_bpw < first.block_bpw
    assert "sensitivity" not in seen
    with StagedFolder(output, MANIFEST), pytest.raises(HikuiError, match="Another run is making"):
        predict(asked, output)


@pytest.mark.parametrize(
    "quantiser",
    ["rtn: {bits: 8, group: 32}", "gptq: {bits: 4, group: 32}", "factorise: {bits: 3, iterations: 4}\n  - rtn"],
)
def test_sites_without_a_format_have_that_of_the_next_quantiser(
    tiny: Path, stories: Path, tmp_path: Path, quantiser: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    formats = "formats: int2-g32|int4-g32"
    steps = ["canonicalise", "calibrate: {gram: true}", f"sensitivity: {{{formats}}}"]
    steps += [f"assign: {{{formats}, target_bpw: 5, over: blocks}}", quantiser, "pack: {format: float32}"]
    steps += ["embedding", "activation", "fuse", "dead_code"]
    lines = "".join(f"  - {step}\n" for step in steps)
    recipe.write_text(f"schema: 1\nname: blocks\ncalibration: {{samples: 2, tokens: 24}}\npasses:\n{lines}")
    asked = Request(tiny, str(recipe), calibration=stories)
    predicted = predict(asked, tmp_path / "out")
    sizes = make_artefact(asked, tmp_path / "out").manifest.sizes
    assert predicted.block_bpw == pytest.approx(sizes.block_bpw, rel=1e-5)
    assert predicted.weight_bytes == sizes.weight_bytes


def bench(path: Path, **gmacs: float) -> Path:
    """As `hikui bench --json` writes it."""
    products = [
        {"format": f"{kind}-g128", "m": m, "gmacs": speed / m, "gbs": 1.0, "kernel": "generic"}
        for kind, speed in gmacs.items()
        for m in (1, 8)
    ]
    path.write_text(json.dumps({"isa": "generic", "rows": 4096, "columns": 4096, "products": products}))
    return path


def test_milliseconds_as_they_are_reckoned_and_as_a_budget(tiny: Path, stories: Path, tmp_path: Path) -> None:
    speeds = bench(tmp_path / "bench.json", int4=2.0, int8=1.0)
    asked = replace(request(tiny, stories), target_bpw=None, speeds=speeds)
    wide, narrow = (predict(replace(asked, target_bpw=bpw), tmp_path / "out") for bpw in (12.0, 6.3))
    assert wide.milliseconds is not None and narrow.milliseconds is not None
    assert set(wide.formats) == {"int8-g64"}
    sites = make_artefact(replace(asked, target_bpw=12.0), tmp_path / "made").manifest.sites.values()
    # A billion weights a second take a nanosecond each, columns that are padding too.
    times = [(s.out_features * Format.parse(s.format).padded_k(s.in_features) / 1e6, s.in_block) for s in sites]
    assert wide.milliseconds[1] == pytest.approx(sum(time for time, _ in times))
    assert wide.milliseconds[0] == pytest.approx(sum(time for time, inside in times if inside))
    assert narrow.milliseconds[1] < wide.milliseconds[1]
    between = (narrow.milliseconds[1] + wide.milliseconds[1]) / 2
    timed = predict(replace(asked, target_latency=between), tmp_path / "out")
    assert timed.milliseconds is not None and narrow.milliseconds[1] < timed.milliseconds[1] <= between


def test_what_a_budget_of_milliseconds_needs(tiny: Path, stories: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A budget in milliseconds needs the machine's speeds; run `hikui bench"):
        Request(tiny, "mixed-5.5bit", target_latency=1.0)
    speeds = bench(tmp_path / "bench.json", int4=2.0)
    with pytest.raises(UsageError, match="Recipe int4 has no pass assign, so a latency has no effect on it"):
        Request(tiny, "int4", target_latency=1.0, speeds=speeds).loaded_recipe()
    with pytest.raises(UsageError, match="says nothing of int8, which sites have; leave out --speeds, or measure it"):
        predict(replace(request(tiny, stories), speeds=speeds), tmp_path / "out")
    for content, said in (
        ("[]", "is not what `hikui bench --json` writes"),
        ('{"products": []}', "is not what `hikui bench --json` writes"),
        ('{"products": [{"format": "int9", "m": 1, "gmacs": 1}]}', "Format 'int9' is not known"),
        ('{"products": [{"format": "int4-g64", "m": 1, "gmacs": 0}]}', "greater than 0"),
        ('{"products": [{"format": "int4-g64", "m": 8, "gmacs": 1}]}', "it has no product with one row of activations"),
    ):
        speeds.write_text(content)
        with pytest.raises(HikuiError, match=said):
            read_speeds(speeds)
    with pytest.raises(HikuiError, match="No such file or directory; name what a machine has written"):
        read_speeds(tmp_path / "absent.json")


def test_a_recipe_without_a_budget_has_nothing_to_predict(tiny: Path, stories: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Recipe int4 has no pass that keeps to a budget, so there is nothing to"):
        predict(request(tiny, stories, "int4"), tmp_path / "out")


def test_the_command(hikui_command: Command, tiny: Path, stories: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = (
        str(tiny),
        "--recipe",
        "mixed-5.5bit",
        "--calibration",
        str(stories),
        "--target-bpw",
        "7",
        "-o",
        str(output),
        "--dry-run",
    )
    status, out, _ = hikui_command("lower", *options)
    assert status == 0 and "bits per weight in blocks" in out and "× int4-g64" in out
    assert not output.exists()
    status, out, _ = hikui_command("lower", *options, "--json")
    assert status == 0 and json.loads(out)["weight_bytes"] > 0
    speeds = str(bench(tmp_path / "bench.json", int4=2.0, int8=1.0))
    status, out, _ = hikui_command("lower", *options, "--speeds", speeds)
    assert status == 0 and "the products of a token: about" in out
    status, _, err = hikui_command("lower", *options[:-1], "--speeds", speeds)
    assert status == 2 and "--speeds has no effect without --target-latency or --dry-run" in err

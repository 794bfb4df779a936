"""hikui sensitivity: the table against the passes, the front against brute force, and the files it writes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hikui.lowering.app.lower import resume_folder
from hikui.lowering.app.request import Execution, Request
from hikui.lowering.app.sensitivity.picture import draw, role, roles
from hikui.lowering.app.sensitivity.table import Measure, SiteCosts, front, measure
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format
from hikui.lowering.pipeline.recipe import CalibrationSettings
from tests.lowering.conftest import Command

FORMATS = ("sign-g32", "int4-g32", "int8-channel")
FEW = CalibrationSettings(samples=2, tokens=24)


def costs_of(seed: int, count: int, names: tuple[str, ...] = FORMATS) -> list[SiteCosts]:
    """Sites of several shapes, each two of one group."""
    draws = np.random.default_rng(seed)
    return [
        SiteCosts(
            f"model.layers.{index}.up",
            f"g{index // 2}",
            index,
            (64 * (1 + index // 2), 128),
            dict(zip(names, sorted(draws.random(len(names)).tolist(), reverse=True), strict=True)),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_the_best_there_is(seed: int, mixed: bool) -> None:
    names = ("sign-g32", "mixed-g32-c32", "int8-channel") if mixed else FORMATS
    sites = costs_of(seed, 6, names)
    found = front(sites, names)
    every = []
    for picks in itertools.product(names, repeat=3 if mixed else 6):
        chosen = [pick for pick in picks for _ in range(2)] if mixed else list(picks)
        formats = [Format.parse(name) for name in chosen]
        nbytes = sum(fmt.nbytes(*site.shape) for site, fmt in zip(sites, formats, strict=True))
        nbytes += sum(fmt.permutation_nbytes(128) for fmt in formats[::2])
        every.append((nbytes, sum(site.costs[name] for site, name in zip(sites, chosen, strict=True))))
    weights = sum(site.weights for site in sites)
    for choice in found:
        budget = round(choice.bpw * weights / 8)
        assert choice.cost == pytest.approx(min(cost for nbytes, cost in every if nbytes <= budget), abs=1e-5)
        assert sum(choice.formats.values()) == 6
    for one, two in itertools.pairwise(found):
        assert one.bpw < two.bpw and one.cost > two.cost
    assert found[0].bpw == pytest.approx(8 * min(nbytes for nbytes, _ in every) / weights)
    assert found[-1].cost == pytest.approx(min(cost for _, cost in every))


@pytest.mark.parametrize("by", ["trial", "output", "pbar", "weight"])
def test_every_site_and_format_is_measured(tiny: Path, stories: Path, by: str) -> None:
    found = measure(Request(tiny, None, calibration=stories), FORMATS, by, texts=2, settings=FEW)  # type: ignore[arg-type]
    assert found.formats == FORMATS and len(found.sites) == 22
    assert found.tokens == (0 if by == "weight" else 48)
    for site in found.sites:
        assert list(site.costs) == list(FORMATS)
        assert site.costs["sign-g32"] > site.costs["int8-channel"] >= 0
    assert found.front[0].formats == {"sign-g32": 21}
    assert found.front[-1].formats == {"int8-channel": 21}


@pytest.mark.parametrize("by", ["output", "pbar", "weight"])
def test_costs_are_shared_out_among_columns(tiny: Path, stories: Path, by: Measure) -> None:
    request = Request(tiny, None, calibration=stories)
    plain = measure(request, FORMATS, by, settings=FEW)
    found = measure(request, FORMATS, by, settings=FEW, columns=16)
    for site, same in zip(found.sites, plain.sites, strict=True):
        assert replace(site, columns={}) == same
        assert list(site.columns) == list(FORMATS)
        for name, shares in site.columns.items():
            assert len(shares) == -(-site.shape[1] // 16)
            assert sum(shares) == pytest.approx(site.costs[name], rel=1e-9)
    with pytest.raises(UsageError, match="A trial rounds whole sites, so it says nothing of columns"):
        measure(request, FORMATS, "trial", columns=16)


def test_where_half_of_a_cost_is() -> None:
    def of(*shares: float) -> float:
        return SiteCosts("s", "s", 0, (16, 16), {}, {"int4-g32": shares}).half_in("int4-g32")

    assert of(1.0, 5.0, 2.0, 1.0) == 0.25
    assert of(1.0, 1.0, 1.0, 1.0) == 0.5
    assert of(3.0, -1.0, 1.5, 0.5) == 0.25
    assert of(0.0, 0.0) == 0.0


def test_a_killed_run_goes_on_and_says_the_same(tiny: Path, stories: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def until(last: int) -> Execution:
        def progress(name: str, done: int, total: int) -> None:
            if name == "trial" and done >= last:
                raise KilledError

        return Execution(progress=progress)

    request, kept = Request(tiny, None, calibration=stories), resume_folder(tmp_path / "table.json")
    whole = measure(request, FORMATS, settings=FEW)
    with pytest.raises(KilledError):
        measure(request, FORMATS, settings=FEW, execution=until(8), kept=kept)
    assert list(kept.rglob("stage-0.safetensors"))
    again = measure(request, FORMATS, settings=FEW, kept=kept)
    assert again.as_json() == whole.as_json()
    assert not kept.exists()


def test_sites_of_all_blocks_stand_under_each_other() -> None:
    sites = costs_of(0, 3)
    assert [role(site) for site in sites] == ["up"] * 3
    assert roles(sites) == ["up"]


def test_the_picture_is_the_same_each_time(tiny: Path, stories: Path) -> None:
    pytest.importorskip("matplotlib")
    found = measure(Request(tiny, None, calibration=stories), FORMATS, "weight")
    one = draw(found, "svg")
    assert one == draw(found, "svg")
    text = one.decode()
    assert all(name in text for name in ("mlp.up_proj", *FORMATS))
    assert draw(found, "png").startswith(b"\x89PNG")


def test_the_command(hikui_command: Command, tiny: Path, stories: Path, tmp_path: Path) -> None:
    table, plot = tmp_path / "table.json", tmp_path / "map.svg"
    options = (str(tiny), "--formats", "sign-g32,int4-g32", "--texts", "1", "--calibration", str(stories))
    status, out, _ = hikui_command("sensitivity", *options, "-o", str(table), "--plot", str(plot))
    assert status == 0
    assert "model.layers.0.self_attn.q_proj" in out and "least sum of costs" in out
    found = json.loads(table.read_text("utf-8"))
    assert len(found["sites"]) == 22 and found["measure"] == "trial"
    assert plot.read_text("utf-8").startswith("<?xml")
    status, out, _ = hikui_command("sensitivity", str(tiny), "--by", "weight", "--columns", "16")
    assert status == 0 and "groups of 16 columns that has half of what it costs" in out
    status, out, _ = hikui_command("sensitivity", *options, "--json")
    assert status == 0 and json.loads(out) == found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--formats", "int4-g64"), "There is nothing to choose from; give two formats or more"),
        (("--formats", "int4-g64,int5-g64"), "Format 'int5-g64' is not known"),
        (("--plot", "map.pdf"), "--plot map.pdf is neither .svg nor .png"),
    ],
)
def test_wrong_requests(hikui_command: Command, tiny: Path, options: tuple[str, ...], sentence: str) -> None:
    status, out, err = hikui_command("sensitivity", str(tiny), *options)
    assert (status, out) == (2, "")
    assert sentence in err


def test_formats_that_are_one_are_no_choice(tiny: Path) -> None:
    with pytest.raises(UsageError, match="There is nothing to choose from"):
        measure(Request(tiny, None), ("int4-g64", "int4-g64"))

"""The code of docs/writing-a-pass.md and the recipe of docs/recipes.md, as they stand there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hikui.lowering.app.request import available_passes
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.program import SITE
from hikui.lowering.pipeline import recipe
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.passes.graph import float_sites, weight_of
from tests.passes.helpers import canonical, traced

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The page's first block as a module."""
    module = ModuleType("writing_a_pass")
    sys.modules[module.__name__] = module
    exec(compile(blocks("writing-a-pass.md", "python")[0], "writing-a-pass.md", "exec"), module.__dict__)
    return module


def test_the_pass_clamps_and_leaves_the_given_program_alone(page: ModuleType) -> None:
    before = canonical("llama")
    limited = Pipeline([page.Clamp(deviations=1.5)]).run(before, PassContext())
    assert limited is not before
    for old, new in zip(float_sites(before), float_sites(limited), strict=True):
        assert old.meta[SITE] == new.meta[SITE]
        original = before.store.load(before.weight_of(weight_of(old)))
        limit = 1.5 * original.std()
        assert torch.equal(limited.store.load(limited.weight_of(weight_of(new))), original.clamp(-limit, limit))
        assert bool((original.abs() > limit).any())


def test_it_says_when_there_is_nothing_to_do_and_what_is_wrong(page: ModuleType) -> None:
    program = canonical("llama")
    result = page.Clamp(deviations=1000.0).run(program, PassContext())
    assert result.program is program
    assert not result.modified
    with pytest.raises(UsageError, match="above 0"):
        page.Clamp(deviations=0.0)
    with pytest.raises(HikuiError, match="run `canonicalise` first"):
        Pipeline([page.Clamp()]).run(traced("llama"), PassContext())


def test_the_way_to_run_it_runs(page: ModuleType) -> None:
    names = {"Clamp": page.Clamp, "program": traced("llama")}
    exec(compile(blocks("writing-a-pass.md", "python")[1], "writing-a-pass.md", "exec"), names)
    steps = names["steps"]
    assert isinstance(steps, list)
    assert [step.name for step in steps] == ["canonicalise", "clamp", "rtn"]
    assert steps[1].deviations == 3.0


def test_the_recipe_of_the_recipes_page_is_one() -> None:
    parsed = recipe.parse(blocks("recipes.md", "yaml")[0], "recipes.md", available_passes())
    assert parsed.overrides == {"lm_head": "int8-g64", r"layers\.0\.": "int8-g64"}
    section = (DOCS / "recipes.md").read_text("utf-8").partition("## The shipped ones")[2].partition("##")[0]
    table = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert sorted(table) == sorted(recipe.shipped())

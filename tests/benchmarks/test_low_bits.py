"""The variants on the way below two bits: each is a recipe that can be built, and no two are the same."""

import argparse
from pathlib import Path

import yaml
from benchmarks.low_bits import recipe, variants

from hikui.lowering.app.request import available_passes
from hikui.lowering.pipeline import recipe as recipes


def test_every_variant_is_a_recipe_of_its_own(tmp_path: Path) -> None:
    found = variants(argparse.Namespace(group=64, share=0.15, bits=2.0))
    built = {}
    for name, passes in found.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe(name, passes, 96), sort_keys=False), "utf-8")
        loaded = recipes.load(path, available_passes())
        built[name] = [str(step) for step in loaded.build(available_passes())]
        assert loaded.calibration.training == (96 if name.endswith(("qat", "distil")) else 0)
    assert len({tuple(steps) for steps in built.values()}) == len(found)
    assert any("by=pbar" in step for step in built["columns-pbar"])
    assert any("staged=true" in step for step in built["columns-pbar-staged"])

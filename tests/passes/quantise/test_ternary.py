"""adopt on float matrices that are ternary: their own codes, a scale a row, and nothing else taken for one."""

import json
from pathlib import Path

import pytest
import torch

from hikui.lowering.app.cli import run
from hikui.lowering.app.lower import lower as lower_model
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import Adopt
from hikui.passes.graph import float_sites, matrix_shape, sites, weight_of
from tests.passes.helpers import assert_same, assert_settled, canonical, lower

HEAD = "lm_head"


def ternary(share_of_zeros: float = 0.4) -> Program:
    """A llama whose sites in blocks are ternary, their scales powers of two so that float16 holds them."""
    program = canonical("llama").clone()
    generator = torch.Generator().manual_seed(3)
    for node in float_sites(program):
        if node.meta[SITE] == HEAD:
            continue
        n, k = matrix_shape(node)
        signs = torch.randint(0, 2, (n, k), generator=generator) * 2.0 - 1
        signs[torch.rand(n, k, generator=generator) < share_of_zeros] = 0
        scale = 2.0 ** -torch.randint(2, 6, (n, 1), generator=generator)
        program.store.put(program.weight_of(weight_of(node)), signs * scale)
    return program


@pytest.mark.parametrize(("zeros", "kind"), [(0.4, "ternary-channel"), (0.0, "sign-channel")])
def test_codes_and_scales_are_those_of_the_matrix(zeros: float, kind: str) -> None:
    program = ternary(zeros)
    result = Adopt().run(program, PassContext())
    found = {node.meta[SITE]: node for node in sites(result.program)}
    for node in float_sites(program):
        site, weight = node.meta[SITE], program.store.load(program.weight_of(weight_of(node)))
        if site == HEAD:
            assert found[site] in float_sites(result.program)
            continue
        packed = PackedLinear.of(found[site])
        assert packed.format == Format.parse(kind)
        assert torch.equal(packed.dense(result.program.store), weight)
    assert_same(program, result.program)
    assert len(result.notes) == len(found) - 1
    assert all(f": {kind}, as the matrix is" in note and "float16" not in note for note in result.notes)
    assert_settled(Adopt(), lower(result.program, "rtn"))


def test_scales_that_float16_does_not_hold_are_rounded_and_that_is_said() -> None:
    program = ternary()
    node = float_sites(program)[0]
    key = program.weight_of(weight_of(node))
    program.store.put(key, program.store.load(key) * (1 + 2.0**-13))
    note = next(note for note in Adopt().run(program, PassContext()).notes if node.meta[SITE] in note)
    assert note.endswith("its scales rounded to float16 by 0.0001 at most")


def test_one_other_value_far_down_makes_it_a_float_matrix() -> None:
    program = ternary()
    node = next(node for node in float_sites(program) if matrix_shape(node)[0] > 16)
    key = program.weight_of(weight_of(node))
    weight = program.store.load(key).clone()
    weight[-1, -1] = 0.3
    program.store.put(key, weight)
    after = Adopt().run(program, PassContext()).program
    assert node.meta[SITE] in {left.meta[SITE] for left in float_sites(after)}


def test_float_models_and_empty_matrices_are_nothing_to_adopt() -> None:
    with pytest.raises(HikuiError, match="from a GGUF or a BitNet, so there is nothing to adopt"):
        Adopt().requires(canonical("llama"))
    program = canonical("llama").clone()
    for node in float_sites(program):
        key = program.weight_of(weight_of(node))
        program.store.put(key, torch.zeros_like(program.store.load(key)))
    with pytest.raises(HikuiError, match="there is nothing to adopt"):
        Adopt().requires(program)


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime"])
def test_a_real_bitnet_loses_nothing(
    shared: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 million parameters trained with ternary weights: all sites ternary, perplexity within 10⁻³ of float."""
    model, text, recipe = shared / "assets/models/bitstories-3m-bitnet", tmp_path / "text", tmp_path / "as-it-is.yaml"
    text.write_text((shared / "assets/text/tinystories/valid.txt").read_text("utf-8")[:12000], "utf-8")
    recipe.write_text(
        "schema: 1\nname: as-it-is\npasses: [canonicalise, adopt, {rtn: {bits: 8, group: 64}}, "
        "{pack: {format: float32}}, {embedding: {format: float32}}, fuse, dead_code]\n"
    )
    found = {}
    for name, chosen in (("float", "float"), ("packed", str(recipe))):
        artefact = lower_model(model, tmp_path / name, recipe=chosen, backend=backend)
        assert run(["eval", str(artefact.directory), "--text", str(text), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)["perplexity"]
    kinds = {site.format for site in artefact.manifest.sites.values() if site.in_block}
    assert kinds == {"ternary-channel"}
    assert artefact.manifest.sizes.block_bpw < 1.75
    assert found["packed"] == pytest.approx(found["float"], rel=1e-3)

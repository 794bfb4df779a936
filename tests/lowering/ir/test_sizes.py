import math
from dataclasses import replace
from pathlib import Path

import pytest

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.lower import prepare
from hikui.lowering.app.request import Request, load_recipe
from hikui.lowering.artefact import report
from hikui.lowering.formats import Format
from hikui.lowering.ir import sizes
from hikui.lowering.ir.packed import PackedEmbedding, is_packed, is_packed_embedding
from hikui.lowering.progress import no_progress
from hikui.models.synthetic import tiny_checkpoint


def test_the_float_program_counts_every_parameter_once(tiny: Path, prepared: Prepared) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    measured = sizes.measure(prepared.traced)
    assert sum(site.parameters for site in measured.sites) == linear
    assert measured.true_bpw == 32
    everything = 4 * sum(p.numel() for p in model.parameters())
    # Beside the parameters the graph holds the rotary frequencies.
    assert everything <= measured.total_bytes < everything + 4096


def test_the_lowered_program_has_the_bits_of_its_formats(prepared: Prepared) -> None:
    measured = sizes.measure(prepared.program)
    floats = {site.name: site for site in sizes.measure(prepared.origin or prepared.traced).sites}
    assert {site.name for site in measured.sites} == set(floats)
    for site in measured.sites:
        fmt = Format.parse(site.format)
        assert site.format == ("int8-g64" if site.name == "lm_head" else "int4-g128")
        assert (site.out_features, site.in_features) == (floats[site.name].out_features, floats[site.name].in_features)
        assert site.nbytes == fmt.nbytes(site.out_features, site.in_features)
        assert site.true_bits == pytest.approx(fmt.true_bits(site.out_features, site.in_features))


def test_three_totals_of_what_weights_take(prepared: Prepared) -> None:
    measured, floats = sizes.measure(prepared.program), sizes.measure(prepared.traced)
    inside = [site for site in measured.sites if site.name != "lm_head"]
    assert [site.in_block for site in measured.sites] == [site in inside for site in measured.sites]
    own = 8 * sum(site.nbytes for site in inside) / sum(site.parameters for site in inside)
    assert measured.block_bpw == pytest.approx(own)
    assert measured.block_bpw < measured.true_bpw < measured.all_bpw < 8
    # The head is not tied: the embedding is a matrix of its own, and norms are floats.
    stored = {prepared.program.weight_of(node) for node in prepared.program.weight_nodes()}
    infos = [prepared.program.store.info(key) for key in stored]
    assert measured.total_bytes == sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)
    assert measured.parameters == floats.parameters
    assert measured.all_bpw == pytest.approx(8 * measured.total_bytes / floats.parameters)
    assert floats.block_bpw == floats.true_bpw == 32
    assert floats.all_bpw == pytest.approx(32, rel=1e-3)


def test_without_a_model_the_weights_tell_how_many_parameters_there_are(prepared: Prepared) -> None:
    counted = sizes.measure(replace(prepared.program, parameters=None))
    assert counted.parameters == pytest.approx(sizes.measure(prepared.program).parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "copies"), [("int4", 1), ("int4-small", 1), ("gptq-3bit", 1), ("rotation-gptq-3bit", 2)]
)
def test_a_tied_matrix_is_one_of_the_parameters_however_often_it_is_stored(
    recipe: str, copies: int, tmp_path: Path, stories: Path
) -> None:
    folder = tiny_checkpoint("qwen2", tmp_path / "model")
    program = prepare(Request(folder, recipe, calibration=stories if copies == 2 else None)).program
    measured = sizes.measure(program)
    tables = [node for node in program.graph.nodes if is_packed_embedding(node)]
    (table,) = map(PackedEmbedding.of, tables)
    assert sum(map(is_packed, table.weight.users)) == (1 if copies == 1 else 0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert measured.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), abs=64)


@pytest.fixture(scope="module")
def branched(tiny: Path, stories: Path) -> Prepared:
    return prepare(Request(tiny, "int4-branch", calibration=stories))


def test_a_branch_is_counted_fused_and_unfused(branched: Prepared, tiny: Path, stories: Path) -> None:
    fused = sizes.measure(branched.program)
    assert {site.rank for site in fused.sites} == {16}
    assert fused.branch_bytes == 0
    recipe = load_recipe("int4-branch").with_options({"fuse": {"branch": False}})
    apart = sizes.measure(prepare(Request(tiny, recipe, calibration=stories)).program)
    assert {site.rank for site in apart.sites} == {0}
    assert apart.branch_bytes > 0
    assert apart.linear_bytes == fused.linear_bytes
    assert apart.total_bytes == fused.total_bytes


def test_the_report_measures_each_site_against_its_float_matrix(prepared: Prepared, branched: Prepared) -> None:
    plain, helped = (
        {
            site.name: site.weight_error
            for site in report.site_reports(p.program, sizes.measure(p.program), p.origin, no_progress)
        }
        for p in (prepared, branched)
    )
    assert plain.keys() == helped.keys()
    for name, error in plain.items():
        assert error is not None
        assert 0 < error < (0.02 if name == "lm_head" else 0.2)
    inner = [name for name in plain if name != "lm_head"]
    assert sum(helped[name] or 0 for name in inner) < 0.95 * sum(plain[name] or 0 for name in inner)


def test_the_report_undoes_the_order_of_mixed_columns(tiny: Path, stories: Path) -> None:
    recipe = load_recipe("mixed-1.6bit").with_options({"mixed": {"group": 32}})
    p = prepare(Request(tiny, recipe, calibration=stories))
    reports = report.site_reports(p.program, sizes.measure(p.program), p.origin, no_progress)
    mixed = [site for site in reports if site.format.startswith("mixed")]
    assert len(mixed) == len(reports) - 1
    for site in mixed:
        # Signs alone lose 1 − 2/π of a Gaussian's square, 0.6 of its norm; columns of another order lose over 1.
        assert site.weight_error is not None and 0.2 < site.weight_error < 0.65


def test_every_stored_byte_is_for_something(prepared: Prepared, branched: Prepared, tiny: Path, stories: Path) -> None:
    mixed = prepare(
        Request(tiny, load_recipe("mixed-1.6bit").with_options({"mixed": {"group": 32}}), calibration=stories)
    )
    for program in (prepared.traced, prepared.program, branched.program, mixed.program):
        measured = sizes.measure(program)
        assert sum(measured.kinds.values()) == measured.total_bytes
        assert set(measured.kinds) <= set(sizes.KINDS_OF_BYTES)
    floats, packed, of_mixed = (sizes.measure(each.program).kinds for each in (branched, prepared, mixed))
    assert "branches" in floats and "orders" in of_mixed and "branches" not in packed and "orders" not in packed
    expected = {"codes": 0, "scales": 0}
    for site in sizes.measure(prepared.program).sites:
        fmt = Format.parse(site.format)
        shape = fmt.scale_shape(site.out_features, site.in_features)
        assert shape is not None
        expected["scales"] += 2 * math.prod(shape)
        expected["codes"] += site.nbytes - 2 * math.prod(shape)
    assert {kind: packed[kind] for kind in expected} == expected

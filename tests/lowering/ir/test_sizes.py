from pathlib import Path

import pytest

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.lower import prepare
from hikui.lowering.app.request import Request, load_recipe
from hikui.lowering.artefact import report
from hikui.lowering.formats import Format
from hikui.lowering.ir import sizes
from hikui.lowering.progress import no_progress


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
        assert site.format == ("int8-g64" if site.name == "lm_head" else "int4-g64")
        assert (site.out_features, site.in_features) == (floats[site.name].out_features, floats[site.name].in_features)
        assert site.nbytes == fmt.nbytes(site.out_features, site.in_features)
        assert site.true_bits == pytest.approx(fmt.true_bits(site.out_features, site.in_features))


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

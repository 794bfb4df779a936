"""Costs without the noise of few texts, and those between ranks that were tried."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import FORMAT, SENSITIVITY, Program
from hikui.passes import Assign
from hikui.passes.graph import matrix_shape, sites
from hikui.passes.precision.fitted_costs import between, fitted
from tests.passes.helpers import assert_settled, canonical, lower

TRIED = ("factors-1", "factors-2", "factors-3.5")


def named(rows: list[list[float]]) -> dict[str, dict[str, float]]:
    return {f"s{i}": {f"f{j}": value for j, value in enumerate(row)} for i, row in enumerate(rows)}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), formats=st.integers(1, 4))
def test_what_has_no_noise_stays(seed: int, count: int, formats: int) -> None:
    generator = np.random.default_rng(seed)
    level, effect = np.exp(generator.normal(size=(count, 1))), np.exp(generator.normal(size=formats))
    costs = named((level * effect).tolist())
    for site, of_site in fitted(costs, dict.fromkeys(costs, "kind")).items():
        assert of_site == pytest.approx(costs[site], rel=1e-9)


def test_least_squares_of_the_logarithms() -> None:
    generator = np.random.default_rng(3)
    logs = generator.normal(size=(5, 3))
    costs = named(np.exp(logs).tolist())
    # One unknown a site and one a format; that their sum may be shared between them changes no cost.
    design = np.zeros((15, 8))
    for row, (site, fmt) in enumerate(np.ndindex(5, 3)):
        design[row, site] = design[row, 5 + fmt] = 1
    expected = design @ np.linalg.lstsq(design, logs.ravel(), rcond=None)[0]
    found = np.log([list(of_site.values()) for of_site in fitted(costs, dict.fromkeys(costs, 0)).values()])
    assert np.allclose(found.ravel(), expected, atol=1e-9)


def test_noise_is_taken_out() -> None:
    generator = np.random.default_rng(4)
    exact = np.exp(generator.normal(size=(60, 1))) * np.array([8.0, 4.0, 2.0, 1.0])
    noisy = exact * np.exp(0.3 * generator.normal(size=exact.shape))
    costs = named(noisy.tolist())
    found = np.array([list(of_site.values()) for of_site in fitted(costs, dict.fromkeys(costs, 0)).values()])
    before, after = (np.log(held / exact).std() for held in (noisy, found))
    # Of four numbers a site one is left to be uncertain.
    assert after < 0.6 * before


def test_other_kinds_and_other_formats_are_fitted_apart() -> None:
    costs = {"a": {"f": 1.0, "g": 2.0}, "b": {"f": 3.0, "g": 3.0}, "c": {"f": 5.0, "h": 1.0}}
    assert fitted(costs, {"a": 1, "b": 2, "c": 1}) == costs
    assert fitted({"a": {"f": 0.0}, "b": {"f": 0.0}}, {"a": 1, "b": 1}) == {"a": {"f": 0.0}, "b": {"f": 0.0}}
    # A cost of nothing has no logarithm, and does not take the others along.
    costs = {"a": {"f": 0.0, "g": 1.0}, "b": {"f": 2.0, "g": 1.0}, "c": {"f": 2.0, "g": 3.0}}
    found = fitted(costs, dict.fromkeys(costs, 1))
    assert found["a"] == costs["a"] and found["b"] != costs["b"]
    assert found["b"]["f"] == pytest.approx(math.sqrt(2) * (4 / 3) ** 0.25)


def test_between_two_ranks_the_logarithm_is_straight() -> None:
    shape, wanted = (512, 512), Format.parse("factors-r512")
    low, high = Format.parse("factors-r256"), Format.parse("factors-r896")
    costs = {"int2-g64": 9.0, str(high): 0.25, str(low): 4.0}
    bits = [fmt.true_bits(*shape) for fmt in (low, wanted, high)]
    share = (bits[1] - bits[0]) / (bits[2] - bits[0])
    assert between(costs, shape, wanted) == pytest.approx(4.0 * (0.25 / 4.0) ** share)
    assert between(costs, shape, low) == pytest.approx(4.0)
    assert between(costs, shape, high) == pytest.approx(0.25)
    for beyond in ("factors-r224", "factors-r928"):
        assert between(costs, shape, Format.parse(beyond)) is None


def tried(program: Program) -> Program:
    """Costs that fall by e for a bit, with chance in them."""
    work, generator = program.clone(), np.random.default_rng(5)
    for node in sites(work):
        shape = matrix_shape(node)
        level = math.prod(shape) * math.exp(generator.normal())
        node.meta[SENSITIVITY] = {
            name: level * math.exp(0.5 * generator.normal() - Format.parse(name).true_bits(*shape)) for name in TRIED
        }
    return work


def test_ranks_that_were_not_tried_are_candidates() -> None:
    program = tried(canonical("llama"))
    for node in sites(program):
        del node.meta[SENSITIVITY]["factors-2"]
    # Matrices as small as these have factors of 32 or 64: what is as good is taken from the front of the list.
    formats = "formats=factors-2|factors-1|factors-3.5,target_bpw=2.6,over=blocks"
    with pytest.raises(HikuiError, match=r"has no sensitivity for factors-2"):
        lower(program, f"assign{{{formats}}}")
    after = lower(program, f"assign{{{formats},costs=fitted}}")
    assert "factors-2" in {node.meta.get(FORMAT) for node in sites(after)}
    with pytest.raises(HikuiError, match=r"has no sensitivity for int4-g32"):
        lower(program, "assign{formats=int4-g32,target_bpw=9,over=blocks,costs=fitted}")


def test_a_second_run_changes_nothing() -> None:
    after = lower(tried(canonical("llama")), f"assign{{formats={'|'.join(TRIED)},target_bpw=2.6,costs=fitted}}")
    assert_settled(Assign(2.6, "|".join(TRIED), costs="fitted"), after)

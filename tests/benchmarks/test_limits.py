import platform

import pytest
from benchmarks.kernels.contestant import Workload
from benchmarks.kernels.limits import Limits, PeakLimit, ReadLimit

from hikui.lowering.artefact.target import cpu_features

PRODUCTS = {"vnni": 64, "avx2_integer": 32, "amx_int8": 16 * 16 * 64 / 3, "sdot": 16}


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits()


def test_the_units_are_those_of_this_cpu(limits: Limits) -> None:
    features = cpu_features()
    assert ("vnni" in limits.units) == ("avx512_vnni" in features)
    assert ("avx2_integer" in limits.units) == ("avx2" in features)
    assert ("sdot" in limits.units) == ("asimddp" in features)
    assert "fma_float32" in limits.units


@pytest.mark.parametrize("threads", [1, 2])
def test_work_is_counted(limits: Limits, threads: int) -> None:
    for unit, name in enumerate(limits.units):
        if name in PRODUCTS:
            assert limits.compute(unit, 1000, threads) == 1000 * 12 * PRODUCTS[name] * threads


def test_reading_takes_longer_for_more_bytes(limits: Limits) -> None:
    workload = Workload(1, 64, 64, 1, True)
    prepared = ReadLimit(limits).prepare(workload)
    assert prepared.nbytes == 256 << 20
    (step,) = prepared.steps
    step()


def test_the_first_unit_is_the_one_that_shares_are_given_of(limits: Limits) -> None:
    peak = PeakLimit(limits)
    assert peak.name == limits.units[0]
    assert peak.prepare(Workload(1, 64, 64, 2, True)).macs == 2 * limits.compute(0, 300_000, 1)
    if platform.machine() == "x86_64":
        assert peak.name in ("vnni", "avx2_integer")


def test_the_survey_names_every_limit(limits: Limits) -> None:
    survey = limits.survey(1)
    assert set(survey) > {"read_1_streams_1t_gbs", "read_8_streams_1t_gbs", "read_8_streams_2t_gbs", "read_l2_1t_gbs"}
    assert all(value > 0 for name, value in survey.items() if not name.startswith("amx"))

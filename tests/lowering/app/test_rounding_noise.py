"""What a rounded program may differ by follows from how far it is from itself."""

from pathlib import Path

import numpy as np
import pytest

from hikui.lowering.app.assemble import reference_numbers, rounding_noise
from hikui.lowering.app.lower import lower, prepare
from hikui.lowering.app.request import Request
from hikui.lowering.artefact.manifest import REFERENCE_TOLERANCE
from hikui.lowering.artefact.verify import (
    MOST_TOLERANCE,
    ROUNDED_TOLERANCE,
    TOLERANCE,
    allowed_difference,
    difference,
)
from hikui.lowering.ir.interpreter import ReferenceRunner


def test_float_programs_make_no_noise(tiny: Path) -> None:
    program = prepare(Request(tiny, "float")).program
    assert rounding_noise(program, reference_numbers(program)) < 1e-4


def test_noise_is_the_largest_difference_of_any_way_to_take_the_tokens(tiny: Path) -> None:
    program = prepare(Request(tiny, "rtn-4bit")).program
    reference = reference_numbers(program)
    noise = rounding_noise(program, reference)
    runner, count = ReferenceRunner(program), reference.tokens.size
    found = []
    for step in (count, 3):
        runner.reset()
        parts = [runner.forward(reference.tokens[at : at + step], at) for at in range(0, count, step)]
        found.append(difference(np.concatenate(parts)[reference.prompt - 1 :], reference))
    assert noise == max(found)


def test_the_manifest_allows_what_the_noise_asks_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hikui.lowering.app.assemble.rounding_noise", lambda program, reference: 0.1)
    made = lower(tiny, tmp_path / "rounded", recipe="rtn-4bit")
    assert made.manifest.metrics[REFERENCE_TOLERANCE] == pytest.approx(0.3)
    plain = lower(tiny, tmp_path / "float", recipe="float")
    assert plain.manifest.metrics[REFERENCE_TOLERANCE] == TOLERANCE


@pytest.mark.parametrize(
    ("noise", "allowed"), [(0.0, ROUNDED_TOLERANCE), (0.01, ROUNDED_TOLERANCE), (0.1, 0.3), (0.4, MOST_TOLERANCE)]
)
def test_what_is_allowed_has_a_floor_and_a_ceiling(noise: float, allowed: float) -> None:
    assert allowed_difference(noise) == pytest.approx(allowed)

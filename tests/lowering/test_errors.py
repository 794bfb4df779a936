"""The errors' exit codes, and the suggestion at the end of a sentence."""

import pytest

from hikui.lowering.errors import HikuiError, UsageError, VerificationError, did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "end"),
    [
        ("calibrat", ["calibrate", "canonicalise"], " Did you mean 'calibrate'?"),
        ("rtm", ["rtn", "gptq"], " Did you mean 'rtn'?"),
        ("zzz", ["rtn", "gptq"], ""),
        ("rtn", [], ""),
    ],
)
def test_the_nearest_known_name_or_nothing(name: str, known: list[str], end: str) -> None:
    assert did_you_mean(name, known) == end
    assert did_you_mean(name, dict.fromkeys(known)) == end
    assert did_you_mean(name, iter(known)) == end


def test_of_several_near_names_only_the_nearest_is_said() -> None:
    assert did_you_mean("int4-g46", ["int4-g128", "int4-g64", "int8-g64"]) == " Did you mean 'int4-g64'?"


def test_exit_statuses_tell_the_input_the_request_and_the_program_apart() -> None:
    assert (HikuiError.exit_code, UsageError.exit_code, VerificationError.exit_code) == (1, 2, 3)
    assert issubclass(UsageError, HikuiError) and issubclass(VerificationError, HikuiError)

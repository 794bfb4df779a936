"""Every number that a user can give is in its range, or refused as a wrong request."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from hikui.lowering.app.cli.application import application
from hikui.lowering.app.request import available_passes
from hikui.lowering.artefact.generate import Sampling
from hikui.lowering.errors import UsageError
from hikui.lowering.pipeline.text import make_pass
from tests.lowering.conftest import Command

HUGE = 10**30
WRONG: dict[type, tuple[float, ...]] = {
    float: (float("nan"), float("inf"), -float("inf"), -1.0),
    int: (-1, HUGE, -HUGE),
}


def pass_options() -> Iterator[tuple[str, str, type]]:
    for name, kind in sorted(available_passes().items()):
        hints = get_type_hints(kind)
        for option in dataclasses.fields(kind):
            if hints[option.name] in WRONG:
                yield name, option.name, hints[option.name]


def command_options() -> Iterator[tuple[str, str, type]]:
    for command in application().registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated:
                annotated, info = get_args(hint)[:2]
                written = getattr(info, "param_decls", None) or (f"--{parameter.replace('_', '-')}",)
                for kind in WRONG:
                    if kind in (annotated, *get_args(annotated)):
                        yield name, written[-1], kind


def test_there_are_numbers_to_look_at() -> None:
    assert {option for _, option, _ in pass_options()} >= {"damping", "alpha", "target_bpw", "share", "seed", "rank"}
    assert {option for _, option, _ in command_options()} >= {"--temperature", "--target-bpw", "--memory", "--jobs"}


@pytest.mark.parametrize(("name", "option", "kind"), list(pass_options()))
def test_no_pass_takes_a_number_out_of_range(name: str, option: str, kind: type) -> None:
    for value in WRONG[kind]:
        for given in (value, str(value)):
            with pytest.raises(UsageError, match=name):
                make_pass(name, {option: given}, available_passes().values())


@pytest.mark.parametrize(("name", "option", "kind"), list(command_options()))
def test_no_command_takes_a_number_out_of_range(hikui_command: Command, name: str, option: str, kind: type) -> None:
    needed = {"lower": ["m", "-o", "o"], "compare": ["m", "--text", "t"], "bench": []}.get(name, ["m"])
    for value in WRONG[kind]:
        status, out, err = hikui_command(name, *needed, option, value)
        assert (status, out) == (2, ""), (name, value, err)
        assert option in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seeds", "nan"), ("--seeds", "1e400"), ("--seeds", "-1"), ("--seeds", f"{HUGE}"), ("--seeds", "0.5"),
     ("--target-bpw", "nan"), ("--target-bpw", "4,inf"), ("--target-bpw", "-1"), ("--target-bpw", "0")],
)  # fmt: skip
def test_no_list_takes_a_number_out_of_range(hikui_command: Command, option: str, value: str) -> None:
    status, out, err = hikui_command("compare", "reference", "--text", "t", "--recipes", "int8", option, value)
    assert (status, out) == (2, "")
    assert option in err


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"seed": -1}])
def test_no_sampling_takes_a_number_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        Sampling(**wrong)

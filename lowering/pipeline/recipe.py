"""Recipes: which passes run on a model, in which order and with which options.

A recipe is a YAML file. One pydantic model stands behind the file, the Python API and the JSON Schema for editors
(docs/recipe.schema.json); the options of a pass are the fields of its dataclass, so a pass describes itself.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from hikui.lowering.errors import UsageError, did_you_mean
from hikui.lowering.expressions import compiled
from hikui.lowering.formats import Format
from hikui.lowering.pipeline.contract import Pass
from hikui.lowering.pipeline.text import make_pass
from hikui.lowering.yaml_text import compose, construct

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).resolve().parents[2] / "recipes"

Location: TypeAlias = tuple[int | str, ...]
Passes: TypeAlias = Mapping[str, type[Pass]]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


def _pattern(text: str) -> str:
    try:
        compiled(text)
    except re.error as error:
        raise ValueError(f"'{text}' is not a regular expression ({error})") from None
    return text


def _format(text: str) -> str:
    try:
        return str(Format.parse(text))
    except UsageError as error:
        raise ValueError(str(error)) from None


class CalibrationSettings(BaseModel):
    """How much of the calibration text is read: windows of `tokens` tokens, drawn with `seed`.

    The first `samples` of them are measured on; passes that learn read `training` windows, or the same where it is 0,
    and `long` windows of four times as many tokens beside them, for what is further back than the others reach.
    """

    model_config = _STRICT

    samples: int = Field(default=32, ge=1, description="windows of text")
    training: int = Field(default=0, ge=0, description="windows that passes which learn read; 0: the same windows")
    long: int = Field(
        default=0, ge=0, description="windows of four times as many tokens to learn from beside `training`"
    )
    tokens: int = Field(default=256, ge=2, description="tokens in a window; the context length bounds it")
    seed: int = Field(default=0, ge=0, description="seed of the generator that draws the windows")

    @model_validator(mode="after")
    def _long_beside_others(self) -> "CalibrationSettings":
        if self.long and not self.training:
            raise ValueError("`long` windows are learned from beside those of `training`; give that too")
        return self

    @property
    def windows(self) -> int:
        """How many are drawn."""
        return max(self.samples, self.training)


class Step(BaseModel):
    """One pass with its options: `- canonicalise`, or `- rtn: {bits: 4, group: 64}`."""

    model_config = _STRICT

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and not value.keys() & {"name", "options"}:
            (name, options), *_ = value.items()
            return {"name": name, "options": {} if options is None else options}
        if isinstance(value, dict) and value.keys() == {"name", "options"}:
            return value
        raise ValueError("a pass is a name, or one name with its options: `- rtn: {bits: 4, group: 64}`")


class Recipe(BaseModel):
    """A recipe as it is written; `build` makes the passes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(
        validation_alias="schema", serialization_alias="schema", description="version of the recipe's own form"
    )
    name: str = Field(description="what the report calls it", min_length=1)
    description: str = Field(default="", description="one line for people")
    passes: list[Step] = Field(min_length=1, description="the passes, in order")
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)
    overrides: dict[Annotated[str, AfterValidator(_pattern)], Annotated[str, AfterValidator(_format)]] = Field(
        default_factory=dict,
        description="regular expression of site names → format; the first that matches counts, each must match",
    )

    def build(self, available: Passes) -> list[Pass]:
        """The passes, with their options checked.

        Overrides become passes right after `canonicalise`.

        Raises:
            UsageError: an unknown pass or option, or a value that a pass does not take.
        """
        where = f"Recipe {self.name}: "
        built = [make_pass(step.name, step.options, available.values(), where) for step in self.passes]
        if not self.overrides:
            return built
        after = next((index for index, step in enumerate(built) if step.names_sites), None)
        if after is None:
            raise UsageError(f"{where}overrides need the pass 'canonicalise', which names the sites.")
        fixed = [
            make_pass("override", {"sites": pattern, "format": text}, available.values(), where)
            for pattern, text in self.overrides.items()
        ]
        return [*built[: after + 1], *fixed, *built[after + 1 :]]

    def with_options(self, options: Mapping[str, Mapping[str, object]]) -> "Recipe":
        """The recipe with some options of some passes set, keyed by pass name; a pass that it lacks is an error."""
        missing = sorted(options.keys() - {step.name for step in self.passes})
        if missing:
            raise UsageError(
                f"Recipe {self.name} has no pass {missing[0]}, so {_list(options[missing[0]])} has no effect; "
                "choose a recipe that has it."
            )
        steps = [
            step.model_copy(update={"options": {**step.options, **options.get(step.name, {})}}) for step in self.passes
        ]
        return self.model_copy(update={"passes": steps})

    def with_budget(self, target_bpw: float, available: Passes) -> "Recipe":
        """The recipe with another budget in bits per weight.

        Raises:
            UsageError: none of its passes keeps to a budget.
        """
        return self._with("budget", target_bpw, f"target_bpw={target_bpw:g} has no effect; choose", available)

    def with_size(self, megabytes: float, available: Passes) -> "Recipe":
        """The recipe with a budget in megabytes (10⁶ bytes) of all weights.

        Raises:
            UsageError: none of its passes keeps to one.
        """
        return self._with("size_budget", megabytes, "a size has no effect on it; choose", available)

    def with_latency(self, milliseconds: float, speeds: str, available: Passes) -> "Recipe":
        """The recipe with a budget of what the products of a token take.

        Args:
            milliseconds: on one thread.
            speeds: of each kind of weights, in 10⁹ weights a second, such as `int4=14.2|sign=40`.
            available: the passes that a recipe may name.

        Raises:
            UsageError: none of its passes keeps to one.
        """
        timed = self._with("latency_budget", milliseconds, "a latency has no effect on it; choose", available)
        keepers = {step.name for step in self.passes if _option(available, step.name, "latency_budget")}
        return timed.with_options({name: {"speeds": speeds} for name in keepers})

    def _with(self, kept: str, value: float, otherwise: str, available: Passes) -> "Recipe":
        """With one budget, in the option that a pass names as `kept`, in the place of any other."""
        keepers = [step.name for step in self.passes if _option(available, step.name, kept)]
        if not keepers:
            able = " or ".join(sorted(name for name in available if _option(available, name, kept)))
            raise UsageError(f"Recipe {self.name} has no pass {able}, so {otherwise} a recipe that has it.")
        others = {"size_budget", "latency_budget"} - {kept}
        options: dict[str, dict[str, object]] = {}
        for name in keepers:
            options[name] = {option: 0.0 for other in sorted(others) if (option := _option(available, name, other))}
            options[name][_option(available, name, kept)] = value
        return self.with_options(options)

    def resolved(self, available: Passes) -> str:
        """The recipe as YAML, overrides as passes, every option spelled out; it reads back as the same passes."""
        steps: list[object] = []
        for built in self.build(available):
            options = {field.name: getattr(built, field.name) for field in dataclasses.fields(built)}
            steps.append({built.name: _plain(options)} if options else built.name)
        content = {
            "schema": self.schema_version,
            "name": self.name,
            "description": self.description,
            "calibration": self.calibration.model_dump(),
            "passes": steps,
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def shipped() -> dict[str, Path]:
    """The recipes that come with hikui, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(name_or_path: str | Path, available: Passes) -> Recipe:
    """Reads a shipped recipe by name, or a recipe file.

    Args:
        name_or_path: `int4`, or a path.
        available: the passes that a recipe may name.

    Raises:
        UsageError: no such recipe, or what is wrong with it, with the file and the line.
    """
    path = shipped().get(str(name_or_path), Path(name_or_path))
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(str(name_or_path), shipped())
        raise UsageError(
            f"There is no recipe '{name_or_path}': neither a file nor one of {', '.join(shipped())}.{hint}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Recipe {path} cannot be read: {error}.") from None
    return parse(text, str(name_or_path), available)


def parse(text: str, source: str, available: Passes) -> Recipe:
    """Reads a recipe from YAML text; `source` names it in error messages.

    Raises:
        UsageError: what is wrong, as `source:line: …`.
    """
    node = compose(text, source)
    if node is None:
        raise UsageError(f"{source}:1: a recipe is a mapping with the keys {', '.join(_keys(Recipe))}.")
    _refuse_duplicates(node, source)
    try:
        recipe = Recipe.model_validate(construct(text, source))
        for index, step in enumerate(recipe.passes):
            make_pass(step.name, step.options, available.values(), f"{source}:{_line(node, ('passes', index))}: ")
    except ValidationError as error:
        # A misspelt key is also a missing one: the misspelling is what helps.
        first = min(error.errors(), key=lambda e: (e["type"] == "missing", _line(node, e["loc"])))
        raise UsageError(f"{source}:{_line(node, first['loc'])}: {_say(first)}") from None
    return recipe


def options_model(kind: type[Pass]) -> type[BaseModel]:
    """The pydantic model of a pass's options: its dataclass fields, nothing else."""
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        default: Any = ...
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = Field(default_factory=field.default_factory)
        fields[field.name] = (hints[field.name], default)
    return create_model(kind.name, __config__=ConfigDict(extra="forbid"), **fields)


def json_schema(available: Passes) -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    steps = []
    for name, kind in sorted(available.items()):
        options = options_model(kind).model_json_schema()
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        options.pop("description", None)
        by_name = {"type": "object", "properties": {name: options}, "required": [name], "additionalProperties": False}
        if options.get("required"):
            steps.append({**by_name, "description": summary})
        else:
            steps.append({"anyOf": [{"const": name}, by_name], "description": summary})
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hikui recipe"
    schema["$defs"]["Step"] = {"description": (Step.__doc__ or "").strip(), "anyOf": steps}
    return schema


def _say(error: Mapping[str, Any]) -> str:
    """One sentence for a pydantic error, with the nearest name where a key is not known."""
    path = [part for part in error["loc"] if not isinstance(part, int)]
    if error["type"] == "extra_forbidden":
        known = _keys(Recipe)
        if path[:1] == ["calibration"]:
            known = _keys(CalibrationSettings)
        return f"unknown key '{path[-1]}'; the keys are {', '.join(known)}.{did_you_mean(str(path[-1]), known)}"
    subject = ".".join(map(str, path)).removesuffix(".[key]") or "the recipe"
    if error["type"] == "missing":
        return f"the key '{subject}' is missing."
    message = error["msg"].removeprefix("Value error, ")
    return f"{subject}: {message[:1].lower()}{message[1:]}".rstrip(".") + "."


def _keys(model: type[BaseModel]) -> list[str]:
    return [str(field.validation_alias or name) for name, field in model.model_fields.items()]


def _option(available: Passes, name: str, budget: str) -> str:
    """The option of a pass that holds a budget, by the attribute of its class that names it; empty without one."""
    return str(getattr(available.get(name, Pass), budget))


def _list(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _plain(value: object) -> object:
    """Tuples as lists, so that YAML needs no tags."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _line(node: yaml.Node, location: Location) -> int:
    """The line of the deepest part of `location` that the file has."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next(((key, value) for key, value in node.value if key.value == part), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _refuse_duplicates(node: yaml.Node, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UsageError(f"{source}:{key.start_mark.line + 1}: the key '{key.value}' is given twice.")
            seen.add(key.value)
            _refuse_duplicates(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source)

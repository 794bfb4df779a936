"""Pipelines as text, both ways.

pipeline := pass (',' pass)*        pass := name [ '{' [option (',' option)*] '}' ]        option := key '=' value
value := bare | '"' any text, a quote in it doubled '"'

A bare value ends at a comma or a closing brace, and loses the spaces around it; a quoted one is taken as it stands,
backslashes included, so that regular expressions need no second escaping.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from hikui.lowering.errors import UsageError, did_you_mean
from hikui.lowering.pipeline.contract import Pass


def make_pass(name: str, options: Mapping[str, object], available: Iterable[type[Pass]], where: str = "") -> Pass:
    """A pass from its name and options.

    Args:
        name: as in a pipeline.
        options: values as text or already typed.
        available: the passes that may be named.
        where: prefix of error sentences, such as a file and a line.

    Raises:
        UsageError: unknown pass or option (with the nearest name), or a value of the wrong type.
    """
    known = {cls.name: cls for cls in available}
    if name not in known:
        raise UsageError(f"{where}Pass '{name}' is not known.{did_you_mean(name, known)}")
    cls = known[name]
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    values: dict[str, object] = {}
    for key, value in options.items():
        if key not in names:
            takes = f" It takes {', '.join(names)}." if names else " It takes none."
            raise UsageError(f"{where}Pass '{name}' has no option '{key}'.{did_you_mean(key, names) or takes}")
        try:
            values[key] = _typed(TypeAdapter(hints[key]), value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{where}Option '{key}' of pass '{name}' cannot be {_short(value)}: {reason}.") from error
    missing = [f.name for f in fields(cls) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise UsageError(f"{where}Pass '{name}' lacks its option '{missing[0]}'; give it.")
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}{error}") from error


def _short(value: object) -> str:
    """A value as it was written, cut where it would fill the screen."""
    text = f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _typed(adapter: TypeAdapter[object], value: object) -> object:
    try:
        return adapter.validate_python(value)
    except ValidationError:
        # What is no number, word or truth value, such as a tuple, is written as JSON.
        if not isinstance(value, str) or value[:1] not in ("[", "{"):
            raise
    return adapter.validate_json(value)


def parse_pipeline(text: str, available: Iterable[type[Pass]]) -> list[Pass]:
    """Reads a pipeline such as `canonicalise,rtn{bits=4,group=64}`; `pipeline_text` is the way back.

    Raises:
        UsageError: the text is not a pipeline, or names what does not exist.
    """
    available = list(available)
    return [make_pass(name, options, available) for name, options in _Scanner(text).steps()]


def pipeline_text(passes: Iterable[Pass]) -> str:
    """The pipeline that gives these passes."""
    return ",".join(map(str, passes))


class _Scanner:
    """Reads a pipeline from left to right."""

    _NAME = re.compile(r"[^,{]*")
    _KEY = re.compile(r"[^=,}]*")
    _BARE = re.compile(r'[^,}"]*')
    _QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*')

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def steps(self) -> list[tuple[str, dict[str, str]]]:
        """Name and options of each pass."""
        if not self._text:
            raise UsageError("The pipeline is empty; name at least one pass.")
        found = [self._step()]
        while self._take(","):
            found.append(self._step())
        if self._at < len(self._text):
            raise UsageError(f"Pipeline '{self._text}' wants a comma at column {self._at + 1}.")
        return found

    def _step(self) -> tuple[str, dict[str, str]]:
        start = self._at
        name = self._match(self._NAME).strip()
        if not name:
            raise UsageError(f"Pipeline '{self._text}' has no pass name at column {start + 1}.")
        options = self._options() if self._take("{") else {}
        self._match(re.compile(r"\s*"))
        return name, options

    def _options(self) -> dict[str, str]:
        options: dict[str, str] = {}
        while True:
            key = self._match(self._KEY).strip()
            if self._take("="):
                if key in options:
                    raise UsageError(f"Option '{key}' in pipeline '{self._text}' is given twice.")
                options[key] = self._value(key)
            elif key and self._at < len(self._text):
                raise UsageError(f"Option '{key}' in pipeline '{self._text}' has no value; write it as KEY=VALUE.")
            if self._take("}"):
                return options
            if not self._take(","):
                raise UsageError(f"Pipeline '{self._text}' lacks a closing brace.")

    def _value(self, key: str) -> str:
        if (quoted := self._QUOTED.match(self._text, self._at)) is not None:
            self._at = quoted.end()
            value = quoted[1].replace('""', '"')
        else:
            value = self._match(self._BARE).strip()
        if self._at < len(self._text) and self._text[self._at] not in ",}":
            raise UsageError(
                f"Option '{key}' in pipeline '{self._text}' has a quote out of place at column {self._at + 1}; quote "
                "the whole value, and double the quotes in it."
            )
        return value

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        assert found is not None, "every pattern also matches nothing"
        self._at = found.end()
        return found[0]

    def _take(self, char: str) -> bool:
        if self._text.startswith(char, self._at):
            self._at += 1
            return True
        return False

"""A place in one line of a program's text, what may be read there, and the sentence where it is something else."""

import json
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from hikui.lowering.errors import UsageError, did_you_mean
from hikui.lowering.ir.text_tables import OBJECTS, WORDS

T = TypeVar("T")

_DEPTH = 8
"""Lists within lists; a program has one or two, and a text may not make the reader recurse without end."""

_NUMBER = re.compile(r"-?(?:inf|nan|\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])", re.ASCII)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NODE = re.compile(r"%\w+")
_DIGITS = 20
"""No number of a program has more: 64 bits take 19."""


class Cursor:
    """Reads a line from left to right.

    Args:
        text: the line.
        source: the text's name, for messages.
        number: of the line, from 1.
    """

    def __init__(self, text: str, source: str, number: int) -> None:
        self._text, self._at, self._source, self.number = text, 0, source, number
        self._skip()

    def fail(self, sentence: str) -> UsageError:
        """The error of this line, to be raised."""
        return UsageError(f"{self._source}:{self.number}: {sentence}")

    @property
    def rest(self) -> str:
        """What has not been read."""
        return self._text[self._at :]

    def at_end(self) -> bool:
        return self._at == len(self._text)

    def _skip(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in " \t\r":
            self._at += 1

    def take(self, pattern: str | re.Pattern[str]) -> str | None:
        """What stands here if it has this form; None leaves the cursor where it is."""
        found = re.compile(pattern).match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        self._skip()
        return found.group()

    def sign(self, literal: str) -> bool:
        """Whether this very text stands here; it is then passed."""
        return self.take(re.escape(literal)) is not None

    def want(self, literal: str, where: str) -> None:
        """Passes this very text.

        Raises:
            UsageError: something else stands here.
        """
        if not self.sign(literal):
            raise self.fail(f"'{literal}' is due {where}, not {self.found()}.")

    def form(self, pattern: str | re.Pattern[str], what: str) -> str:
        """What stands here, which must have this form.

        Raises:
            UsageError: something else stands here.
        """
        if (text := self.take(pattern)) is None:
            raise self.fail(f"{what} is due, not {self.found()}.")
        return text

    def found(self) -> str:
        """What stands here, for messages."""
        if self.at_end():
            return "the end of the line"
        words = self.rest.split(maxsplit=1)[0]
        return f"'{words[:40]}{'…' if len(words) > 40 else ''}'"

    def end(self) -> None:
        """Raises UsageError where something follows."""
        if not self.at_end():
            raise self.fail(f"the line should end before {self.found()}; write one statement a line.")

    def string(self, what: str) -> str:
        """A text in quotation marks."""
        quoted = self.form(_STRING, f'{what} in quotation marks, such as "model.norm.weight",')
        try:
            return str(json.loads(quoted))
        except ValueError as error:
            raise self.fail(f"{quoted} is no text as JSON writes it: {error}.") from None

    def text(self, bare: str, what: str) -> str:
        """A text that needs no quotation marks where it has the form `bare`."""
        return self.string(what) if self._text.startswith('"', self._at) else self.form(bare, what)

    def integer(self, what: str, least: int = 0, most: int = 1 << 40) -> int:
        """A number without a sign, within bounds."""
        text = self.form(re.compile(r"\d+", re.ASCII), what)
        if len(text) > _DIGITS or not least <= int(text) <= most:
            raise self.fail(f"{what} cannot be {text[:_DIGITS]}; it is {least} to {most}.")
        return int(text)

    def number_or_none(self) -> int | float | None:
        """An integer or a float, if one stands here."""
        if (text := self.take(_NUMBER)) is None:
            return None
        if not re.fullmatch(r"-?\d+", text):
            return float(text)
        if len(text) > _DIGITS:
            raise self.fail(f"{text[:_DIGITS]}… is too large a number.")
        return int(text)

    def items(self, close: str, item: Callable[[], T], what: str) -> list[T]:
        """Items with commas between them up to the closing sign, which is passed."""
        out: list[T] = []
        while not self.sign(close):
            if out:
                self.want(",", f"or '{close}' after {what}")
            out.append(item())
        return out

    def argument(self, node: Callable[[str], torch.fx.Node], depth: int = 0) -> object:
        """An argument of a call.

        Args:
            node: gives the node of a name.
            depth: how many lists this one stands in.

        Raises:
            UsageError: no argument stands here, or one that a program cannot have.
        """
        if depth > _DEPTH:
            raise self.fail(f"lists within lists are more than {_DEPTH} deep.")
        if (name := self.take(_NODE)) is not None:
            return node(name[1:])
        if self._text.startswith('"', self._at):
            return self.string("an argument")
        if (number := self.number_or_none()) is not None:
            return number
        for opening, closing, make in (("[", "]", list), ("(", ")", tuple)):
            if self.sign(opening):
                return make(self.items(closing, lambda: self.argument(node, depth + 1), "an item"))
        return self._word()

    def _word(self) -> object:
        name = self.form(r"[A-Za-z_][\w.]*", "an argument (%node, number, text, list, None, True, torch.float32)")
        if name == "device":
            return self._device()
        known = {**WORDS, **OBJECTS}
        if name not in known:
            raise self.fail(
                f"'{name}' is no argument; nodes begin with %, texts stand in quotes.{did_you_mean(name, known)}"
            )
        return known[name]

    def _device(self) -> torch.device:
        self.want("(", "after device")
        name = self.string("a device")
        self.want(")", "after a device")
        if name != "cpu":
            raise self.fail(f"the device '{name}' is none that a program runs on; write \"cpu\".")
        return torch.device(name)

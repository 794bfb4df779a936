"""YAML that somebody else wrote: small, without aliases that multiply, and every fault one sentence with its line."""

from typing import Any

import yaml

from hikui.lowering.errors import UsageError
from hikui.lowering.json_text import not_utf8

LARGEST = 64 * 1024
"""Characters of a file; the longest recipe that anybody writes by hand takes a few thousand."""

_NODES = 20_000
"""Values of a file with every alias written out."""

_DEEPEST = 40
_TOO_DEEP = f"it nests more than {_DEEPEST} deep"
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge"))


class _Loader(yaml.SafeLoader):
    """Stops at the depth where it is too much, before the library has looked through all that is inside."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(kind)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        return bool(super().add_indent(column))


def compose(text: str, source: str, *, tags: tuple[str, ...] = ()) -> yaml.MappingNode | None:
    """The nodes of a YAML text, of which nothing has been made yet.

    Args:
        text: the file's content.
        source: what messages call it.
        tags: that may stand in it beside those of plain YAML.

    Returns:
        None where the text is no mapping.

    Raises:
        UsageError: it is too large, no YAML, nests or repeats itself too much, or has tags or keys that are not
            read.
    """
    if len(text) > LARGEST:
        raise UsageError(f"{source}: the file has {len(text)} characters, and {LARGEST} is the most.")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{source}:{line}: this is not YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: this is not YAML: {' '.join(str(error).split())}.") from None
    if node is not None:
        _Checker(source, tags).size(node, ())
    return node if isinstance(node, yaml.MappingNode) else None


def construct(text: str, source: str) -> Any:
    """What a text holds that `compose` has taken.

    Raises:
        UsageError: a value is not what its tag says.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{source}:{line}: {error.problem}.") from None
    except (ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise UsageError(f"{source}: a value cannot be read: {error}.") from None


class _Checker:
    """Counts the values that a node stands for, aliases written out, and refuses what plain YAML lacks."""

    def __init__(self, source: str, tags: tuple[str, ...]) -> None:
        self._source, self._tags = source, (*_PLAIN, *tags)
        self._sizes: dict[int, int] = {}

    def size(self, node: yaml.Node, above: tuple[int, ...]) -> int:
        """Raises UsageError where there is too much of it, or it is none that may be."""
        line = node.start_mark.line + 1
        if id(node) in above:
            raise UsageError(f"{self._source}:{line}: an alias stands inside of what it stands for.")
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if len(above) > _DEEPEST:
            raise UsageError(f"{self._source}:{line}: this is not YAML that is read: {_TOO_DEEP}.")
        if node.tag not in self._tags:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UsageError(
                f"{self._source}:{line}: the tag {tag} is not read here; quote the value, or leave the tag out."
            )
        inner = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    place = key.start_mark.line + 1
                    raise UsageError(f"{self._source}:{place}: a key is a word, and not a list or a mapping.")
            total = 1 + sum(self.size(part, inner) for entry in node.value for part in entry)
        elif isinstance(node, yaml.SequenceNode):
            total = 1 + sum(self.size(part, inner) for part in node.value)
        else:
            total = 1
            if (at := not_utf8(node.value)) is not None:
                raise UsageError(f"{self._source}:{line}: the value is not UTF-8 at its character {at + 1}.")
        if total > _NODES:
            raise UsageError(f"{self._source}:{line}: with its aliases written out it holds more than {_NODES} values.")
        self._sizes[id(node)] = total
        return total

"""Reads a program back from the text that `printer.to_text` prints.

A text is data: it can name the ops of this dialect and of aten and a few plain functions, nothing is imported or
evaluated. Every type is worked out again and compared with what is written.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

from hikui.lowering.errors import HikuiError, UsageError, VerificationError, did_you_mean
from hikui.lowering.ir.printer import info_text, type_text
from hikui.lowering.ir.program import WEIGHT, Program, infer
from hikui.lowering.ir.seeded import seeded_sources
from hikui.lowering.ir.store import FileTensor, TensorInfo, TensorSource, WeightStore
from hikui.lowering.ir.text_cursor import Cursor
from hikui.lowering.ir.text_statements import Header, read_annotations, read_header, read_info, read_stored
from hikui.lowering.ir.text_targets import target_of
from hikui.lowering.ir.verifier import verify

_COMMENT = re.compile(r"\s*(?://.*)?")
_ORDER = ("stored", "weight", "input", "call", "return")
"""The kinds of statements in the order in which they stand."""


def from_text(
    text: str, store: WeightStore | None = None, *, source: str = "<text>", seed: int | None = None
) -> Program:
    """The program of a text.

    Args:
        text: as `to_text` prints it; lines that are empty or begin with `//` are passed over.
        store: holds the weights by the names in the text; without one they are made from the seed.
        source: name of the text, for messages.
        seed: makes the weights that the store does not have. None: with a store it must have them all, without one 0.

    Returns:
        A program that the verifier takes; it has no tokenizer.

    Raises:
        UsageError: the text is no program; the sentence begins with `source:line:`.
        HikuiError: the store has not the weights that the text names, or they are of another dtype or shape.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if not _COMMENT.fullmatch(line)]
    if not lines:
        raise UsageError(f"{source}:1: the text is empty; a program's text begins with `program NAME context=…`.")
    cursors = (Cursor(line, source, number) for number, line in lines)
    reader = _Reader(read_header(next(cursors)))
    for cursor in cursors:
        reader.statement(cursor)
    last = Cursor("", source, lines[-1][0])
    if reader.returned is None:
        raise last.fail("the text ends without a `return`; the file is cut short, print it again.")
    program = Program(fx.GraphModule(nn.Module(), reader.graph), WeightStore({}), reader.header.config)
    # The text is checked by itself first, so that a fault of the weights is no fault of the text.
    program.store = WeightStore({key: _Declared(info) for key, (info, _) in reader.stored.items()})
    try:
        verify(program)
    except VerificationError as error:
        raise reader.place(str(error), Cursor("", source, lines[0][0])).fail(str(error)) from error
    program.store = _filled(program, reader.stored, store, seed)
    return program


@dataclass(frozen=True)
class _Declared:
    """What the text says of a tensor."""

    info: TensorInfo

    def load(self) -> torch.Tensor:
        raise AssertionError("the text is checked before there are weights")


def _token_length(longest: int) -> int:
    """An example of T, as `trace` chooses it: no size of the model by accident, within the context."""
    return 7 if longest > 7 else max(2, longest - 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error that is about to become one sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Reader:
    """Builds the graph, statement by statement.

    Attributes:
        header: of the program.
        graph: so far.
        stored: every named tensor with its type and the line that names it.
        returned: the last statement, once it has been read.
    """

    def __init__(self, header: Header) -> None:
        self.header, self.graph = header, fx.Graph()
        self.stored: dict[str, tuple[TensorInfo, Cursor]] = {}
        self.returned: Cursor | None = None
        self._nodes: dict[str, tuple[fx.Node, Cursor]] = {}
        self._stage, self._inputs = 0, 0
        # Without fallbacks: an op that only its true kernel could tell the shape of would allocate what the text says.
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._tokens = self._fake_tokens()

    def _fake_tokens(self) -> torch.Tensor:
        """The fake tokens, whose second size is the symbol of T."""
        config: Any = symbolic_config  # torch installs `patch` at run time
        sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC])
        with config.patch(backed_size_oblivious=True):
            example = torch.zeros(1, _token_length(self.header.longest), dtype=torch.int64)
            tokens = self._mode.from_tensor(example, symbolic_context=sizes)
        environment = self._mode.shape_env
        assert environment is not None
        length: Any = tokens.shape[1]
        environment.var_to_range[length.node.expr] = ValueRanges(self.header.shortest, self.header.longest)
        return tokens

    def place(self, sentence: str, otherwise: Cursor) -> Cursor:
        """The line that a sentence of the verifier is about."""
        found = re.search(r"(?:Node|Placeholder|placeholder|Cache) (\w+)", sentence)
        if found and found[1] in self._nodes:
            return self._nodes[found[1]][1]
        return self.returned if self.returned is not None and re.search("output|return", sentence) else otherwise

    def statement(self, cursor: Cursor) -> None:
        """Reads one line."""
        if self.returned is not None:
            raise cursor.fail(f"{cursor.found()} follows the program's `return`; a text holds one program.")
        if cursor.sign("stored "):
            self._in_order(cursor, "stored")
            self._store(cursor, *read_stored(cursor))
        elif cursor.take(r"return\b") is not None:
            self._in_order(cursor, "return")
            self._return(cursor)
        else:
            name = cursor.form(r"%\w+", "`%name = …`, `stored` or `return`")[1:]
            if name in self._nodes:
                raise cursor.fail(f"%{name} is defined already, in line {self._nodes[name][1].number}; name it apart.")
            cursor.want("=", f"after %{name}")
            self._define(cursor, name)

    def _in_order(self, cursor: Cursor, kind: str) -> None:
        stage = _ORDER.index(kind)
        if stage < self._stage:
            raise cursor.fail(
                f"a '{kind}' cannot stand after a '{_ORDER[self._stage]}'; the order is {', '.join(_ORDER)}."
            )
        self._stage = stage

    def _store(self, cursor: Cursor, key: str, info: TensorInfo) -> None:
        if self.stored.setdefault(key, (info, cursor))[0] != info:
            raise cursor.fail(f"'{key}' has another type in line {self.stored[key][1].number}.")

    def _define(self, cursor: Cursor, name: str) -> None:
        if cursor.sign("weight "):
            self._in_order(cursor, "weight")
            key, info = read_stored(cursor)
            self._store(cursor, key, info)
            node = self._placeholder(cursor, name, info.dtype, info.shape)
            node.meta[WEIGHT] = key
        elif cursor.take(r"input\b(?!\()") is not None:
            self._in_order(cursor, "input")
            self._input(cursor, name)
        else:
            self._in_order(cursor, "call")
            self._call(cursor, name)

    def _add(self, cursor: Cursor, name: str, node: fx.Node) -> fx.Node:
        if node.name != name:
            raise cursor.fail(f"a graph cannot have a node called %{name}; call it %{node.name}.")
        self._nodes[name] = (node, cursor)
        return node

    def _placeholder(self, cursor: Cursor, name: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> fx.Node:
        node = self._add(cursor, name, self.graph.placeholder(name))
        try:
            with self._mode:
                node.meta["val"] = torch.empty(shape, dtype=dtype)
        except (RuntimeError, OverflowError) as error:
            raise cursor.fail(f"%{name} is larger than a tensor can be ({_reason(error)}).") from error
        return node

    def _input(self, cursor: Cursor, name: str) -> None:
        cursor.want(":", "before a type")
        dtype, shape = read_info(cursor, self._tokens.shape[1])
        cursor.end()
        due = (("the tokens", "i64[1, T]"), ("past", "i64[1]"))
        node = self._placeholder(cursor, name, dtype, shape)
        given = type_text(node.meta["val"])
        if self._inputs < len(due) and given != due[self._inputs][1]:
            what, wanted = due[self._inputs]
            raise cursor.fail(f"input {self._inputs + 1} is {what}, {wanted}, not {given}.")
        if self._inputs == 0:
            node.meta["val"] = self._tokens
        self._inputs += 1

    def _call(self, cursor: Cursor, name: str) -> None:
        if self._inputs < 2:
            raise cursor.fail("a program's first two inputs, the tokens i64[1, T] and past i64[1], come before calls.")
        title = cursor.form(r"[A-Za-z_][\w.]*", "an op such as aten.add.Tensor")
        target = target_of(cursor, title)
        cursor.want("(", f"after {title}")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}

        def argument() -> None:
            keyword = cursor.take(r"[A-Za-z_]\w*(?=\s*=)")
            if keyword is None:
                if kwargs:
                    raise cursor.fail("an argument without a name follows one with a name; put it before.")
                args.append(cursor.argument(self._node_of(cursor)))
                return
            if keyword in kwargs:
                raise cursor.fail(f"the argument '{keyword}' is given twice.")
            cursor.want("=", f"after {keyword}")
            kwargs[keyword] = cursor.argument(self._node_of(cursor))

        cursor.items(")", argument, "an argument")
        cursor.want(":", "before the type of the result")
        if kwargs and title.startswith("hikui."):
            # Passes, the verifier and backends find the operands of these ops by their places.
            raise cursor.fail(f"{title} takes its arguments by position, so '{next(iter(kwargs))}=' cannot stand here.")
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name)
        self._add(cursor, name, node)
        written = cursor.take(r"[^\n]*?(?=\s+//\s|\s*$)") or ""
        if cursor.sign("// "):
            node.meta.update(read_annotations(cursor))
        cursor.end()
        self._infer(cursor, node, title, written)

    def _node_of(self, cursor: Cursor) -> Any:
        def node(name: str) -> fx.Node:
            if name not in self._nodes:
                raise cursor.fail(f"%{name} is not defined before this line.{did_you_mean(name, self._nodes)}")
            return self._nodes[name][0]

        return node

    def _infer(self, cursor: Cursor, node: fx.Node, title: str, written: str) -> None:
        """Works out the value's type, which must be the one that is written; `?` asks for nothing."""
        try:
            with _quiet():
                infer(node, self._mode)
                found = type_text(node.meta["val"])
        except Exception as error:  # whatever an op's meta kernel raises where operands do not fit
            raise cursor.fail(f"{title} does not take these operands: {_reason(error)}.") from error
        if written != "?" and re.sub(r"\s", "", written) != re.sub(r"\s", "", found):
            raise cursor.fail(
                f"%{node.name} is written to be '{written}', but {title} gives {found} for these operands."
            )

    def _return(self, cursor: Cursor) -> None:
        values: list[fx.Node] = []
        while not values or cursor.sign(","):
            values.append(self._node_of(cursor)(cursor.form(r"%\w+", "a node such as %logits")[1:]))
        cursor.end()
        self.graph.output(tuple(values))
        self.returned = cursor


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].split(" Declaration:")[0]
    return (text or type(error).__name__).rstrip(".:")


def _filled(
    program: Program, stored: dict[str, tuple[TensorInfo, Cursor]], store: WeightStore | None, seed: int | None
) -> WeightStore:
    """The store of the program: of the given one what the text names, the rest made."""
    infos = {key: info for key, (info, _) in stored.items()}
    made: dict[str, TensorSource] = {}
    if store is None or seed is not None:
        made.update(seeded_sources(program, infos, seed or 0))
    if store is None:
        return WeightStore(made)
    sources: dict[str, TensorSource] = {}
    for key, (info, cursor) in stored.items():
        if key in store:
            sources[key] = _fitting(store.source(key), key, info, cursor)
        elif key in made:
            sources[key] = made[key]
        else:
            raise HikuiError(
                str(cursor.fail(f"the weights given have no '{key}'.{did_you_mean(key, store.keys())}"))
                + " Give the file that --save-weights wrote beside this text, or a seed to make what is missing."
            )
    return WeightStore(sources, store.scratch)


def _fitting(found: TensorSource, key: str, info: TensorInfo, cursor: Cursor) -> TensorSource:
    """The source, read as float32 where a checkpoint holds half of that, if it is what the text says."""
    if isinstance(found, FileTensor) and info.dtype == torch.float32 and found.dtype in (torch.bfloat16, torch.float16):
        found = replace(found, widen=True)
    if found.info != info:
        raise HikuiError(
            str(cursor.fail(f"'{key}' is {info_text(info)} here, but {info_text(found.info)} in the weights given;"))
            + " give the weights that belong to this text."
        )
    return found

"""Runs a program for many texts at once, stage by stage: what passes calibrate and quantise with.

A stage is what lies between two nodes of the graph. Its weights are loaded once, all texts go through it, and only what
is still read after it is kept: in memory up to a limit, in files above it. So the footprint is one stage's weights, one
text's intermediates and the activations at one point, whatever the size of the model and of the text.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.float_matrix import float_matrix
from hikui.lowering.ir.interpreter import empty_cache
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import FLOAT_WEIGHT, WEIGHT, Program, evaluate
from hikui.lowering.ir.steps import check_ids, check_length
from hikui.lowering.memory import give_back

ACTIVATION_MEMORY = 1 << 30
"""Bytes of activations that a stream keeps in memory before it uses files."""

Watch = Callable[[int, tuple[object, ...], object], None]
"""Called with a text's number, a node's evaluated arguments and its result."""

_LINEAR = torch.ops.hikui.linear.default


@dataclass
class _Text:
    """What is alive of one text: in memory, or in a file."""

    tokens: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    file: Path | None = None


@dataclass
class _Stage:
    """Calls in order, each with the values that nothing reads after it, and the weights that they read.

    Attributes:
        dense: packed sites with their matrices, by the name of the call.
        alive: names of all values that are read after the stage.
    """

    calls: list[tuple[fx.Node, list[str]]]
    weights: dict[str, Tensor]
    dense: dict[str, tuple[PackedLinear, Tensor]]
    alive: set[str]


class Stream:
    """The activations of all texts at one point of a program.

    The graph may be edited ahead of that point. Values that do not depend on the text but on its length alone, such as
    masks and rotary angles, are computed and kept once a length.

    Args:
        program: the program; its packed sites are dequantised once a stage.
        texts: int64 [1, T] each, run from an empty cache.
        workers: threads to run texts in.
        memory: bytes of activations kept in memory; the rest goes to files in `scratch`.
        scratch: folder for those files; by default the system's.
        as_float: let packed sites multiply the float matrices that they came from.

    Raises:
        HikuiError: a text is longer than the program's context.
    """

    def __init__(
        self,
        program: Program,
        texts: Sequence[Tensor],
        workers: Workers | None = None,
        *,
        memory: int = ACTIVATION_MEMORY,
        scratch: Path | None = None,
        as_float: bool = False,
    ) -> None:
        for text in texts:
            check_length(text.shape[1], 0, program.config.context_length)
            check_ids(text.numpy(), program.config.vocabulary)
        self.program = program
        self._workers = workers or Workers(1)
        self._memory = memory
        self._as_float = as_float
        self._scratch = scratch
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._texts = [_Text(text) for text in texts]
        self._shared: dict[int, dict[str, object]] = {text.shape[1]: {} for text in texts}
        self._varying: set[str] = set()
        self._held = 0
        tokens, self._past, *self._caches = program.input_nodes()
        self._tokens = tokens.name
        self._at: fx.Node | None = None
        """The last node that was run."""

    def close(self) -> None:
        """Removes the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def advance(self, stop: fx.Node | None = None, watch: Mapping[fx.Node, Watch] | None = None) -> None:
        """Runs every call before `stop` (None: all that are left) for all texts, and calls `watch` in their order.

        `stop` must lie ahead. What is watched at `stop` itself is called with its arguments and None as result.

        Raises:
            HikuiError: there is no room for the files.
        """
        watch = dict(watch or {})
        stage, single = self._stage(stop)
        for length, shared in self._shared.items():
            text = next(text.tokens for text in self._texts if text.tokens.shape[1] == length)
            self._run(single, shared, {self._tokens: text}, {})
        names = {node.name: call for node, call in watch.items()}

        def one(number: int) -> dict[str, tuple[tuple[object, ...], object]]:
            text = self._texts[number]
            beside = {**self._shared[text.tokens.shape[1]], self._tokens: text.tokens}
            values = self._load(text)
            seen = self._run(stage, values, beside, names)
            if stop is not None and stop.name in names:
                seen[stop.name] = (tuple(_value(argument, {**beside, **values}) for argument in stop.args), None)
            self._keep(number, values)
            return seen

        for number, seen in enumerate(self._workers.map(one, range(len(self._texts)))):
            for name, (args, result) in seen.items():
                names[name](number, args, result)
        for shared in self._shared.values():
            for name in shared.keys() - stage.alive:
                del shared[name]
        # What the texts have passed through leaves holes between what is kept of them.
        give_back()

    def value(self, number: int, node: fx.Node) -> Tensor:
        """What a node gave for a text, or its token ids; what a call gave must be alive at this point."""
        text = self._texts[number]
        if node.name == self._tokens:
            return text.tokens
        if text.file is None:
            return text.values[node.name]
        with safe_open(text.file, "pt") as file:
            tensor: Tensor = file.get_tensor(node.name)
            return tensor.clone()

    def has(self, node: fx.Node) -> bool:
        """Whether `value` has something that a node made of a text, and that is still read."""
        text = self._texts[0]
        if text.file is None:
            return isinstance(text.values.get(node.name), Tensor)
        with safe_open(text.file, "pt") as file:
            return node.name in file.keys()

    def _stage(self, stop: fx.Node | None) -> tuple[_Stage, _Stage]:
        """The calls up to `stop`: those that differ from text to text, and those that do not."""
        nodes: list[fx.Node] = []
        node = _first(self.program) if self._at is None else self._at.next
        while node.op != "root" and node is not stop:
            if node.op == "call_function":
                nodes.append(node)
            self._at = node
            node = node.next
        if stop is not None and node is not stop:
            raise ValueError(f"{stop.name} does not lie ahead")
        ahead: set[fx.Node] = set()
        while node.op != "root":
            if node.op == "call_function":
                ahead.add(node)
            node = node.next
        place = {node: index for index, node in enumerate(nodes)}
        varying: list[tuple[fx.Node, list[str]]] = []
        single: list[tuple[fx.Node, list[str]]] = []
        for node in nodes:
            if not sees_text(node, self._varying, self._tokens):
                single.append((node, []))
                continue
            self._varying.add(node.name)
            dying = [
                value.name
                for value in (*dict.fromkeys(node.all_input_nodes), node)
                if value.name in self._varying
                and not any(user in ahead for user in value.users)
                and all(place.get(user, -1) <= place[node] for user in value.users)
            ]
            varying.append((node, dying))
        alive = {operand.name for node in ahead for operand in node.all_input_nodes}
        return self._loaded(varying, alive), self._loaded(single, alive)

    def _loaded(self, calls: list[tuple[fx.Node, list[str]]], alive: set[str]) -> _Stage:
        """A stage with its weights; packed ones are dequantised here, once for all texts."""
        weights: dict[str, Tensor] = {}
        dense: dict[str, tuple[PackedLinear, Tensor]] = {}
        for node, _ in calls:
            if node.target is _LINEAR:
                dense[node.name] = PackedLinear.of(node), self._matrix(node)
            for operand in node.all_input_nodes:
                packed = node.target is _LINEAR and operand in PackedLinear.of(node).stored()
                if WEIGHT in operand.meta and operand.name not in weights and not packed:
                    weights[operand.name] = self.program.store.load(self.program.weight_of(operand))
        return _Stage(calls, weights, dense, alive)

    def _matrix(self, node: fx.Node) -> Tensor:
        """The matrix that a packed site multiplies with, float32 [n, k]."""
        store, exact = self.program.store, self._as_float and FLOAT_WEIGHT in node.meta
        return float_matrix(node, store) if exact else PackedLinear.of(node).dense(store)

    def _run(
        self, stage: _Stage, values: dict[str, object], beside: Mapping[str, object], watched: Mapping[str, object]
    ) -> dict[str, tuple[tuple[object, ...], object]]:
        """Runs a stage for one text; `values` are those that are alive and change, `beside` others that are read."""
        seen: dict[str, tuple[tuple[object, ...], object]] = {}
        args: tuple[object, ...]
        result: object

        def value_of(node: fx.Node) -> object:
            for place in (values, stage.weights, beside):
                if node.name in place:
                    return place[node.name]
            if node is self._past:
                return torch.tensor([0])
            if node in self._caches:
                return empty_cache(node)
            raise KeyError(node.name)

        for node, dying in stage.calls:
            if node.name in stage.dense:
                site, matrix = stage.dense[node.name]
                x, added = value_of(site.source), None if site.bias is None else value_of(site.bias)
                assert isinstance(x, Tensor) and (added is None or isinstance(added, Tensor))
                args, result = (x, *node.args[1:]), F.linear(x, matrix, added)
            else:
                args, result = evaluate(node, value_of)
            if node.name in watched:
                seen[node.name] = (args, result)
            values[node.name] = result
            for name in dying:
                values.pop(name, None)
        return seen

    # ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _load(self, text: _Text) -> dict[str, object]:
        """Takes a text's values out; `_keep` puts them back."""
        held, text.values = text.values, {}
        with self._lock:
            self._held -= _nbytes(held)
        if text.file is None:
            return _whole(held)
        read = _from_file(text.file)
        text.file.unlink()
        text.file = None
        return _whole(read)

    def _keep(self, number: int, values: dict[str, object]) -> None:
        text, flat = self._texts[number], _flat(values)
        with self._lock:
            fits = self._held + _nbytes(flat) <= self._memory
            if fits:
                self._held += _nbytes(flat)
        if fits:
            text.values = flat
            return
        text.file = self._files() / f"{number}.safetensors"
        try:
            save_file(flat, text.file)
        except OSError as error:
            folder = text.file.parent
            raise HikuiError(f"{folder} cannot take the activations: {error.strerror}; make room there.") from error

    def _files(self) -> Path:
        with self._lock:
            if self._folder is None:
                if self._scratch is not None:
                    self._scratch.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="hikui-activations-", dir=self._scratch))
            return self._folder

    # ── stopping and going on ───────────────────────────────────────────────────────────────────────────────────────

    def save(self, resume: Resume) -> None:
        """Writes the activations of all texts, so that `restore` in a later process goes on from here."""
        for number, text in enumerate(self._texts):
            resume.save(f"{number}", text.values if text.file is None else _from_file(text.file))
        for length, shared in self._shared.items():
            resume.save(f"length-{length}", _flat(shared))
        assert self._at is not None, "something has been run"
        resume.save("position", {"name": torch.tensor(list(self._at.name.encode()), dtype=torch.uint8)})

    def restore(self, resume: Resume) -> None:
        """Continues where a stream of an equal program stood when it was saved.

        Raises:
            HikuiError: a file is missing or damaged.
        """
        last = bytes(resume.need("position")["name"].tolist()).decode()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and sees_text(node, self._varying, self._tokens):
                self._varying.add(node.name)
            self._at = node
            if node.name == last:
                break
        else:
            raise HikuiError(f"{resume.path('position')} is of another program; run again with --no-resume.")
        for length in self._shared:
            self._shared[length] = _whole(resume.need(f"length-{length}"))
        for number in range(len(self._texts)):
            self._keep(number, _whole(resume.need(f"{number}")))


def sees_text(node: fx.Node, varying: Collection[str], tokens: str) -> bool:
    """Whether a call's value depends on which tokens there are, not only on how many.

    Args:
        node: the call.
        varying: names of the values before it that do.
        tokens: name of the placeholder of the tokens.
    """
    return any(
        operand.name in varying or (operand.name == tokens and node.target is not torch.ops.aten.sym_size.int)
        for operand in node.all_input_nodes
    )


def _first(program: Program) -> fx.Node:
    first: fx.Node = next(iter(program.graph.nodes))
    return first


def _value(argument: object, values: Mapping[str, object]) -> object:
    return values.get(argument.name) if isinstance(argument, fx.Node) else argument


def _nbytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in values.values())


def _flat(values: Mapping[str, object]) -> dict[str, Tensor]:
    """Values as tensors that a file can hold; `_whole` is the way back.

    Each is a contiguous copy with a storage of its own, or already such: what is kept is no larger than it seems, and a
    product does not depend on whether its operand came from a file.
    """
    out: dict[str, Tensor] = {}
    for name, value in values.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        for index, part in enumerate(parts):
            key = f"{name}/{index}" if parts is value else name
            if isinstance(part, Tensor):
                own = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
                out[key] = part if own else part.clone(memory_format=torch.contiguous_format)
            elif isinstance(part, int):
                out[f"{key}:int"] = torch.tensor(part)
            else:
                raise TypeError(f"{name} holds a {type(part).__name__}, which is not kept between stages")
    return out


def _whole(flat: Mapping[str, Tensor]) -> dict[str, object]:
    out: dict[str, object] = {}
    parts: dict[str, list[object]] = {}
    for key in sorted(flat):
        name, _, kind = key.partition(":")
        value: object = int(flat[key]) if kind else flat[key]
        if "/" in name:
            parts.setdefault(name.split("/")[0], []).append(value)
        else:
            out[name] = value
    return out | {name: tuple(found) for name, found in parts.items()}


def _from_file(path: Path) -> dict[str, Tensor]:
    # Copied, because kernels may add up in another order where a tensor is aligned otherwise.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}

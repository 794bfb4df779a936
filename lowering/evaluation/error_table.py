"""Where a lowered model differs from the float one: site by site, on a text.

Both programs run side by side, a site at a time, so that in memory are one site's matrix and what it reads, not two
models.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from hikui.lowering.engine.streaming import ACTIVATION_MEMORY, Stream, Watch
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.float_matrix import float_and_packed_rows
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import BRANCH, SITE, Program
from hikui.lowering.progress import Progress, no_progress

_LINEAR = torch.ops.aten.linear.default
_POSITIONS = 256


@dataclass(frozen=True)
class SiteError:
    """One linear site; all three are ratios of sums of squares, 0 for no error.

    Attributes:
        format: of its weights.
        weight: ‖W − Ŵ‖² / ‖W‖², branch included.
        output: E‖(W − Ŵ)x‖² / E‖Wx‖² on what the site reads in the float model.
        cumulative: E‖y − ŷ‖² / E‖y‖², where y is the site's output in the float model and ŷ that in the lowered one,
            each on its own activations: what all sites before it and the rounding of activations add.
    """

    name: str
    format: str
    weight: float
    output: float
    cumulative: float


@dataclass(frozen=True)
class ErrorTable:
    """All sites in the order in which they run, and what reaches the logits.

    Attributes:
        excerpts: texts that were read.
        tokens: of them.
        logits: E‖z − ẑ‖² / E‖z‖² of the logits.
        divergence: mean Kullback-Leibler divergence of the lowered model's next tokens from the float one's, in nats.
        agreement: share of positions where both give the same most likely token.
    """

    excerpts: int
    tokens: int
    sites: tuple[SiteError, ...]
    logits: float
    divergence: float
    agreement: float


def is_float(program: Program) -> bool:
    """Whether no matrix of a program is packed yet: the last such of a run is what `error_table` compares with."""
    return not any(map(is_packed, program.graph.nodes))


def error_table(
    floats: Program,
    lowered: Program,
    excerpts: Sequence[Sequence[int]],
    *,
    workers: Workers | None = None,
    scratch: Path | None = None,
    memory: int = ACTIVATION_MEMORY,
    progress: Progress = no_progress,
) -> ErrorTable:
    """Measures every site that both programs have.

    Args:
        floats: the program before any site was packed. Transforms such as rotations or scales that a recipe folds into
            the weights must be in it, since the packed matrices stand for the transformed ones.
        lowered: the same after its passes.
        excerpts: token ids, each no longer than the context.
        workers: threads to run texts in.
        scratch: folder for activations that do not fit `memory`; by default the system's.
        memory: bytes of activations that each program keeps in memory.
        progress: called with how many sites are done.

    Raises:
        HikuiError: the programs have no site in common, or a text is longer than the context.
    """
    texts = [torch.tensor([list(ids)], dtype=torch.int64) for ids in excerpts]
    with (
        tempfile.TemporaryDirectory(prefix="hikui-errors-", dir=scratch) as name,
        Stream(floats, texts, workers, memory=memory, scratch=Path(name)) as reference,
        Stream(lowered, texts, workers, memory=memory, scratch=Path(name)) as other,
    ):
        walk = _Walk(_Side(floats, reference), _Side(lowered, other), _Shelf(Path(name), memory), len(texts))
        rows = []
        for done, site in enumerate(walk.sites):
            progress("error of each site", done, len(walk.sites))
            rows.append(walk.measure(site))
        walk.finish()
    progress("error of each site", len(rows), len(rows))
    tokens = sum(text.shape[1] for text in texts)
    return ErrorTable(len(texts), tokens, tuple(rows), walk.logits.ratio, walk.divergence / tokens, walk.same / tokens)


@dataclass
class _Ratio:
    """Σ‖difference‖² / Σ‖reference‖², summed in float64."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        self.difference += float((reference - approximation).square().sum(dtype=torch.float64))
        self.reference += float(reference.square().sum(dtype=torch.float64))

    @property
    def ratio(self) -> float:
        return self.difference / self.reference if self.reference else 0.0


class _Shelf:
    """Tensors that wait for the other program: in memory up to a limit, in files above it."""

    def __init__(self, folder: Path, memory: int) -> None:
        self._folder, self._left, self._files = folder, memory, 0
        self._held: dict[tuple[str, int], Tensor | Path] = {}

    def put(self, name: str, number: int, tensor: Tensor) -> None:
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._held[name, number] = tensor
            return
        self._files += 1
        path = self._folder / f"{self._files}.safetensors"
        try:
            save_file({"": tensor.contiguous()}, path)
        except OSError as error:
            raise HikuiError(f"{self._folder} cannot take activations: {error.strerror}; make room there.") from error
        self._held[name, number] = path

    def get(self, name: str, number: int) -> Tensor:
        held = self._held[name, number]
        return held if isinstance(held, Tensor) else load_file(held)[""]

    def drop(self, name: str, number: int) -> None:
        held = self._held.pop((name, number))
        if isinstance(held, Tensor):
            self._left += held.nbytes
        else:
            held.unlink()


class _Side:
    """A program with its stream, and how far that has come."""

    def __init__(self, program: Program, stream: Stream) -> None:
        self.program, self._stream = program, stream
        self._place = {node: index for index, node in enumerate(program.graph.nodes)}
        self._at = -1
        self.sites = {
            str(node.meta[SITE]): node
            for node in program.graph.nodes
            if SITE in node.meta and (is_packed(node) or node.target is _LINEAR)
        }
        self.logits = program.outputs()[0]

    def has_run(self, node: fx.Node) -> bool:
        return self._place[node] <= self._at

    def run_past(self, node: fx.Node, watch: Mapping[fx.Node, Watch]) -> None:
        """Runs everything up to a node and the node itself; `watch` may name nodes that are not among that."""
        place = self._place[node]
        here = {watched: call for watched, call in watch.items() if self._at < self._place[watched] <= place}
        self._stream.advance(node.next, here)
        self._at = place


class _Walk:
    """Takes both programs from site to site, the float one ahead.

    Attributes:
        sites: names of those that both have, as the lowered one runs them.
        logits, divergence, same: sums over the logits, once both are through.
    """

    def __init__(self, floats: _Side, lowered: _Side, shelf: _Shelf, texts: int) -> None:
        self._floats, self._lowered, self._shelf, self._texts = floats, lowered, shelf, texts
        self.sites = [name for name in lowered.sites if name in floats.sites]
        if not self.sites:
            raise HikuiError("The two programs have no linear site in common; the recipe needs the pass canonicalise.")
        self.logits, self.divergence, self.same = _Ratio(), 0.0, 0

    @torch.no_grad()
    def measure(self, name: str) -> SiteError:
        """Runs both past a site and compares it."""
        mine, theirs = self._floats.sites[name], self._lowered.sites[name]
        if not self._floats.has_run(mine):
            self._run_floats(mine)
        branch = _branch_sum(theirs)
        result = theirs if branch is None else branch
        if result is self._lowered.logits and not self._floats.has_run(self._floats.logits):
            self._run_floats(self._floats.logits)
        weight, output = self._static(name, mine, theirs, branch)
        cumulative = self._cumulative(name, mine, result)
        for number in range(self._texts):
            self._shelf.drop(name, number)
        fmt = str(PackedLinear.of(theirs).format) if is_packed(theirs) else "float32"
        return SiteError(name, fmt, weight, output, cumulative)

    @torch.no_grad()
    def finish(self) -> None:
        """Runs both to their logits."""
        if not self._floats.has_run(self._floats.logits):
            self._run_floats(self._floats.logits)
        if not self._lowered.has_run(self._lowered.logits):
            self._lowered.run_past(self._lowered.logits, {self._lowered.logits: self._compare_logits})

    def _run_floats(self, node: fx.Node) -> None:
        """Runs the float program past a node and keeps what every site on the way reads."""

        def keep(name: str, logits: bool) -> Watch:
            def watch(number: int, args: tuple[object, ...], result: object) -> None:
                x = args[0]
                assert isinstance(x, Tensor) and isinstance(result, Tensor)
                if name:
                    self._shelf.put(name, number, x)
                if logits:
                    self._shelf.put("", number, result)

            return watch

        last = self._floats.logits
        names = {self._floats.sites[name]: name for name in self.sites}
        watched = {last: "", **names}
        self._floats.run_past(node, {seen: keep(name, seen is last) for seen, name in watched.items()})

    def _static(self, name: str, mine: fx.Node, theirs: fx.Node, branch: fx.Node | None) -> tuple[float, float]:
        """The weight and the output error."""
        program = self._lowered.program
        order = PackedLinear.of(theirs).column_order(program.store) if is_packed(theirs) else None
        factors = None if branch is None else _factors(program, theirs, branch)
        weight, output, start = _Ratio(), _Ratio(), 0
        for rows, approximation in self._matrices(mine, theirs):
            if factors is not None:
                down, up = factors
                approximation = approximation + up[start : start + rows.shape[0]] @ down
            start += rows.shape[0]
            weight.add(rows, approximation)
            difference = rows - approximation
            for number in range(self._texts):
                x = self._shelf.get(name, number)
                x = x if order is None else x[..., order]
                # Not the difference of two products: that would cancel where the error is small.
                output.difference += float(F.linear(x, difference).square().sum(dtype=torch.float64))
                output.reference += float(F.linear(x, rows).square().sum(dtype=torch.float64))
        return weight.ratio, output.ratio

    def _matrices(self, mine: fx.Node, theirs: fx.Node) -> Iterator[tuple[Tensor, Tensor]]:
        floats, lowered = self._floats.program, self._lowered.program
        key = floats.weight_of(_weight(mine))
        if is_packed(theirs):
            yield from float_and_packed_rows(lowered, theirs, floats.store, key)
        else:
            yield floats.store.load(key), lowered.store.load(lowered.weight_of(_weight(theirs)))

    def _cumulative(self, name: str, mine: fx.Node, result: fx.Node) -> float:
        """Runs the lowered program past the site's result; the float one is worked out again from what it reads."""
        floats = self._floats.program
        weight = floats.store.load(floats.weight_of(_weight(mine)))
        bias = mine.args[2] if len(mine.args) > 2 else None
        added = floats.store.load(floats.weight_of(bias)) if isinstance(bias, fx.Node) else None
        error = _Ratio()

        def compare(number: int, args: tuple[object, ...], value: object) -> None:
            assert isinstance(value, Tensor)
            error.add(F.linear(self._shelf.get(name, number), weight, added), value)
            if result is self._lowered.logits:
                self._compare_logits(number, args, value)

        watch: dict[fx.Node, Watch] = {self._lowered.logits: self._compare_logits, result: compare}
        self._lowered.run_past(result, watch)
        return error.ratio

    def _compare_logits(self, number: int, _: tuple[object, ...], value: object) -> None:
        assert isinstance(value, Tensor)
        ours = self._shelf.get("", number)
        self._shelf.drop("", number)
        self.logits.add(ours, value)
        for mine, theirs in zip(ours[0].split(_POSITIONS), value[0].split(_POSITIONS), strict=True):
            p, q = mine.double().log_softmax(-1), theirs.double().log_softmax(-1)
            self.divergence += float((p.exp() * (p - q)).sum())
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node), "a site multiplies a stored weight"
    return weight


def _branch_sum(node: fx.Node) -> fx.Node | None:
    """The sum of a site and of a branch that stands beside it, if there is one."""
    return next((user for user in node.users if user.meta.get(BRANCH) == node.meta[SITE]), None)


def _factors(program: Program, node: fx.Node, total: fx.Node) -> tuple[Tensor, Tensor]:
    """A [rank, K] and B [N, rank] of a branch beside a site, float32."""
    up = next(operand for operand in total.all_input_nodes if operand is not node)
    down = up.args[0]
    assert isinstance(down, fx.Node), "a branch is two products in a row"
    a, b = (_dense(program, product) for product in (down, up))
    return a, b


def _dense(program: Program, product: fx.Node) -> Tensor:
    if is_packed(product):
        return PackedLinear.of(product).dense(program.store)
    return program.store.load(program.weight_of(_weight(product)))

"""Equivalent transforms: a positive factor for each channel of an activation, folded into what makes and what reads it.

An activation x that only the sites of one tied group read may be divided by a factor for each of its columns, if the
matrices that read it are multiplied by it. The division is folded into what produces x: the weight of a norm, or the
rows of another product, through calls that pass a factor on. How those calls move channels about is not guessed from
shapes but followed: the numbers of the producer's channels are sent through the very same calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.ir.program import SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.ir.store import TensorInfo, TensorSource
from hikui.passes.graph import argument, aten, drop_weights, is_call, is_weight, matrix_shape, weight_of
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.measure.evidence import TOKEN_WEIGHT
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.passing import Labels, carriers, is_cache, is_view

_POWERS = {"mean_square": 2, "max_abs": 1, "mean_abs": 1, "sample": 1, "tokens": 0, TOKEN_WEIGHT: 0}
"""With which power of the factor a statistic shrinks."""


@dataclass(frozen=True)
class Fold:
    """Where the factors of a tied group's input can go.

    Attributes:
        members: the sites that read the activation.
        path: the calls from the producer to the activation, both included.
        weights: positions among the producer's arguments of what is divided along its first dimension.
        channels: int64 [c], the producer's channels that the activation is made of, ascending.
        ties: int64 [k], for each column of the activation the position in `channels` of the one that it comes from.
            Columns that share one (query heads that share a KV head) must have one factor.
    """

    members: tuple[fx.Node, ...]
    path: tuple[fx.Node, ...]
    weights: tuple[int, ...]
    channels: Tensor
    ties: Tensor

    @property
    def producer(self) -> fx.Node:
        """The norm (its multiplication by the weight) or the `linear` that makes the activation."""
        return self.path[0]

    def largest(self, values: Tensor) -> Tensor:
        """Of a value for each column [k], the largest of those that share a channel: [c]."""
        out = values.new_full((len(self.channels),), -torch.inf)
        return out.scatter_reduce(0, self.ties, values, "amax")

    def mean(self, values: Tensor) -> Tensor:
        """Of a value for each column [k], the mean of those that share a channel: [c]."""
        return values.new_zeros(len(self.channels)).scatter_reduce(0, self.ties, values, "mean", include_self=False)


def find_fold(program: Program, members: Sequence[fx.Node]) -> Fold | NoMatch:
    """Looks for what produces the activation that tied sites read.

    Args:
        program: canonicalised, unfused.
        members: every float site of a tied group.
    """
    x = members[0].args[0]
    assert isinstance(x, fx.Node)
    others = [user for user in x.users if user not in members]
    if others:
        return NoMatch(f"{x.name} is also read by {others[0].name}", others[0].name)
    path = _path(x)
    if isinstance(path, NoMatch):
        return path
    producer, weights = path[0], _weights(path[0])
    labels = Labels(program)
    labels.start(producer)
    for node in path[1:]:
        labels.follow(node)
    columns = labels[x].flatten(0, -2)
    if not bool((columns == columns[:1]).all()) or int(columns.min()) < 0:
        return NoMatch(f"the columns of {x.name} are not one channel of {producer.name} each", x.name)
    channels, ties = columns[0].long().unique(return_inverse=True)
    reader = _other_reader(path, labels, set(channels.tolist()))
    if reader is not None:
        return NoMatch(f"{producer.name}, which it comes from, is also read by {reader.name}", reader.name)
    return Fold(tuple(members), tuple(path), weights, channels, ties)


def _weights(node: fx.Node) -> tuple[int, ...]:
    """Positions of the stored vectors or matrix by which a node makes its channels; none where it makes no channels."""
    positions: tuple[int, ...]
    if is_call(node, aten.linear.default):
        positions = (1,) if argument(node, 2, "bias") is None else (1, 2)
    elif is_call(node, aten.layer_norm.default):
        positions = (2,) if argument(node, 3, "bias") is None else (2, 3)
    elif is_call(node, aten.rms_norm.default):
        positions = (2,)
    elif is_call(node, aten.mul.Tensor):
        scales = [i for i, arg in enumerate(node.args) if is_weight(arg) and arg.meta["val"].dim() == 1]
        positions = tuple(scales) if len(scales) == 1 else ()
    else:
        return ()
    width = node.meta["val"].shape[-1]
    held = [node.args[at] if at < len(node.args) else None for at in positions]
    fitting = all(is_weight(weight) and weight.meta["val"].shape[0] == width for weight in held)
    return positions if fitting else ()


def _path(node: fx.Node) -> list[fx.Node] | NoMatch:
    """The shortest chain of calls from a producer to `node`, both included."""
    if _weights(node):
        return [node]
    paths = [_path(operand) for operand in carriers(node)]
    found = [path for path in paths if not isinstance(path, NoMatch)]
    if found:
        return [*min(found, key=len), node]
    if paths:
        (reason, *_) = [path for path in paths if isinstance(path, NoMatch)]
        return reason
    made_by = node.target if node.op == "call_function" else node.op
    return NoMatch(f"{node.name} ({made_by}) passes no factor on, and has no weight of its own to take it", node.name)


def _other_reader(path: list[fx.Node], labels: Labels, channels: set[int]) -> fx.Node | None:
    """What else reads one of the channels on their way; a cache that holds them only comes back to the program."""
    for node, following in pairwise(path):
        if _times_read(following, node) != 1:
            return following
        for user in node.users:
            if user is following or (user.op == "output" and is_cache(node)):
                continue
            if (reader := _reader(user, labels, channels)) is not None:
                return reader
    return None


def _times_read(user: fx.Node, node: fx.Node) -> int:
    operands: list[fx.Node] = []

    def note(operand: fx.Node) -> fx.Node:
        operands.append(operand)
        return operand

    fx.node.map_arg((user.args, user.kwargs), note)
    return operands.count(node)


def _reader(node: fx.Node, labels: Labels, channels: set[int]) -> fx.Node | None:
    """The call beside the path that reads one of the channels; None where views only lead to others."""
    if not is_view(node):
        return node
    labels.follow(node)
    held = labels[node]
    if isinstance(held, Tensor) and channels.isdisjoint(held.unique().tolist()):
        return None
    return next((found for user in node.users if (found := _reader(user, labels, channels)) is not None), None)


def fold(program: Program, found: Fold, factor: Tensor, tag: str) -> None:
    """Divides the activation by a factor for each channel, and multiplies what reads it; the statistics follow.

    Args:
        program: is changed.
        found: of this program.
        factor: float32 [c], positive and finite.
        tag: ends the names of the new weights.

    Raises:
        HikuiError: a matrix holds NaN or infinite values.
    """
    node = found.producer
    n = int(node.meta["val"].shape[-1])
    divisor = torch.ones(n).index_copy(0, found.channels, factor)
    for at in found.weights:
        held = node.args[at]
        assert is_weight(held)
        by = divisor if held.meta["val"].dim() == 1 else divisor.unsqueeze(1)
        rewrite(program, node, at, tag, lambda rows, part, by=by: rows / by[part])  # type: ignore[misc]
    columns = factor[found.ties]
    for member in found.members:
        rewrite(program, member, 1, tag, lambda rows, part: rows * columns)
        member.meta.pop(SENSITIVITY, None)
    node.meta.pop(SENSITIVITY, None)
    _rescale_statistics(program, found.members, columns)


def rewrite(program: Program, node: fx.Node, at: int, tag: str, change: Callable[[Tensor, slice], Tensor]) -> None:
    """Puts a changed copy of a stored tensor in the place of an argument; others that read the tensor keep it.

    Args:
        program: is changed.
        node: the call.
        at: position of the argument.
        tag: ends the name of the new tensor.
        change: gives new rows, float32, of some rows and of which they are.

    Raises:
        HikuiError: the tensor holds NaN or infinite values.
    """
    weight = node.args[at]
    assert is_weight(weight)
    size, site = tuple(map(int, weight.meta["val"].shape)), node.meta.get(SITE, node.name)
    out = torch.empty(size)
    for part in row_parts(size[0], torch.Size(size[1:]).numel()):
        out[part] = change(load_finite(program, weight, site, part), part)
    replace_weight(program, node, at, tag, out)


def replace_weight(program: Program, node: fx.Node, at: int, tag: str, tensor: Tensor) -> None:
    """Stores a tensor of the same size in the place of an argument; drops the old one where nothing else reads it."""
    weight = node.args[at]
    assert is_weight(weight)
    key = program.weight_of(weight)
    if key.endswith(f".{tag}") and list(weight.users) == [node]:
        program.store.put(key, tensor)  # Made by the same transform, for this call alone.
        return
    node.update_arg(at, program.add_weight(program.store.free_name(f"{key}.{tag}"), tensor))
    drop_weights(program, [weight])


def _rescale_statistics(program: Program, members: Sequence[fx.Node], columns: Tensor) -> None:
    """Makes the statistics of tied sites those of the activation over the factors; unknown ones no longer hold."""
    kept: dict[str, str] = {}
    for kind, key in members[0].meta.get(STATISTICS, {}).items():
        if kind == "gram":
            program.store.alias(key, _Rescaled(program.store.source(key), columns))
        elif (power := _POWERS.get(kind)) is None:
            continue
        elif power:
            program.store.put(key, program.store.load(key) / columns**power)
        kept[kind] = key
    for node in members:
        if STATISTICS in node.meta:
            node.meta[STATISTICS] = dict(kept)


@dataclass(frozen=True, eq=False)
class _Rescaled:
    """A Gram matrix over factors on both sides, made when it is read: a copy of each would double what lies on disk.

    Attributes:
        source: float32 [k, k].
        factors: float32 [k].
    """

    source: TensorSource
    factors: Tensor

    @property
    def info(self) -> TensorInfo:
        return self.source.info

    def load(self) -> Tensor:
        return self.source.load() / self.factors / self.factors.unsqueeze(1)


def column_maxima(program: Program, members: Sequence[fx.Node], workers: Workers) -> Tensor:
    """The largest magnitude of each input column over the matrices of tied sites: float32 [k].

    Raises:
        HikuiError: a matrix holds NaN or infinite values.
    """

    def largest(part: tuple[fx.Node, slice]) -> Tensor:
        node, rows = part
        return load_finite(program, weight_of(node), node.meta[SITE], rows).abs().amax(0)

    parts = [(node, rows) for node in members for rows in row_parts(*matrix_shape(node))]
    return torch.stack(list(workers.map(largest, parts))).amax(0)

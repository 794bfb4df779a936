"""Rotary position embedding, the rotate-half convention: x·cos + cat(−x_high, x_low)·sin."""

from dataclasses import dataclass

from torch import fx

from hikui.passes.graph import argument, aten, is_call, shape
from hikui.passes.patterns.match import NoMatch

_END = (1 << 63) - 1


@dataclass(frozen=True)
class RotaryMatch:
    """A rotation.

    Attributes:
        x: [1, H, T, D].
        cos, sin: [1, T, D], the two halves of D equal.
        output: the node that the rotation ends with.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    output: fx.Node


def is_half_rotation(node: fx.Node) -> bool:
    """Whether a node is cat(−…, …, −1), by which rotations are found."""
    if not is_call(node, aten.cat.default) or argument(node, 1, "dim", 0) not in (
        -1,
        node.meta["val"].dim() - 1,
    ):
        return False
    parts = node.args[0]
    return isinstance(parts, tuple | list) and len(parts) == 2 and is_call(parts[0], aten.neg.default)


def match_rotary(anchor: fx.Node) -> RotaryMatch | NoMatch:
    """Recognises the rotation around cat(−x_high, x_low)."""
    parts = anchor.args[0]
    assert isinstance(parts, tuple | list)
    negated, low = parts
    high = negated.args[0] if isinstance(negated, fx.Node) else None
    if not is_call(high, aten.slice.Tensor) or not is_call(low, aten.slice.Tensor) or high.args[0] is not low.args[0]:
        return NoMatch("the turned vector is not made of two slices of one tensor", anchor.name)
    x = high.args[0]
    assert isinstance(x, fx.Node)
    if x.meta["val"].dim() != 4:
        return NoMatch(f"what is turned has {x.meta['val'].dim()} dimensions, not 4", anchor.name)
    size = int(shape(x)[-1])
    if not (_is_range(low, 0, size // 2, size) and _is_range(high, size // 2, size, size)) or size % 2:
        return NoMatch("the slices are not the two halves of the last dimension", anchor.name)
    with_sin = _only_user(anchor, aten.mul.Tensor)
    output = _only_user(with_sin, aten.add.Tensor) if with_sin else None
    if with_sin is None or output is None:
        return NoMatch(
            "the turned half is not multiplied by a sine and added to the straight one",
            anchor.name,
        )
    with_cos = output.args[0] if output.args[1] is with_sin else output.args[1]
    if not is_call(with_cos, aten.mul.Tensor) or x not in with_cos.args:
        return NoMatch(f"{output.name} does not add the same tensor times a cosine", output.name)
    cos = with_cos.args[1] if with_cos.args[0] is x else with_cos.args[0]
    sin = with_sin.args[1] if with_sin.args[0] is anchor else with_sin.args[0]
    tables = [_table(table, size) for table in (cos, sin)]
    for table in tables:
        if isinstance(table, NoMatch):
            return table
    first, second = tables
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return RotaryMatch(x, first, second, output)


def _is_range(node: fx.Node, start: int, end: int, size: int) -> bool:
    """Whether a slice takes start…end of the last of four dimensions."""
    if argument(node, 1, "dim", 0) not in (-1, 3) or argument(node, 4, "step", 1) != 1:
        return False
    got_start, got_end = argument(node, 2, "start"), argument(node, 3, "end")
    got_start = 0 if got_start is None else got_start
    got_end = _END if got_end is None else got_end
    return isinstance(got_end, int) and got_start == start and min(got_end, size) == end


def _only_user(node: fx.Node, target: object) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], target) else None


def _table(node: object, size: int) -> fx.Node | NoMatch:
    """The [1, T, D] table behind `unsqueeze(1)`, if its two halves are equal."""
    if not is_call(node, aten.unsqueeze.default) or node.args[1] != 1 or node.meta["val"].dim() != 4:
        name = node.name if isinstance(node, fx.Node) else str(node)
        return NoMatch(f"{name} is no table of [1, T, D] put before every head", name)
    table = node.args[0]
    assert isinstance(table, fx.Node)
    if shape(table)[0] != 1 or shape(table)[-1] != size:
        return NoMatch(f"the table has shape {list(shape(table))}, not [1, T, {size}]", table.name)
    if not _halves_equal(table):
        return NoMatch(f"nothing shows that the two halves of {table.name} are equal", table.name)
    return table


def _halves_equal(node: fx.Node) -> bool:
    """Follows elementwise calls up to cat(f, f): what is made of it elementwise has equal halves too."""
    elementwise = (
        aten.cos.default,
        aten.sin.default,
        aten.to.dtype,
        aten._to_copy.default,
    )
    while True:
        scaled = is_call(node, aten.mul.Tensor) and isinstance(node.args[1], int | float)
        if not (is_call(node, *elementwise) or scaled):
            break
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node = inner
    if not is_call(node, aten.cat.default) or argument(node, 1, "dim", 0) not in (
        -1,
        node.meta["val"].dim() - 1,
    ):
        return False
    parts = node.args[0]
    return isinstance(parts, tuple | list) and len(parts) == 2 and parts[0] is parts[1]

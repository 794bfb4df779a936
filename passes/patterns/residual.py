"""The residual stream of a model with root-mean-square norms: what writes into it, and what reads it."""

from dataclasses import dataclass, field

from torch import fx

from hikui.lowering.ir.packed import is_packed_embedding
from hikui.passes.graph import argument, aten, is_call, is_weight, same_size, shape
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.norm import RmsNormMatch, match_rms_norm


@dataclass
class Residual:
    """Everything that touches the stream, in graph order.

    Attributes:
        embeddings: look-ups whose rows lie in the stream.
        writers: products whose outputs lie in the stream.
        norms: the norms that read it.
        reads: for each norm's output the calls by which it reads the stream.
        readers: products that read it, behind a norm or not, each with that norm.
    """

    embeddings: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    norms: list[RmsNormMatch] = field(default_factory=list)
    reads: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    readers: list[tuple[fx.Node, RmsNormMatch | None]] = field(default_factory=list)


def match_residual(graph: fx.Graph) -> Residual | NoMatch:
    """Follows the stream from the token embedding on, forwards and backwards, through sums, views and plain factors.

    Returns:
        The stream, or the first node that neither keeps a rotation nor can take it into a weight.
    """
    tokens = [node for node in graph.nodes if is_call(node, aten.embedding.default) and _looks_up_tokens(node)]
    packed = next((node for node in graph.nodes if is_packed_embedding(node)), None)
    if packed is not None:
        return NoMatch(f"{packed.name} looks tokens up in a packed matrix, which stays as it is", packed.name)
    if len(tokens) != 1:
        return NoMatch(f"the model looks its tokens up in {len(tokens)} tables, not in one", "output")
    order = {node: number for number, node in enumerate(graph.nodes)}
    found, seen, todo = Residual(), {tokens[0]}, [tokens[0]]
    while todo:
        # In graph order, so that what is refused is the first that breaks the pattern.
        todo.sort(key=order.__getitem__, reverse=True)
        node = todo.pop()
        steps = (_source(node, found), _users(node, found))
        for step in steps:
            if isinstance(step, NoMatch):
                return step
            todo += [near for near in step if near not in seen]
            seen.update(step)
    found.embeddings.sort(key=order.__getitem__)
    found.writers.sort(key=order.__getitem__)
    found.norms.sort(key=lambda norm: order[norm.output])
    found.readers.sort(key=lambda reader: order[reader[0]])
    return found


def _looks_up_tokens(node: fx.Node) -> bool:
    index = node.args[1]
    return isinstance(index, fx.Node) and index.op == "placeholder" and not is_weight(index) and is_weight(node.args[0])


def _plain(node: fx.Node) -> fx.Node | None:
    """What a call passes on column by column: the operand of a view of the leading dimensions, or of a plain factor."""
    operand = node.args[0] if node.args else None
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        scaled = isinstance(node.args[1], int | float)
        return operand if scaled and isinstance(operand, fx.Node) else None
    if is_call(node, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim) and isinstance(operand, fx.Node):
        return operand if same_size(shape(node)[-1], shape(operand)[-1]) else None
    return None


def _source(node: fx.Node, found: Residual) -> list[fx.Node] | NoMatch:
    """What a node of the stream is made of."""
    if is_call(node, aten.embedding.default) and is_weight(node.args[0]):
        found.embeddings.append(node)
        return []
    if is_call(node, aten.linear.default) and is_weight(node.args[1]):
        bias = argument(node, 2, "bias")
        if bias is not None and not (len(node.args) > 2 and is_weight(bias)):
            return NoMatch(f"the bias of {node.name} is no stored vector", node.name)
        found.writers.append(node)
        return []
    if is_call(node, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs:
        terms = [term for term in node.args if isinstance(term, fx.Node)]
        if len(terms) == 2 and all(same_size(shape(term)[-1], shape(node)[-1]) for term in terms):
            return terms
    if (operand := _plain(node)) is not None:
        return [operand]
    made_by = node.target if node.op == "call_function" else node.op
    return NoMatch(f"{node.name} ({made_by}) writes into the residual stream and cannot be rotated", node.name)


def _users(node: fx.Node, found: Residual) -> list[fx.Node] | NoMatch:
    """The further nodes of the stream that read a node of it; its norms and their readers are noted."""
    normed = _norms(node)
    explained: set[fx.Node] = set()
    for norm, inside in normed:
        explained |= inside
        if (refused := _norm_readers(norm, found)) is not None:
            return refused
        found.norms.append(norm)
        found.reads[norm.output] = inside
    out = []
    for user in node.users:
        if user in explained:
            continue
        if is_call(user, aten.linear.default) and user.args[0] is node and is_weight(user.args[1]):
            found.readers.append((user, None))
        elif is_call(user, aten.add.Tensor) or _plain(user) is node:
            out.append(user)
        else:
            reads = f"{user.name} ({user.target})" if user.op == "call_function" else "the program's output"
            return NoMatch(f"{reads} reads the residual stream at {node.name} and does not keep a rotation", user.name)
    return out


def _norms(node: fx.Node) -> list[tuple[RmsNormMatch, set[fx.Node]]]:
    """The norms of a node, each with the calls by which it reads the node."""
    out: list[tuple[RmsNormMatch, set[fx.Node]]] = []
    for user in node.users:
        if is_call(user, aten.rms_norm.default):
            match = match_rms_norm(user)
            if isinstance(match, RmsNormMatch) and match.weight in user.args:
                out.append((match, {user}))
        if not is_call(user, aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor):
            continue
        anchor = user
        for target in (aten.mean.dim, aten.add.Tensor, aten.rsqrt.default):
            following = [next_ for next_ in anchor.users if is_call(next_, target)]
            if len(following) != 1 or len(anchor.users) != 1:
                break
            (anchor,) = following
        match = match_rms_norm(anchor)
        if isinstance(match, RmsNormMatch) and match.x is node:
            products = {mul for mul in anchor.users if is_call(mul, aten.mul.Tensor) and node in mul.args}
            if len(products) == len(anchor.users) and match.weight in match.output.args:
                out.append((match, {user, *products}))
    return out


def _norm_readers(norm: RmsNormMatch, found: Residual) -> NoMatch | None:
    """Notes the products that read a norm, directly or through views; nothing else may."""
    todo = [norm.output]
    while todo:
        node = todo.pop()
        for user in node.users:
            if is_call(user, aten.linear.default) and user.args[0] is node and is_weight(user.args[1]):
                found.readers.append((user, norm))
            elif _plain(user) is node:
                todo.append(user)
            else:
                reads = f"{user.name} ({user.target})" if user.op == "call_function" else "the program's output"
                return NoMatch(f"{reads} reads the norm {norm.output.name} and is no float product", user.name)
    return None

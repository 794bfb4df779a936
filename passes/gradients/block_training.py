"""A block of the model as a function of its matrices that gradients flow through.

Passes that learn something block by block evaluate the graph's own nodes. The `hikui::` ops have no gradients, so their
reference functions stand in for them, and what a quantised cache rounds is passed straight through.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.engine.streaming import sees_text
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir import dialect
from hikui.lowering.ir.interpreter import empty_cache
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BLOCK, WEIGHT, Program, evaluate
from hikui.passes.graph import block_segments

_hikui = torch.ops.hikui


def _cache_update_quantized(codes: Tensor, scale: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op; as to its gradient, what is written is what is read."""
    values, codes, scale = _hikui.cache_update_quantized(codes, scale, new.detach(), past)
    written = dialect._cache_update(torch.zeros_like(values), new, past)
    return values + (written - written.detach()), codes, scale


_DIFFERENTIABLE: dict[object, Callable[..., object]] = {
    _hikui.causal_mask.default: dialect._causal_mask,
    _hikui.cache_update.default: dialect._cache_update,
    _hikui.cache_update_quantized.default: _cache_update_quantized,
    _hikui.rms_norm.default: dialect._rms_norm,
    _hikui.swiglu.default: dialect._swiglu,
    _hikui.rotary.default: dialect._rotary,
    _hikui.attention.default: dialect._attention,
}

_LINEAR = _hikui.linear.default

Product = Callable[[Tensor, Tensor | None], Tensor]
"""What a site does with its input and its bias, if it has one."""


@dataclass(frozen=True)
class BlockSpan:
    """A run of calls that belong to one block.

    Attributes:
        nodes: in graph order.
        after: what comes next in the graph.
        sites: those of the nodes whose matrices are to be learned on.
        outputs: what calls behind the span read and the sites have a part in.
    """

    nodes: list[fx.Node]
    after: fx.Node
    sites: list[fx.Node]
    outputs: list[fx.Node]

    @property
    def name(self) -> str:
        """For notes and messages."""
        block = self.nodes[0].meta.get(BLOCK)
        return "what is behind the blocks" if block is None else f"block {block}"

    @property
    def without_gradient(self) -> fx.Node | None:
        """The first of the nodes that gradients cannot pass, or None."""
        return next((node for node in self.nodes if not _passes_gradients(node)), None)


def require_gradients(among: Iterable[BlockSpan], name: str) -> None:
    """Raises HikuiError where gradients cannot pass a span.

    Args:
        among: the spans.
        name: of the pass that wants them.
    """
    for span in among:
        if (barrier := span.without_gradient) is not None:
            raise HikuiError(
                f"{span.name.capitalize()} holds {barrier.target} ({barrier.name}), which gradients cannot pass; run "
                f"{name} before `activation` and `fuse`."
            )


def spans(program: Program, chosen: Sequence[fx.Node]) -> list[BlockSpan]:
    """The spans that hold chosen sites and whose output something reads, in graph order.

    Sites that no such span holds, because they lie outside of the blocks or give the logits themselves, are in none.
    """
    wanted, found = set(chosen), []
    for segment in block_segments(program):
        inside = [index for index, node in enumerate(segment) if BLOCK in node.meta]
        if not inside:
            continue
        nodes = segment[inside[0] : inside[-1] + 1]
        held, learned = set(nodes), [node for node in nodes if node in wanted]
        reached: set[fx.Node] = set(learned)
        for node in nodes:
            if any(operand in reached for operand in node.all_input_nodes):
                reached.add(node)
        outputs = [
            node
            for node in nodes
            if node in reached
            and isinstance(node.meta["val"], Tensor)
            and node.meta["val"].is_floating_point()
            and any(user.op == "call_function" and user not in held for user in node.users)
        ]
        if learned and outputs:
            found.append(BlockSpan(nodes, nodes[-1].next, learned, outputs))
    return found


def _passes_gradients(node: fx.Node) -> bool:
    target: Any = node.target
    return getattr(target, "namespace", "") != dialect.NAMESPACE or target is _LINEAR or target in _DIFFERENTIABLE


class TrainingBlock:
    """A span with its weights in memory; what its sites do is an argument, and weights may be put in others' place.

    Args:
        program: holds the span and its weights.
        span: which must pass gradients.
        lengths: of the texts that will be run.
        fixed: what depends on a length alone, by length; blocks that are in memory together share it.
    """

    def __init__(
        self,
        program: Program,
        span: BlockSpan,
        lengths: set[int],
        fixed: dict[int, dict[fx.Node, object]] | None = None,
    ) -> None:
        self._program = program
        self._outputs = span.outputs
        self._tokens, self._past, *_ = program.input_nodes()
        changing = text_dependent(program)
        self._calls = [node for node in span.nodes if node.name in changing]
        held, learned = set(self._calls), set(span.sites)
        operands = list(dict.fromkeys(operand for node in self._calls for operand in node.all_input_nodes))
        self.inputs = [
            node for node in operands if node is self._tokens or (node.name in changing and node not in held)
        ]
        """What it reads of the calls before it, and the token ids if it does, but not what a length alone decides."""
        self.vectors = [node for node in operands if is_vector(node)]
        """The weights of one dimension that it reads: those of norms, and biases."""
        self._weights: dict[fx.Node, Tensor] = {}
        self._dense: dict[fx.Node, Tensor] = {}
        for node in self._calls:
            if node.target is _LINEAR and node not in learned:
                self._dense[node] = PackedLinear.of(node).dense(self._program.store)
        for node in operands:
            read = [user for user in node.users if user in held]
            if WEIGHT in node.meta and not all(_is_matrix(node, user, learned) for user in read):
                self._weights[node] = self._load(node)
        inputs = set(self.inputs)
        single = [
            node for node in operands if node.name not in changing and WEIGHT not in node.meta and node not in inputs
        ]
        self._by_length = {} if fixed is None else fixed
        for length in sorted(lengths):
            known = self._by_length.setdefault(length, {})
            known |= self._fixed([node for node in single if node not in known], length)

    def _load(self, node: fx.Node) -> Tensor:
        return self._program.store.load(self._program.weight_of(node))

    @torch.no_grad()
    def _fixed(self, wanted: list[fx.Node], length: int) -> dict[fx.Node, object]:
        """The values of inputs and of calls that are the same for all texts of a length."""
        needed, waiting = set(wanted), list(wanted)
        while waiting:
            for operand in waiting.pop().all_input_nodes:
                if operand not in needed:
                    needed.add(operand)
                    waiting.append(operand)
        values: dict[fx.Node, object] = {}
        for node in self._program.graph.nodes:
            if node not in needed:
                continue
            if node.op == "call_function":
                values[node] = evaluate(node, values.__getitem__)[1]
            elif node is self._tokens:
                values[node] = torch.zeros(1, length, dtype=torch.int64)
            elif node is self._past:
                values[node] = torch.tensor([0])
            else:
                values[node] = self._load(node) if WEIGHT in node.meta else empty_cache(node)
        return {node: values[node] for node in wanted}

    def run(
        self,
        inputs: Mapping[fx.Node, Tensor],
        length: int,
        products: Mapping[fx.Node, Product],
        instead: Mapping[fx.Node, Tensor] | None = None,
    ) -> list[Tensor]:
        """The span's outputs for a text.

        Args:
            inputs: the values of `inputs`; gradients reach them.
            length: of the text.
            products: of each site.
            instead: weights in the place of stored ones, by their placeholders; gradients reach them.
        """
        values: dict[fx.Node, object] = {**self._weights, **self._by_length[length], **inputs, **(instead or {})}

        def value_of(node: Any) -> Any:
            return values[node]

        for node in self._calls:
            product = products.get(node)
            if product is None and node in self._dense:
                product = multiply_by(self._dense[node])
            if product is not None:
                bias = PackedLinear.of(node).bias if node.target is _LINEAR else _bias(node)
                values[node] = product(value_of(node.args[0]), value_of(bias) if isinstance(bias, fx.Node) else None)
                continue
            if (reference := _DIFFERENTIABLE.get(node.target)) is None:
                values[node] = evaluate(node, value_of)[1]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
                values[node] = reference(*args, **kwargs)
        return [value_of(node) for node in self._outputs]


def multiply_by(matrix: Tensor) -> Product:
    """The product with a matrix, float32 [n, k]; gradients reach it."""
    return lambda x, bias: F.linear(x, matrix, bias)


def text_dependent(program: Program) -> set[str]:
    """Names of the calls whose values depend on which tokens there are, not only on how many."""
    tokens, changing = program.input_nodes()[0].name, set[str]()
    for node in program.graph.nodes:
        if node.op == "call_function" and sees_text(node, changing, tokens):
            changing.add(node.name)
    return changing


def is_vector(node: fx.Node) -> bool:
    """Whether a node is a weight of one dimension, of floats."""
    value = node.meta.get("val")
    return WEIGHT in node.meta and isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()


def _bias(site: fx.Node) -> object:
    return site.args[2] if len(site.args) > 2 else site.kwargs.get("bias")


def _is_matrix(weight: fx.Node, user: fx.Node, learned: set[fx.Node]) -> bool:
    """Whether a call reads a weight as the matrix that `TrainingBlock` has in another form."""
    if user.target is _LINEAR:
        return weight in PackedLinear.of(user).stored()
    return user in learned and weight is user.args[1] and weight is not _bias(user)

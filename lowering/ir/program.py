"""The program: one FX graph, its weights beside it, and what a runner must know.

docs/architecture.md states the calling convention: weight placeholders first, then tokens, past and the caches; the
output is the logits and the new caches.
"""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

import hikui.lowering.ir.dialect  # noqa: F401  (registers the hikui ops that graphs hold)
from hikui.lowering.errors import VerificationError
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.attention import attend
from hikui.lowering.ir.cache_shape import FLOAT_CACHE, CacheShape, CacheTensor
from hikui.lowering.ir.store import WeightStore

# Keys of node.meta beside torch's own; docs/architecture.md says what each holds.
WEIGHT = "hikui.weight"
SOURCE = "hikui.source"
SITE = "hikui.site"
BLOCK = "hikui.block"
GROUP = "hikui.group"
STATISTICS = "hikui.statistics"
SENSITIVITY = "hikui.sensitivity"
FORMAT = "hikui.format"
FIXED = "hikui.fixed_format"
CORRECTION = "hikui.correction"
COLUMNS = "hikui.columns"
TRANSFORMED = "hikui.transformed"
ROTATED = "hikui.rotated"
FLOAT_WEIGHT = "hikui.float_weight"
BRANCH = "hikui.branch"
FACTOR = "hikui.factor"
LATENT = "hikui.latent"

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def evaluate(node: fx.Node, value_of: Callable[[fx.Node], object]) -> tuple[tuple[Any, ...], object]:
    """Calls a node's target on the values of its operands; returns the evaluated arguments and the result."""
    lookup: Callable[[fx.Node], Any] = value_of
    operands: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(operands, lookup)
    assert callable(node.target), f"{node.name} is not a call"
    # What is fake has a shape alone, and no mask to look at.
    eager = node.target is _ATTENTION and not isinstance(args[0], FakeTensor)
    return args, attend(*args, **kwargs) if eager else node.target(*args, **kwargs)


def infer(node: fx.Node, mode: FakeTensorMode) -> None:
    """Works out meta["val"] of a call from its operands', in the mode of their fake tensors."""
    # Broadcasting over T would record the guard T ≠ 1, and T = 1 is what decoding runs.
    unguarded = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    # Some meta kernels (baddbmm's) call ops that take a symbolic size in Python only.
    with enable_python_dispatcher(), mode, torch.no_grad(), unguarded:
        node.meta["val"] = evaluate(node, lambda operand: operand.meta["val"])[1]


@dataclass(frozen=True)
class ModelConfig:
    """What a runner must know of the model."""

    context_length: int
    vocabulary: int
    caches: tuple[CacheShape, ...]
    architecture: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def cache_tensors(self) -> tuple[CacheTensor, ...]:
        """Every cache tensor with its layer's number in its name, in the order of the inputs and outputs."""
        return tuple(
            replace(tensor, kind=f"{tensor.kind}_{layer}")
            for layer, cache in enumerate(self.caches)
            for tensor in cache.tensors(self.context_length)
        )

    @property
    def cache_format(self) -> str:
        """How the caches are stored: one format, or those of the layers joined by `+`, sorted."""
        return "+".join(sorted({cache.format for cache in self.caches})) or FLOAT_CACHE

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches at the full context length."""
        return sum(cache.nbytes(self.context_length) for cache in self.caches)


@dataclass
class Program:
    """A model on its way down.

    Attributes:
        graph_module: the graph, in the calling convention of docs/architecture.md.
        store: the weights that the graph's placeholders name.
        config: what a runner must know.
        tokenizer: the one that the model came with, if any.
        cautions: what its user should know of how the model was read, a sentence each.
        parameters: how many the model has, each tied matrix once; None where only a text is known.
    """

    graph_module: fx.GraphModule
    store: WeightStore
    config: ModelConfig
    tokenizer: ModelTokenizer | None = None
    cautions: tuple[str, ...] = ()
    parameters: int | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def _placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def weight_nodes(self) -> list[fx.Node]:
        return [node for node in self._placeholders() if WEIGHT in node.meta]

    def input_nodes(self) -> list[fx.Node]:
        """tokens, past, key_cache_0, value_cache_0, …"""
        return [node for node in self._placeholders() if WEIGHT not in node.meta]

    def cache_nodes(self) -> list[fx.Node]:
        """key_cache_0, value_cache_0, … and, where the cache is quantised, their scales."""
        return self.input_nodes()[2:]

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @staticmethod
    def weight_of(node: fx.Node) -> str:
        """The store key of a weight placeholder."""
        return str(node.meta[WEIGHT])

    def outputs(self) -> list[fx.Node]:
        """logits, key_cache_0', value_cache_0', …

        Raises:
            VerificationError: the graph does not return a flat tuple of nodes.
        """
        values = self.output_node.args[0]
        if isinstance(values, tuple | list) and all(isinstance(value, fx.Node) for value in values):
            return [value for value in values if isinstance(value, fx.Node)]
        raise VerificationError("The graph's output is not a tuple of logits and caches.")

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that owns the fake tensors in meta["val"], with the symbol of T."""
        value = self.input_nodes()[0].meta["val"]
        assert isinstance(value, FakeTensor), "the tokens placeholder carries a fake tensor"
        return value.fake_mode

    def clone(self) -> "Program":
        """A program whose graph and store can change without this one seeing it."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, copies)
        created = graph.output(output)
        created.meta = copy.copy(self.output_node.meta)
        for old, new in copies.items():
            new.meta = copy.copy(old.meta)
        module = fx.GraphModule(torch.nn.Module(), graph)
        return Program(module, self.store.fork(), self.config, self.tokenizer, self.cautions, self.parameters)

    def add_weight(self, key: str, tensor: Tensor) -> fx.Node:
        """Stores a tensor and returns a new placeholder that names it."""
        self.store.put(key, tensor)
        return self.add_placeholder(key)

    def add_placeholder(self, key: str) -> fx.Node:
        """A new weight placeholder for a tensor that the store already has."""
        info, weights = self.store.info(key), self.weight_nodes()
        anchor = weights[-1] if weights else None
        with self.graph.inserting_after(anchor) if anchor else self.graph.inserting_before(self._placeholders()[0]):
            node = self.graph.placeholder(re.sub(r"\W", "_", f"w_{key}"))
        node.meta[WEIGHT] = key
        with self.fake_mode:
            node.meta["val"] = torch.empty(info.shape, dtype=info.dtype)
        return node

    def remove_unused_weights(self) -> list[str]:
        """Erases the weight placeholders that nothing reads, and their tensors; returns the dropped keys, sorted."""
        for node in self.weight_nodes():
            if not node.users:
                self.graph.erase_node(node)
        used = {self.weight_of(node) for node in self.weight_nodes()}
        unused = sorted(set(self.store.keys()) - used)
        self.store.drop(unused)
        return unused

    def infer(self, node: fx.Node) -> None:
        """Works out meta["val"] of a call from its operands', in the mode that holds the symbol of T."""
        infer(node, self.fake_mode)

    def propagate(self, *, everything: bool = False) -> None:
        """Fills in meta["val"] where a pass left it out, or everywhere."""
        for node in self.graph.nodes:
            if node.op == "call_function" and (everything or "val" not in node.meta):
                self.infer(node)

    def recompile(self) -> None:
        """To be called after the graph was edited: fills in missing metadata, checks and regenerates the code."""
        self.propagate()
        self.graph.lint()
        self.graph_module.recompile()

    def to_exported_program(self) -> ExportedProgram:
        """The program as `torch.export` would give it, with the weights as leading user inputs."""
        clone = self.clone()
        placeholders = clone._placeholders()
        outputs = clone.outputs()
        clone.output_node.args = (tuple(outputs),)
        signature = ExportGraphSignature(
            [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
        )
        in_spec = pytree.tree_structure((tuple(0 for _ in placeholders), {}))
        out_spec = pytree.tree_structure(tuple(0 for _ in outputs))
        # As torch.export leaves it: no names at the root, because decomposing the program renames nodes.
        call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
        shape_env, length = self.fake_mode.shape_env, self.input_nodes()[0].meta["val"].shape[1]
        # The environment may hold symbols of traces past; only T belongs to this program.
        symbols = set() if shape_env is None or isinstance(length, int) else length.node.expr.free_symbols
        ranges = {symbol: shape_env.var_to_range[symbol] for symbol in symbols} if shape_env is not None else {}
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=clone.graph,
            graph_signature=signature,
            state_dict={},
            range_constraints=ranges,
            module_call_graph=[ModuleCallEntry("", call)],
            example_inputs=None,
            constants={},
        )

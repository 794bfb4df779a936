"""Runs a program in torch: the reference that every backend is held against, and what calibration measures with.

Weights are loaded when a node first needs them, so a program larger than memory can be run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from hikui.lowering.ir.program import WEIGHT, Program, evaluate
from hikui.lowering.ir.steps import check_ids, check_length
from hikui.lowering.memory import give_back

_HOLES = 1 << 28
"""Bytes of weights that are loaded and dropped before their holes in the heap are given back."""

Observer = Callable[[fx.Node, tuple[object, ...], object], None]
"""Called with a node, its evaluated arguments and its result."""


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing after it reads."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            owner[operand] = node
        owner.setdefault(node, node)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, node in owner.items():
        dying.setdefault(node, []).append(value)
    return dying


def empty_cache(node: fx.Node) -> Tensor:
    """Zeros of the shape and dtype of a cache placeholder: that cache before the first token."""
    value = node.meta["val"]
    return torch.zeros(tuple(int(size) for size in value.shape), dtype=value.dtype)


class Interpreter:
    """Runs a program node by node.

    Args:
        program: the program.
        keep_weights: keep each weight after its first use (quick, for models that fit), or load it at every use.
        observe: called after each node.
    """

    def __init__(self, program: Program, *, keep_weights: bool = True, observe: Observer | None = None) -> None:
        self.program = program
        self._keep_weights = keep_weights
        self._observe = observe
        self._weights: dict[str, Tensor] = {}
        self._dropped = 0
        self._nodes = [node for node in program.graph.nodes if node.op != "placeholder"]
        self._dying = _last_uses(self._nodes)

    def new_caches(self) -> list[Tensor]:
        """Empty caches in the order of the program's inputs, each of its placeholder's shape and dtype."""
        return [empty_cache(node) for node in self.program.cache_nodes()]

    def _weight(self, node: fx.Node) -> Tensor:
        key = self.program.weight_of(node)
        if key in self._weights:
            return self._weights[key]
        tensor = self.program.store.load(key)
        if self._keep_weights:
            self._weights[key] = tensor
        elif (dropped := self._dropped + tensor.nbytes) > _HOLES:
            give_back()
            self._dropped = 0
        else:
            self._dropped = dropped
        return tensor

    @torch.no_grad()
    def run(self, tokens: Tensor, past: int, caches: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One step.

        Args:
            tokens: int64 [1, T].
            past: how many tokens the caches hold.
            caches: as `new_caches` or the last step gives them; one that nobody else holds is freed once it is read.

        Returns:
            Logits float32 [1, T, V] and the new caches.

        Raises:
            HikuiError: the tokens do not fit the cache.
        """
        check_length(tokens.shape[1], past, self.program.config.context_length)
        env: dict[fx.Node, object] = dict(
            zip(self.program.input_nodes(), (tokens, torch.tensor([past]), *caches), strict=True)
        )
        for node in self._nodes:
            for operand in node.all_input_nodes:
                if operand not in env and WEIGHT in operand.meta:
                    env[operand] = self._weight(operand)
            if node.op == "output":
                logits, *new = (env[value] for value in self.program.outputs())
                assert isinstance(logits, Tensor)
                return logits, [cache for cache in new if isinstance(cache, Tensor)]
            args, result = evaluate(node, env.__getitem__)
            env[node] = result
            if self._observe is not None:
                self._observe(node, args, result)
            for dead in self._dying.get(node, ()):
                env.pop(dead, None)
        raise AssertionError("a graph ends with its output")


class ReferenceRunner:
    """The interpreter behind the interface of a runner: the cache stays inside."""

    def __init__(self, program: Program, *, keep_weights: bool = True, observe: Observer | None = None) -> None:
        self._interpreter = Interpreter(program, keep_weights=keep_weights, observe=observe)
        self.context_length = program.config.context_length
        self._caches = self._interpreter.new_caches()

    def reset(self) -> None:
        self._caches = self._interpreter.new_caches()

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """What the tokens so far have left, in the order of `ModelConfig.cache_tensors`."""
        return tuple(self._caches)

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of int64 tokens [T], with `past` tokens in the cache.

        Raises:
            HikuiError: the tokens do not fit the cache, or are none of the model's.
        """
        check_ids(tokens, self._interpreter.program.config.vocabulary)
        # Handed over one by one: a long context's caches are the most that a large model takes, and not twice.
        logits, self._caches = self._interpreter.run(torch.from_numpy(tokens)[None], past, self._handed_over())
        return np.asarray(logits[0].numpy(), dtype=np.float32)

    def _handed_over(self) -> Iterator[Tensor]:
        while self._caches:
            yield self._caches.pop(0)

    def close(self) -> None:
        """Nothing to give back."""

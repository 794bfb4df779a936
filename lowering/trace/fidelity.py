"""Compares a traced program with the model itself, before any pass: a trace can be wrong without failing.

The model runs by its own forward, without a cache and with transformers' own, and the program in the interpreter, on
prompts of several lengths, one of them beyond every window that the config names. Both are float32 and differ by the
order of sums alone.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.finite import require_finite_logits
from hikui.lowering.ir.interpreter import Interpreter, Observer
from hikui.lowering.ir.program import BLOCK, Program
from hikui.lowering.ir.store import TensorSource, WeightStore
from hikui.lowering.trace.blocks import block_list, block_results
from hikui.lowering.trace.shortened import (
    different_blocks,
    fill,
    load_when_called,
    parameter_names,
    shorten,
    shortened,
)
from hikui.lowering.trace.source import OpenModel

TOLERANCE = 1e-4
"""How far logits may be apart, relative to their spread: some 50 times what float32 costs the families tried."""

_WHOLE_BYTES = 1 << 30
"""Weights in float32 up to which the whole model is compared; a fixed number, so that every machine does the same."""

_LENGTHS = (4, 37)
_BEYOND = 5
"""Tokens of a prompt beyond a window."""

_STEPS = 2
"""Tokens of each prompt that go in singly: the last ones, or those around the window."""

_NOISE = 1e-5
"""Relative difference of hidden states from which a block counts as differing, once logits have shown a difference."""

_SMALLEST = 1e-5
"""Differences are told as the power of ten above them, and none below this one, as the rest depends on the CPU."""

_WINDOWS = ("window", "chunk", "local", "original_max_position_embeddings")


@dataclass(frozen=True)
class Fidelity:
    """What was compared.

    Attributes:
        prompts: lengths in tokens; two tokens of each went in singly, across the largest window or last.
        blocks: how many of the model's blocks, from the first on; those left out are of the same kinds as these.
        of: how many the model has.
        largest_difference: of the logits relative to their spread, rounded up to a power of ten.
    """

    prompts: tuple[int, ...]
    blocks: int
    of: int
    largest_difference: float


def own_model(opened: OpenModel) -> nn.Module:
    """A copy of a model that keeps its own attention and mask, its parameters still fake."""
    own = copy.deepcopy(opened.module, {id(parameter): parameter for parameter in opened.module.parameters()})
    for module in own.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            config._attn_implementation = "eager"  # what others need is not on every machine
    return own


def compare(program: Program, own: nn.Module, sources: Mapping[str, TensorSource]) -> Fidelity:
    """Compares a freshly traced program with its model.

    Args:
        program: as traced.
        own: the model, its parameters fake, see `own_model`; it is changed.
        sources: where the values of the parameters lie.

    Raises:
        HikuiError: they differ, or give logits that are not finite.
    """
    total = len({node.meta[BLOCK] for node in program.graph.nodes if BLOCK in node.meta})
    large = sum(program.store.info(key).nbytes for key in program.store.keys()) > _WHOLE_BYTES
    blocks, part = total, program
    if large and (count := different_blocks(program)) < total and (cut := shortened(program, count)) is not None:
        blocks, part = count, cut
        shorten(own, program, count)
    context = program.config.context_length
    lengths, window = prompt_lengths(own, context), largest_window(own, context)
    with torch.no_grad(), _quiet():
        if large:
            load_when_called(own, sources)
        else:
            part = _in_memory(part, own, sources)
        found = _Comparison(part, own, large, window)
        largest = max(found.run(tokens) for tokens in _prompts(own, program, lengths))
    return Fidelity(lengths, blocks, total, _power_of_ten(largest))


def prompt_lengths(model: nn.Module, context: int) -> tuple[int, ...]:
    """Lengths of the prompts to compare: short ones, and one beyond the largest window that lies within the context."""
    window = largest_window(model, context)
    beyond = [window + _BEYOND] if window else []
    return tuple(sorted({min(length, context) for length in (*_LENGTHS, *beyond)}))


def largest_window(model: nn.Module, context: int) -> int:
    """The largest window that a model's config names and that is shorter than the context; 0 where there is none."""
    config: Any = getattr(model, "config", None)
    named = config.to_dict() if hasattr(config, "to_dict") else {}
    return max((window for window in _windows(named) if window < context), default=0)


def _windows(config: object, name: str = "") -> Iterator[int]:
    """Every whole number of a config that is named as a window is."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _windows(value, str(key))
    elif isinstance(config, int) and not isinstance(config, bool) and config > 0 and _names_a_window(name):
        yield config


def _names_a_window(name: str) -> bool:
    return "layer" not in name and any(word in name for word in _WINDOWS)


def _prompts(model: nn.Module, program: Program, lengths: tuple[int, ...]) -> list[Tensor]:
    """Tokens drawn with a fixed seed. Padding is left out: some models give it no position."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embedding, "weight", None), "shape", (program.config.vocabulary,))[0]
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = torch.tensor([token for token in range(min(rows, program.config.vocabulary)) if token != padding])
    generator = torch.Generator().manual_seed(0)
    return [ids[torch.randint(0, len(ids), (1, length), generator=generator)] for length in lengths]


def _in_memory(program: Program, own: nn.Module, sources: Mapping[str, TensorSource]) -> Program:
    """Loads every weight once, for the model and for the program that is returned."""
    tensors = {key: program.store.load(key) for key in program.store.keys()}
    for module, names in parameter_names(own).items():
        values = {attribute: tensors[n] if n in tensors else sources[n].load() for attribute, n in names.items()}
        fill(module, values)
    return Program(program.graph_module, WeightStore.in_memory(tensors), program.config)


class _Comparison:
    """A program and its model, prompt by prompt."""

    def __init__(self, program: Program, own: nn.Module, large: bool, window: int = 0) -> None:
        self._window = window
        self._program, self._own, self._large = program, own, large
        self._agreed = 0

    def run(self, tokens: Tensor) -> float:
        """The largest difference of the logits of a prompt, relative to their spread."""
        length = tokens.shape[1]
        pieces = _pieces(length, self._window)
        want = self._logits(self._own(input_ids=tokens, use_cache=False, return_dict=True))
        require_finite_logits(self._program, tokens, want, "The model itself gives")
        got = self._program_logits(tokens, pieces)
        difference = self._relative(got, want, tokens, pieces, "its own forward")
        own = self._decoded(tokens, pieces)
        difference = max(difference, self._relative(got, own, tokens, pieces, "its own cached decoding"))
        self._agreed = length
        return difference

    @staticmethod
    def _logits(result: Any) -> Tensor:
        logits: Tensor = result.logits
        return logits.float()

    def _program_logits(self, tokens: Tensor, pieces: list[int], observe: Observer | None = None) -> Tensor:
        interpreter = Interpreter(self._program, keep_weights=not self._large, observe=observe)
        caches, parts, past = interpreter.new_caches(), [], 0
        for piece in pieces:
            logits, caches = interpreter.run(tokens[:, past : past + piece], past, caches)
            parts.append(logits)
            past += piece
        return torch.cat(parts, 1)

    def _decoded(self, tokens: Tensor, pieces: list[int]) -> Tensor:
        """The model's logits where it decodes with its own cache."""
        cache, parts, past = None, [], 0
        for piece in pieces:
            step = tokens[:, past : past + piece]
            result = self._own(input_ids=step, past_key_values=cache, use_cache=True, return_dict=True)
            cache = result.past_key_values
            parts.append(self._logits(result))
            past += piece
        return torch.cat(parts, 1)

    def _relative(self, got: Tensor, want: Tensor, tokens: Tensor, pieces: list[int], what: str) -> float:
        difference = _difference(got, want)
        if difference <= TOLERANCE:
            return difference
        where = self._first_difference(tokens, pieces)
        agreed = f" (up to {self._agreed} tokens they agree)" if self._agreed else ""
        raise HikuiError(
            f"The traced program is not the model: for {tokens.shape[1]} tokens its logits differ from those of "
            f"{what} by {difference:.1e} of their spread{agreed}, and {where}; the model cannot be lowered as it is."
        )

    def _first_difference(self, tokens: Tensor, pieces: list[int]) -> str:
        """Where the hidden states of the program first leave those of the model's own forward."""
        wanted = self._hidden_states(tokens)
        names = {node: block for block, node in block_results(self._program.graph).items()}
        parts: dict[int, list[Tensor]] = {}

        def observe(node: Any, _: tuple[Any, ...], result: object) -> None:
            if node in names and isinstance(result, Tensor):
                parts.setdefault(names[node], []).append(result)

        self._program_logits(tokens, pieces, observe)
        seen = {block: torch.cat(found, 1) for block, found in parts.items()}
        for block in sorted(seen.keys() & wanted.keys()):
            if seen[block].shape == wanted[block].shape and _difference(seen[block], wanted[block]) > _NOISE:
                return f"block {block} is the first that differs"
        return "every block that can be compared agrees"

    def _hidden_states(self, tokens: Tensor) -> dict[int, Tensor]:
        path = block_list(self._program.graph)
        found: dict[int, Tensor] = {}

        def keep(block: int) -> Any:
            def hook(_: nn.Module, __: object, result: object) -> None:
                first = result[0] if isinstance(result, tuple | list) else result
                if isinstance(first, Tensor):
                    found[block] = first

            return hook

        blocks = [] if path is None else list(self._own.get_submodule(path).children())
        handles = [module.register_forward_hook(keep(block)) for block, module in enumerate(blocks)]
        self._own(input_ids=tokens, use_cache=False, return_dict=True)
        for handle in handles:
            handle.remove()
        return found


def _pieces(length: int, window: int) -> list[int]:
    """How a prompt goes in: most of it at once, then single tokens, which cross the window where it is longer."""
    if _STEPS < window < length:
        rest = length - window - 1
        return [window - 1, *[1] * _STEPS, *([rest] if rest else [])]
    return [length - _STEPS, *[1] * _STEPS] if length > _STEPS else [1] * length


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the spread of what is wanted; infinite where either is not finite."""
    spread = float(want.max() - want.min())
    # Values that are all but equal are not held to less than float32 can tell apart.
    scale = max(spread, 1e-2 * float(want.abs().max()), torch.finfo(torch.float32).tiny)
    difference = float((got - want).abs().max()) / scale
    return difference if math.isfinite(difference) else math.inf


def _power_of_ten(value: float) -> float:
    return float(f"1e{max(math.ceil(math.log10(max(value, _SMALLEST))), round(math.log10(_SMALLEST)))}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice on how to call a model off the terminal."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

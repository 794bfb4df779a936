"""Stores keys and values in 8 or 4 bits."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.cache_shape import FLOAT_CACHE, CacheShape
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import aten, hikui, insert, is_call

Granularity = Literal["token", "channel"]


@dataclass(frozen=True)
class KvCache(Pass):
    """Quantises the key-value cache, with a scale for each token and head; comes before `fuse`.

    `channel` first makes the columns of a head more alike: each is centred on its mean over the calibration text and
    divided by the square root of its largest distance from it. Keys have a few columns that are far from zero or far
    larger than the others, which is why KIVI (Liu et al., 2024, section 3.2) gives them a scale a column; this is after
    KIVI, with columns that are known before the first token, so that no window of tokens stays in float. The square
    root leaves half of a column's size to the token's scale, as SmoothQuant does with α = 0.5: measured, it loses less
    than a scale for the column alone. With `fuse` none of this is done inside attention: steps of keys go to the
    queries, their centres shift all scores of a row alike, and steps and centres of values go to the result.

    Attributes:
        bits: 8 (codes −127…127) or 4 (−8…7).
        keys: how keys are scaled before they are quantised: `token` as they are, or `channel`.
        values: the same of values.
    """

    name: ClassVar[str] = "kv_cache"
    bits: int = 8
    keys: Granularity = "token"
    values: Granularity = "token"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"kv_cache cannot store {self.bits} bits; it takes 8 or 4.")
        for option in ("keys", "values"):
            if getattr(self, option) not in ("token", "channel"):
                raise UsageError(f"kv_cache has no {option}='{getattr(self, option)}'; it takes token or channel.")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Whether columns are measured."""
        return "channel" in (self.keys, self.values)

    @property
    def format(self) -> str:
        """The format of the caches, as `CacheShape` names it."""
        return f"int{self.bits}"

    def requires(self, program: Program) -> None:
        """Raises HikuiError where a cache is not one that `cache_update` alone writes, or cannot be packed."""
        for layer, cache in enumerate(program.config.caches):
            if cache.format not in (FLOAT_CACHE, self.format):
                raise HikuiError(f"The cache of layer {layer} is {cache.format} already; run kv_cache once.")
            if self.bits == 4 and cache.head_size % 2:
                raise HikuiError(
                    f"Layer {layer} has heads of {cache.head_size} columns, and int4 packs them in pairs; use bits=8."
                )
        for update in _updates(program):
            cached = update.args[0]
            assert isinstance(cached, fx.Node)
            if len(cached.users) > 1:
                raise HikuiError(
                    f"Cache {cached.name} is read by other nodes than {update.name}, so it cannot change its form."
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone.

        Raises:
            HikuiError: columns are to be measured and there is no calibration text, or it gives NaN or infinity.
        """
        if all(cache.format == self.format for cache in program.config.caches):
            return PassResult(program, False)
        work = program.clone()
        updates = _updates(work)
        scaled = [update for at, update in enumerate(updates) if (self.keys, self.values)[at % 2] == "channel"]
        columns = _measure(work, scaled, context) if scaled else {}
        before = work.config.cache_bytes
        shapes = tuple(replace(cache, format=self.format) for cache in work.config.caches)
        work.config = replace(work.config, caches=shapes)
        written: list[fx.Node] = []
        for layer, shape in enumerate(shapes):
            sides = updates[2 * layer : 2 * layer + 2]
            scales = _retype(work, [update.args[0] for update in sides], shape, layer)
            pairs = [
                _quantise(work, update, scale, columns.get(update)) for update, scale in zip(sides, scales, strict=True)
            ]
            written += [pair[part] for part in (0, 1) for pair in pairs]
        work.output_node.args = ((work.outputs()[0], *written),)
        for update in updates:
            work.graph.erase_node(update)
        work.recompile()
        return PassResult(work, True, [f"caches: {work.config.cache_bytes} bytes, {before} in float32"])

    def ensures(self, program: Program) -> None:
        """No cache is float any more."""
        for layer, cache in enumerate(program.config.caches):
            if cache.format != self.format:
                raise VerificationError(f"The cache of layer {layer} stayed {cache.format}.")


def _updates(program: Program) -> list[fx.Node]:
    """The writers of the float caches: of keys and of values, layer by layer.

    Raises:
        HikuiError: a cache is written by something else, such as fused attention.
    """
    if any(cache.format != FLOAT_CACHE for cache in program.config.caches):
        return []
    found = []
    for cached, new in zip(program.cache_nodes(), program.outputs()[1:], strict=True):
        if not is_call(new, hikui.cache_update.default) or new.args[0] is not cached:
            raise HikuiError(
                f"Cache {cached.name} is written by {new.name} ({new.target}), not by hikui::cache_update alone; put "
                "kv_cache before fuse."
            )
        found.append(new)
    return found


def _retype(program: Program, caches: Sequence[fx.node.Argument], shape: CacheShape, layer: int) -> list[fx.Node]:
    """Lets the placeholders of a layer's keys and values hold codes, and gives each another for its scales."""
    *codes, key_scale, value_scale = shape.tensors(program.config.context_length)
    nodes: list[fx.Node] = [node for node in caches if isinstance(node, fx.Node)]
    for tensor in (key_scale, value_scale):
        with program.graph.inserting_after(nodes[-1]):
            nodes.append(program.graph.placeholder(f"{tensor.kind}_{layer}"))
    for node, tensor in zip(nodes, (*codes, key_scale, value_scale), strict=True):
        with program.fake_mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    return nodes[2:]


def _quantise(
    program: Program, update: fx.Node, scale: fx.Node, columns: tuple[Tensor, Tensor] | None
) -> tuple[fx.Node, fx.Node]:
    """Writes and reads a cache quantised instead; returns the new codes and scales.

    The float update stays for the output alone, which is made anew.
    """
    cached, added, past = update.args
    assert isinstance(cached, fx.Node)
    weights: list[fx.Node] = []
    if columns is not None:
        names = (f"{cached.name}.centre", f"{cached.name}.step")
        weights = [program.add_weight(name, tensor) for name, tensor in zip(names, columns, strict=True)]
        for target, weight in zip((aten.sub.Tensor, aten.div.Tensor), weights, strict=True):
            added = insert(program, update, target, (added, weight), update)
    call = insert(program, update, hikui.cache_update_quantized.default, (cached, scale, added, past), update)
    values, codes, scales = (insert(program, update, operator.getitem, (call, at), update) for at in range(3))
    for target, weight in zip((aten.mul.Tensor, aten.add.Tensor), reversed(weights), strict=False):
        values = insert(program, update, target, (values, weight), update)
    update.replace_all_uses_with(values, delete_user_cb=lambda user: user.op != "output")
    return codes, scales


class _Columns:
    """What the columns [1, KV, 1, D] of one cache are on the calibration text; means in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, text: int, args: tuple[object, ...], result: object) -> None:
        """Takes in the arguments of a `cache_update`."""
        new = args[1]
        assert isinstance(new, Tensor)
        sums, low, high = new.double().sum(2, keepdim=True), new.amin(2, keepdim=True), new.amax(2, keepdim=True)
        self.tokens += new.shape[2]
        self.sums = sums if self.sums is None else self.sums + sums
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def centre_and_step(self, name: str) -> tuple[Tensor, Tensor]:
        """The mean, and the square root of the largest distance from it (1 where there is none)."""
        assert self.sums is not None and self.low is not None and self.high is not None
        centre = (self.sums / self.tokens).float()
        distance = torch.maximum(self.high - centre, centre - self.low)
        if not bool(distance.isfinite().all()):
            raise HikuiError(
                f"What {name} holds is NaN or infinite on the calibration text, so it has no scale; lower without "
                "kv_cache."
            )
        return centre, torch.where(distance > 0, distance.sqrt(), 1.0)


def _measure(program: Program, updates: list[fx.Node], context: PassContext) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Centre and step of the columns that each update writes, on the calibration text."""
    if context.calibration is None:
        raise HikuiError(
            "It measures columns of keys or values on real text and none was given; give some with --calibration "
            "TEXT_FILE, or take keys=token and values=token."
        )
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    seen = {update: _Columns() for update in sorted(updates, key=order.__getitem__)}
    with (
        Workers(context.workers) as workers,
        Stream(program, context.calibration.chunks, workers, scratch=context.scratch) as stream,
    ):
        for done, (update, columns) in enumerate(seen.items()):
            context.progress("columns of caches", done, len(seen))
            stream.advance(update, {update: columns})
        context.progress("columns of caches", len(seen), len(seen))
    return {update: columns.centre_and_step(str(update.args[0])) for update, columns in seen.items()}

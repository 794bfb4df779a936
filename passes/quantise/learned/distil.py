"""Distillation: scales and norms for which the quantised model's next tokens are those of the float model.

After the end-to-end stages of EfficientQAT (Chen et al., 2024, arXiv 2407.11062, section 3.3), which trains scales
alone, and of NanoQuant (arXiv 2602.06694), whose loss is the divergence from the float model. Norms and biases are
learned beside them; codes stay what a quantiser chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import pack_scale
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BLOCK, FLOAT_WEIGHT, SITE, Program
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.gradients.block_training import require_gradients
from hikui.passes.gradients.chain import Learned, Sections, sections, without_head
from hikui.passes.graph import drop_weights, selected
from hikui.passes.measure.footprint import Footprint, refuse_what_cannot_fit, value_nbytes
from hikui.passes.quantise.learned.end_to_end import EndToEnd

_LINEAR = torch.ops.hikui.linear.default

_EVERY = 16
"""Steps after which what has been learned is kept for a later run."""

_HELD_OUT = 8
"""One text in so many is not learned on but judged by."""

_EPOCHS = 1 << 20
"""More epochs than any run has, so that each epoch of each seed has an order of its own."""

_LARGEST = float(torch.finfo(torch.float16).max)

_SHARES = (0.75, 0.5, 0.25)
"""Of the way from where it began: what batches teach adds up with it, what they say by chance with its square."""

_WARM = 8
"""Steps at most in which the step size rises to its full height."""


@dataclass(frozen=True)
class Distil(Pass):
    """Learns factors for the scales and norms of a quantised model, end to end, by its divergence from the float one.

    Adam descends on KL(float‖quantised) of the next token. One text in eight is held out, and what is best on those
    is kept, of what was met on the way and of parts of the whole way: at worst the model as it was.

    Attributes:
        epochs: how often all texts are gone through.
        lr: Adam's step at its height, relative to each scale; it falls to zero along a cosine.
        batch: texts for each step.
        vectors: whether norms and biases are learned too.
        activation_bits: what a later `activation` will round to, so that the scales make up for that too; 0 for none.
        sites: regular expression of the sites to learn on; empty is all.
        skip: regular expression of the sites to leave as they are.
        seed: of the order of the texts.
    """

    name: ClassVar[str] = "distil"
    calibrates: ClassVar[bool] = True
    epochs: int = 1
    lr: float = 0.002
    batch: int = 4
    vectors: bool = True
    activation_bits: int = 0
    sites: str = ""
    skip: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (("epochs", self.epochs), ("batch", self.batch)):
            if value < 1:
                raise UsageError(f"distil cannot take {option}={value}; give 1 or more.")
        if not self.lr > 0:
            raise UsageError(f"distil cannot learn at a rate of {self.lr:g}; lr is above 0.")
        if self.activation_bits not in (0, 4, 8):
            raise UsageError(f"distil cannot take activation_bits={self.activation_bits}; give 0, 4 or 8.")

    def chosen(self, program: Program) -> list[fx.Node]:
        """The sites of blocks whose scales it learns, in graph order."""
        packed = [node for node in program.graph.nodes if node.target is _LINEAR and {SITE, BLOCK} <= node.meta.keys()]
        return [node for node in selected(packed, self.sites, self.skip) if PackedLinear.of(node).format.is_integer]

    def requires(self, program: Program) -> None:
        """Raises HikuiError where nothing is quantised, the float matrices are gone, or gradients cannot pass."""
        if not (chosen := self.chosen(program)):
            return
        for node in program.graph.nodes:
            if node.target is _LINEAR and PackedLinear.of(node).format.is_integer and FLOAT_WEIGHT not in node.meta:
                raise HikuiError(
                    f"Site {node.meta.get(SITE, node.name)} came packed, or what it was packed from is gone, so there "
                    "is no float model to learn from; run distil on a float checkpoint, before `dead_code`."
                )
        parts = sections(program, chosen)
        require_gradients((*parts.blocks, parts.head), self.name)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Learns on all blocks at once; codes, one byte a weight, stay in memory.

        Nothing is learned, and a warning says so, from text of a single window, which is not enough to learn from some
        and be judged by others, and of a model that makes its logits inside of a block.

        Raises:
            HikuiError: there is no calibration text, or not enough memory.
        """
        if not (chosen := self.chosen(program)):
            return PassResult(program, False)
        if context.calibration is None:
            raise HikuiError("It learns from text and none was given; give some with --calibration TEXT_FILE.")
        if len(context.calibration.chunks) < 2:
            context.warn(
                "The calibration text gives one window, and distil learns from some and is judged by others, so it has "
                "left scales and norms as they were; give a longer text."
            )
            return PassResult(program, False)
        parts = sections(program, chosen)
        if (reason := without_head(parts, self.name)) is not None:
            context.warn(f"{reason}, so it has left scales and norms as they were.")
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            best, notes = _Distillation(self, program, parts, context, workers).run()
        if best is None:
            return PassResult(program, False, notes)
        work = program.clone()
        _store(work, best)
        work.recompile()
        return PassResult(work, True, notes)


def _store(work: Program, learned: Learned) -> None:
    """Puts what was learned in the places of scales and vectors; `learned` names nodes of another clone."""
    nodes = {node.name: node for node in work.graph.nodes}
    for site, scale in learned.scales.items():
        held = PackedLinear.of(nodes[site.name]).scale
        assert held is not None, "integer formats have scales"
        _replace(work, held, pack_scale(scale))
    for vector, value in learned.vectors.items():
        _replace(work, nodes[vector.name], value)


def _replace(work: Program, weight: fx.Node, tensor: Tensor) -> None:
    """Stores a tensor under a name of its own, because a later pass may look for what the old one stands for."""
    key = work.store.free_name(f"{work.weight_of(weight)}.distilled")
    weight.replace_all_uses_with(work.add_weight(key, tensor))
    drop_weights(work, [weight])


class _Distillation:
    """One run of the pass; the program is only read."""

    def __init__(
        self, options: Distil, program: Program, parts: Sections, context: PassContext, workers: Workers
    ) -> None:
        assert context.calibration is not None, "it was looked at before"
        texts = list(context.calibration.chunks)
        self._options, self._program, self._context, self._workers = options, program, context, workers
        self._texts = texts
        self._judging = range(0, len(texts), _HELD_OUT)
        self._learning = [number for number in range(len(texts)) if number % _HELD_OUT]
        footprint = _footprint(parts, texts, workers.count)
        context.announce(f"{options.name} needs {footprint}")
        refuse_what_cannot_fit(footprint, context)
        self._whole = EndToEnd(program, parts, {text.shape[1] for text in texts}, options.activation_bits)
        self._vectors = self._whole.vectors if options.vectors else []
        self._inputs, self._targets = self._starts(parts)
        self._sites = list(self._whole.products)
        self._stored = {vector: program.store.load(program.weight_of(vector)) for vector in self._whole.vectors}
        sizes = [self._whole.products[site].scale.numel() for site in self._sites]
        self._sizes = sizes + [self._stored[vector].numel() for vector in self._vectors]

    def _starts(self, parts: Sections) -> tuple[list[dict[fx.Node, Tensor]], list[dict[fx.Node, Tensor]]]:
        """For each text what is read of what is before the blocks, and what the head reads in the float model."""
        found = []
        for span, read, as_float in (
            (parts.blocks[0], self._whole.inputs, False),
            (parts.head, self._whole.head_inputs, True),
        ):
            stream = Stream(self._program, self._texts, self._workers, scratch=self._context.scratch, as_float=as_float)
            with stream:
                # Block by block, so that no more than one is in memory as floats.
                for stop in (*(each.nodes[0] for each in parts.blocks[1:] if span is parts.head), span.nodes[0]):
                    stream.advance(stop)
                found.append(
                    [{node: stream.value(number, node) for node in read} for number in range(len(self._texts))]
                )
        return found[0], found[1]

    def run(self) -> tuple[Learned | None, list[str]]:
        """Learns; gives the best that was met, None where nothing was better than what there was, and notes."""
        options, resume = self._options, self._context.resume
        steps = options.epochs * -(-len(self._learning) // options.batch)
        theta = torch.ones(sum(self._sizes))
        optimiser = torch.optim.Adam([theta], lr=options.lr, betas=(0.9, 0.95), foreach=False)
        done, best = 0, theta.clone()
        if (kept := resume.load("state")) is not None:
            done, best = int(kept["done"]), kept["best"]
            theta.copy_(kept["theta"])
            first, least = kept["divergences"].tolist()
            if done:
                state = {key: kept[key] for key in ("step", "exp_avg", "exp_avg_sq")}
                optimiser.state[theta] = state
        else:
            first = least = self._judge(theta)
            if not isfinite(first):
                raise HikuiError(
                    "The quantised model gives NaN or infinite values on the calibration text, so nothing can be "
                    "learned; `hikui eval` of the float model shows whether it does so too."
                )
        for step in range(done, steps):
            self._context.progress(options.name, step, steps)
            theta.grad = self._gradient(theta, self._batch(step))
            for group in optimiser.param_groups:
                group["lr"] = options.lr * _height(step, steps)
            optimiser.step()
            give_back()
            finished = step + 1
            if finished % _EVERY == 0 or finished == steps:
                if (now := self._judge(theta)) < least:
                    least, best = now, theta.clone()
                moments = {key: value.clone() for key, value in optimiser.state[theta].items()}
                numbers = {"done": torch.tensor(finished), "divergences": torch.tensor([first, least]).double()}
                resume.save("state", {"theta": theta, "best": best, **moments, **numbers})
        self._context.progress(options.name, steps, steps)
        share = 1.0
        for part in _SHARES:
            shorter = torch.lerp(torch.ones_like(theta), theta, part)
            if (now := self._judge(shorter)) < least:
                least, best, share = now, shorter, part
        texts = f"{len(self._judging)} held-out texts"
        note = f"KL to the float model on {texts}: {least:.4f} nats a token, {first:.4f} before"
        if share < 1:
            note += f"; {share:g} of the way that was gone"
        if least == first:
            return None, [f"{note}; nothing was learned that is better"]
        learned = self._learned(best)
        return Learned(learned.scales, {vector: learned.vectors[vector] for vector in self._vectors}), [note]

    def _batch(self, step: int) -> list[int]:
        """The texts of a step, in an order of each epoch's own."""
        count, batch = len(self._learning), self._options.batch
        epoch, at = divmod(step, -(-count // batch))
        generator = torch.Generator().manual_seed((self._options.seed * _EPOCHS + epoch) % (1 << 63))
        order = torch.randperm(count, generator=generator).tolist()
        return [self._learning[index] for index in order[at * batch : (at + 1) * batch]]

    def _learned(self, theta: Tensor) -> Learned:
        """Scales, as float16 will hold them, and vectors for some factors."""
        parts = theta.split(self._sizes)
        scales = {}
        for site, part in zip(self._sites, parts, strict=False):
            held = self._whole.products[site].scale
            scales[site] = (held * part.view_as(held)).clamp(-_LARGEST, _LARGEST).to(torch.float16).float()
        vectors = dict(self._stored)
        for vector, part in zip(self._vectors, parts[len(self._sites) :], strict=True):
            vectors[vector] = self._stored[vector] * part
        return Learned(scales, vectors)

    def _judge(self, theta: Tensor) -> float:
        """The divergence a token on the held-out texts."""
        now = self._learned(theta)

        def one(number: int) -> float:
            return float(self._whole.divergence(self._inputs[number], self._targets[number], now))

        return sum(self._workers.map(one, self._judging)) / self._tokens(self._judging)

    def _gradient(self, theta: Tensor, numbers: list[int]) -> Tensor:
        """The gradient of the divergence a token of some texts, for the factors."""
        now = self._learned(theta)

        def one(number: int) -> Tensor:
            _, found = self._whole.gradients(self._inputs[number], self._targets[number], now)
            parts = [found.scales[site] * self._whole.products[site].scale for site in self._sites]
            parts += [found.vectors[vector] * self._stored[vector] for vector in self._vectors]
            return torch.cat([part.flatten() for part in parts])

        total = torch.zeros_like(theta)
        for gradient in self._workers.map(one, numbers):
            total += gradient
        if not bool(total.isfinite().all()):
            raise HikuiError(
                "Gradients are NaN or infinite on the calibration text; `hikui eval` of the float model shows whether "
                "its numbers are finite."
            )
        return total / self._tokens(numbers)

    def _tokens(self, numbers: Sequence[int]) -> int:
        return sum(self._texts[number].shape[1] for number in numbers)


def _height(step: int, steps: int) -> float:
    """Of the step size, over its full height."""
    return min(1.0, (step + 1) / min(_WARM, steps)) * (1 + cos(pi * step / steps)) / 2


def _footprint(parts: Sections, texts: Sequence[Tensor], workers: int) -> Footprint:
    """What it needs at once: all codes, what is learned, the head twice, a block's values for each worker."""
    # What the first block and the head read: one value a token each, as wide as what goes from block to block.
    kept = 2 * sum(value_nbytes(node, text.shape[1]) for text in texts for node in parts.blocks[-1].outputs)
    widest = max(text.shape[1] for text in texts)
    weights = scales = block = 0
    for span in parts.blocks:
        matrices = [PackedLinear.of(site) for site in span.sites]
        weights += sum(packed.rows * packed.columns for packed in matrices)
        scales += sum(packed.rows * packed.format.groups(packed.columns) for packed in matrices)
        values = sum(value_nbytes(node, widest) for node in span.nodes)
        sizes = [packed.rows * packed.columns for packed in matrices]
        block = max(block, 2 * values + 4 * sum(sizes) + 12 * max(sizes, default=0))
    flowing = len(parts.blocks) * sum(value_nbytes(node, widest) for node in parts.blocks[-1].outputs)
    head = sum(8 * packed.rows * packed.columns for packed in map(PackedLinear.of, parts.head.sites))
    peak = weights + (24 + 8 * workers) * scales + head + workers * (block + flowing) + kept
    site = parts.blocks[0].sites[0] if parts.blocks[0].sites else parts.blocks[0].nodes[0]
    return Footprint(peak, 0, str(site.meta.get(SITE, site.name)), 0, kept)

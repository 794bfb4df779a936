"""AWQ: scales up the weights of the columns whose activations are large, as far as the output's error shrinks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format, quantize_activation
from hikui.lowering.ir.program import SITE, STATISTICS, Program
from hikui.passes.graph import float_sites, matrix_shape, selected, weight_of
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.measure.evidence import TOKEN_WEIGHT, weights_of_sample
from hikui.passes.quantise.columns import mixed_order, require_mixable
from hikui.passes.quantise.rounder import BITS, GROUP, assigned_format, chosen_format
from hikui.passes.quantise.rounding import dequantise, round_matrix
from hikui.passes.transform.folding import Fold
from hikui.passes.transform.scaling import Factor, Scaling

_STEPS = 20
"""Exponents tried: 0, 1/20, … 19/20."""

_SMALLEST = 1e-4
"""Columns count as no smaller than this share of the largest: those that the text never excites stay in bounds."""


_ROWS = 1024
"""Rows of a site that its error is taken over: of more, evenly spaced ones; each takes 20 products with the metric."""


@dataclass(frozen=True)
class Awq(Scaling):
    """Divides the columns of activations by s = (E|x|)^a, and multiplies the weights by it, with the best of 20 a.

    The s of a group are normalised to √(max·min) = 1. Each a is judged by Σ E‖(Q(W·s)/s − W)·x‖² over the group's
    sites, Q being rounding to the format that a site is assigned, or else to the format that the options give; with the
    Gram matrix this needs no activations. Of sites with more than 1024 rows some, evenly spaced, stand for all. After
    AWQ (Lin et al., 2023): there the error is taken where the module of several sites ends, here at the output of each
    site; columns that come from one channel (query heads that share a KV head) have the mean of their magnitudes here,
    and are left alone there. The factor goes where the activation comes from, as in `smooth`; `rtn{clip=output}` has
    AWQ's search of clipped scales.

    With `activation_bits` the error that rounding the activations themselves will make is added, E‖W·s·(Q(x/s) − x/s)‖²
    over a sample of tokens: factors that serve the weights may leave one column of x far above the others, and factors
    that even it out cost the weights. The two errors are taken as independent.

    Attributes:
        bits, group, format: as in `rtn`: what sites without an assigned format are judged in.
        clip: how the scales are chosen while judging: `minmax` as in AWQ, or `mse`.
        activation_bits: what the activations will be rounded to, a scale a token: 8, 4, or 0 if they stay float.
        sites: regular expression of the sites; empty is all. A tied group takes part as a whole or not at all.
        skip: regular expression of the sites to leave as they are.
    """

    name: ClassVar[str] = "awq"
    needs: ClassVar[tuple[str, ...]] = ("mean_abs", "gram")
    bits: int = BITS
    group: int = GROUP
    format: str = ""
    clip: Literal["minmax", "mse"] = "minmax"
    activation_bits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.default_format()
        if self.activation_bits not in (0, 4, 8):
            raise UsageError(
                f"awq cannot judge activations of {self.activation_bits} bits; give 8, 4, or 0 for float ones."
            )

    def default_format(self) -> Format:
        """The format that sites are judged in which none was assigned to."""
        return chosen_format(self.name, self.bits, self.group, self.format)

    def wanted(self) -> tuple[str, ...]:
        """A sample only where activations are judged."""
        return (*self.needs, "sample") if self.activation_bits else self.needs

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no float site is named, or one has not been measured."""
        super().requires(program)
        for node in selected(float_sites(program), self.sites, self.skip):
            if (fmt := assigned_format(node, self.default_format())).is_mixed:
                require_mixable([node], fmt)

    def choose(self, program: Program, found: Fold, workers: Workers) -> Factor:
        """Tries every exponent on every site of the group."""
        keys = found.members[0].meta[STATISTICS]
        magnitude = found.mean(program.store.load(keys["mean_abs"]).double())
        if not bool(magnitude.max() > 0):
            return Factor(None, "it reads nothing but zeros")
        factors = candidates(magnitude)
        formats = {node: assigned_format(node, self.default_format()) for node in found.members}
        judged = [node for node in found.members if formats[node].is_integer]
        if not judged:
            return Factor(None, "its formats are not rounded")
        gram = program.store.load(keys["gram"])
        metric = output_metric(gram)
        noise: list[Tensor] = []  # Of each factor, or none at all.
        if self.activation_bits:
            sample = program.store.load(keys["sample"]) / _mean_power(gram) ** 0.5
            noise = [activation_noise(sample / s[found.ties], self.activation_bits) for s in factors]
            if TOKEN_WEIGHT in keys:
                roots = weights_of_sample(program.store.load(keys[TOKEN_WEIGHT])).sqrt()
                noise = [off * roots for off in noise]
        errors = torch.zeros(_STEPS, dtype=torch.float64)
        for node in judged:
            tied = [other for other in judged if formats[other] == formats[node]]
            errors += self._judge(
                program, node, tied, formats[node], [s[found.ties] for s in factors], metric, noise, workers
            )
        best = int(errors.argmin())
        if not bool(errors[best].isfinite()):
            return Factor(None, "none of the scales fits float16")
        saved = 1 - float(errors[best] / errors[0]) if float(errors[0]) > 0 else 0.0
        return Factor(factors[best], f"a={best / _STEPS:g} takes {100 * saved:.1f} % off the squared output error")

    def _judge(
        self,
        program: Program,
        node: fx.Node,
        tied: list[fx.Node],
        fmt: Format,
        factors: list[Tensor],
        metric: Tensor,
        noise: list[Tensor],
        workers: Workers,
    ) -> Tensor:
        """The site's squared output error with each factor: float64 [factors], over the mean square of x."""
        order = mixed_order(program, tied, fmt).long() if fmt.is_mixed else None
        step = -(-matrix_shape(node)[0] // _ROWS)

        def judge(part: slice) -> Tensor:
            rows = load_finite(program, weight_of(node), node.meta[SITE], part)[-part.start % step :: step]
            errors = output_errors(rows, factors, fmt, metric, self.clip, order)
            for index, off in enumerate(noise):
                errors[index] += ((rows * factors[index]) @ off).square_().sum(dtype=torch.float64) / off.shape[1]
            return errors

        total = torch.zeros(len(factors), dtype=torch.float64)
        for errors in workers.map(judge, row_parts(*matrix_shape(node))):
            total += errors
        return total * step


def candidates(magnitude: Tensor) -> list[Tensor]:
    """The factors that are tried: magnitude^a for each a, normalised.

    Args:
        magnitude: float64 [k], E|x|, not all of it zero.

    Returns:
        float32 [k] each.
    """
    magnitude = magnitude.clamp_min(_SMALLEST * float(magnitude.max()))
    return [_normalised(magnitude ** (step / _STEPS)) for step in range(_STEPS)]


def output_errors(
    rows: Tensor, factors: list[Tensor], fmt: Format, metric: Tensor, clip: str, order: Tensor | None = None
) -> Tensor:
    """Σ d·M·dᵀ with d = Q(w·s)/s − w for each factor s.

    Args:
        rows: float32 [n, k].
        factors: float32 [k] each.
        fmt: what is rounded to.
        metric: M, float32 [k, k].
        clip: how scales are chosen, as in `rtn`.
        order: int64 [k], the order of the columns in a mixed format.

    Returns:
        float64 [factors]; infinite where a scale does not fit float16.
    """
    back = None if order is None else order.argsort()
    out = torch.zeros(len(factors), dtype=torch.float64)
    for index, factor in enumerate(factors if len(rows) else []):
        scaled = rows * factor
        try:
            rounded = round_matrix(scaled if order is None else scaled[:, order], fmt, clip)
        except OverflowError:
            out[index] = torch.inf
            continue
        dense = dequantise(rounded, fmt)
        off = (dense if back is None else dense[:, back]).div_(factor).sub_(rows)
        out[index] = (off @ metric).mul_(off).sum(dtype=torch.float64)
    return out


def _normalised(factor: Tensor) -> Tensor:
    return (factor / (factor.max() * factor.min()).sqrt()).float()


def output_metric(gram: Tensor) -> Tensor:
    """E[x·xᵀ], [k, k], over the mean of its diagonal: float32."""
    return gram.float() / _mean_power(gram)


def _mean_power(gram: Tensor) -> float:
    mean = float(gram.diagonal().mean())
    return mean if mean > 0 else 1.0


def activation_noise(x: Tensor, bits: int) -> Tensor:
    """What rounding adds to activations, a scale a token: Q(x) − x.

    Args:
        x: float32 [tokens, k].
        bits: 8 or 4.

    Returns:
        float32 [k, tokens].
    """
    q, scale, _ = quantize_activation(x, bits)
    return (q[:, : x.shape[1]] * scale.unsqueeze(1) - x).t().contiguous()

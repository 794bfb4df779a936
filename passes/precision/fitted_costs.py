"""Costs of sites with the noise of few texts taken out, and those of ranks between the ones that were tried.

What a trial of few texts says of one site in one format is uncertain by a third of itself; a solver that is given such
costs spends bits where a format came out badly by chance. Sites of one kind share how fast a cost falls with bits:
log cost(site, format) = level(site) + effect(kind, format), by least squares, has one number a site to find in the
place of one for each format.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from hikui.lowering.formats import Format

_LEAST = 1e-6
"""A site with a cost below so much of the largest is left as it is: the logarithm would outweigh all others."""

Costs = Mapping[str, float]


def fitted(costs: Mapping[str, Costs], kinds: Mapping[str, Hashable]) -> dict[str, dict[str, float]]:
    """Of each site the product of its own level and what its kind has of each format.

    Args:
        costs: of each site, by the names of formats; none below 0.
        kinds: of each site; those of one kind with the same formats are fitted together, a single one stays.

    Returns:
        As `costs`.
    """
    largest = max((cost for of_site in costs.values() for cost in of_site.values()), default=0.0)
    out = {site: dict(of_site) for site, of_site in costs.items()}
    if largest <= 0:
        return out
    alike: dict[Hashable, list[str]] = {}
    for site, of_site in costs.items():
        if all(cost >= _LEAST * largest for cost in of_site.values()):
            alike.setdefault((kinds[site], tuple(of_site)), []).append(site)
    for members in alike.values():
        names = list(costs[members[0]])
        if len(members) == 1 or not names:
            continue
        logs = np.log([list(costs[site].values()) for site in members])
        levels = logs.mean(1, keepdims=True)
        effects = (logs - levels).mean(0)
        for site, row in zip(members, np.exp(levels + effects).tolist(), strict=True):
            out[site] = dict(zip(names, row, strict=True))
    return out


def between(costs: Costs, shape: tuple[int, int], wanted: Format) -> float | None:
    """The cost of factors between two that are known, whose logarithm is straight over bits; None where there are none.

    Args:
        costs: of one site, by the names of formats.
        shape: (out features, in features).
        wanted: factors.
    """
    bits = wanted.true_bits(*shape)
    known = _factors_by_bits(costs, shape)
    below = [pair for pair in known if pair[0] <= bits]
    above = [pair for pair in known if pair[0] >= bits]
    if not below or not above:
        return None
    (low, at_low), (high, at_high) = below[-1], above[0]
    share = 0.0 if high == low else (bits - low) / (high - low)
    least = np.finfo(np.float64).tiny
    return float(np.exp((1 - share) * np.log(max(at_low, least)) + share * np.log(max(at_high, least))))


def _factors_by_bits(costs: Costs, shape: tuple[int, int]) -> Sequence[tuple[float, float]]:
    formats = [(Format.parse(name), cost) for name, cost in costs.items()]
    return sorted((fmt.true_bits(*shape), cost) for fmt, cost in formats if fmt.is_factors)

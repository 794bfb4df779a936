"""The costs of a model's sites as a heat map: blocks by sites, one map for each format."""

import io
import re
from collections.abc import Sequence

import numpy as np

from hikui.lowering.app.sensitivity.table import Sensitivities, SiteCosts

_RESOLUTION = 130
_LEAST = 1e-9
"""Costs below it are shown as it: they are drawn by their logarithms."""


def roles(sites: Sequence[SiteCosts]) -> list[str]:
    """The names of sites in blocks without the number of their block, each once, in order."""
    return list(dict.fromkeys(role(site) for site in sites if site.block is not None))


def role(site: SiteCosts) -> str:
    """The name of a site without the number of its block and what is before it."""
    return re.sub(rf"^.*?\.{site.block}\.", "", site.name, count=1)


def draw(found: Sensitivities, form: str) -> bytes:
    """The picture as `svg` or `png`."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = roles(found.sites)
    blocks = sorted({site.block for site in found.sites if site.block is not None})
    grids = {}
    for fmt in found.formats:
        grid = np.full((len(blocks), len(names)), np.nan)
        for site in found.sites:
            if site.block is not None:
                grid[blocks.index(site.block), names.index(role(site))] = max(site.costs[fmt], _LEAST)
        grids[fmt] = grid
    values = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()] or [np.array([_LEAST])])
    norm = LogNorm(values.min(), max(values.max(), 2 * values.min()))
    with matplotlib.rc_context({"svg.hashsalt": "hikui", "svg.fonttype": "none"}):
        height = 1.8 + 0.2 * len(blocks)
        figure = Figure(figsize=(1.2 + 0.42 * len(names) * len(grids) + 1.2, height), layout="constrained")
        axes = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
        image = None
        for axis, (fmt, grid) in zip(axes, grids.items(), strict=True):
            image = axis.imshow(grid, norm=norm, aspect="auto", cmap="viridis")
            axis.set_title(fmt, fontsize=9)
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axis.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7)
        axes[0].set_ylabel("block")
        if image is not None:
            figure.colorbar(image, ax=list(axes), label=found.measure)
        figure.suptitle(f"{found.model}: {found.unit}", fontsize=8)
        held = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(held, format=form, dpi=_RESOLUTION, metadata=metadata)
    return held.getvalue()

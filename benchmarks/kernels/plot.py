"""The rows as a picture: speed over true bits, a panel for each setting. Needs matplotlib (the extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels.contestant import UnavailableError
from benchmarks.kernels.harness import Row

_COLUMNS = 4
_BITS = (1, 1.5, 2, 3, 4, 6, 8)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes an SVG; the same rows give the same bytes.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnavailableError("the picture needs matplotlib (pip install 'hikui[plot]')") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hikui"
    from matplotlib import pyplot

    plain = [row for row in rows if "branch" not in row.name]
    settings = list(dict.fromkeys((r.n, r.k, r.m, r.threads, r.cold) for r in plain))
    across = min(_COLUMNS, len(settings))
    down = -(-len(settings) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False)
    for panel, setting in zip(axes.flat, settings, strict=False):
        n, k, m, threads, cold = setting
        for ours, colour, label in ((True, "tab:red", "hikui"), (False, "tab:gray", "others")):
            chosen = [r for r in plain if (r.n, r.k, r.m, r.threads, r.cold) == setting and r.ours == ours]
            panel.scatter([r.bits for r in chosen], [r.gmacs for r in chosen], s=16, color=colour, label=label)
            for row in chosen:
                panel.annotate(row.name, (row.bits, row.gmacs), fontsize=5, xytext=(2, 2), textcoords="offset points")
        panel.set_xscale("log", base=2)
        panel.set_xticks(_BITS, labels=[str(bits) for bits in _BITS])
        panel.set_xlim(_BITS[0], 13)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{n}×{k}, M={m}, {threads}T, {'cold' if cold else 'in cache'}", fontsize=8)
        panel.set_xlabel("bits a weight", fontsize=7)
        panel.set_ylabel("GMAC/s", fontsize=7)
        panel.tick_params(labelsize=6)
    for panel in axes.flat[len(settings) :]:
        panel.set_visible(False)
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

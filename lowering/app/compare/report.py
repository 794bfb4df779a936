"""A comparison for people: a table, and a picture of quality over true bits."""

import io
import json
from pathlib import Path

from hikui.lowering.app.compare.runs import FLOAT, write
from hikui.lowering.app.compare.table import Comparison, Row, as_json

RESULTS = "compare.json"
TABLE = "compare.md"
PICTURES = ("compare.svg", "compare.png")
HEADER = (
    "", "bits/char", "spread over seeds", "above float", "perplexity", "bits in blocks", "true bits", "all bits",
    "linear sites", "seeds",
)  # fmt: skip

_SIZE = (6.4, 4.4)
_RESOLUTION = 150
_MARKERS = "osD^v"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text, in the order of `HEADER`."""
    error = row.difference.error
    above = "" if row.label == FLOAT else f"{row.difference.bits_per_char:+.4f}"
    return (
        row.label,
        f"{row.bits_per_char:.4f}",
        "" if row.spread is None else f"{row.spread:.4f}",
        above if error is None or not above else f"{above} ± {error:.4f}",
        f"{row.perplexity:.3f}",
        f"{row.block_bpw:.3f}",
        f"{row.true_bpw:.3f}",
        f"{row.all_bpw:.3f}",
        f"{row.linear_bytes / 1e6:.2f} MB",
        ", ".join(map(str, row.seeds)),
    )


def legend(comparison: Comparison) -> str:
    """What the columns mean, in a sentence or two."""
    return (
        f"{comparison.parts} {comparison.unit}s; {comparison.protocol}. Spread: standard deviation over calibration "
        f"seeds. Above float: paired over {comparison.unit}s, with the standard error over {comparison.unit}s. Bits "
        "per weight: of the linear sites in blocks, of all linear sites, and of everything stored over all parameters."
    )


def markdown(comparison: Comparison) -> str:
    """The table with its legend."""
    lines = [HEADER, ("---",) * len(HEADER), *map(cells, comparison.rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"# {comparison.model}\n\n{table}\n\n{legend(comparison)}\n"


def save(comparison: Comparison, folder: Path) -> bool:
    """Writes compare.json, compare.md and, where matplotlib is installed, compare.svg and compare.png.

    The same comparison gives the same bytes.

    Returns:
        Whether the pictures were drawn.

    Raises:
        HikuiError: the folder cannot be written.
    """
    write(folder / RESULTS, json.dumps(as_json(comparison), indent=1, ensure_ascii=False) + "\n")
    write(folder / TABLE, markdown(comparison))
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        for name in PICTURES:
            # One from before would show another table.
            (folder / name).unlink(missing_ok=True)
        return False
    for name in PICTURES:
        write(folder / name, draw(comparison, name.rpartition(".")[2]))
    return True


def draw(comparison: Comparison, form: str) -> bytes:
    """The picture as `svg` or `png`: bits per character over true bits, with the spread over seeds as error bars."""
    import matplotlib
    from matplotlib.figure import Figure

    # Names inside an SVG come from this salt, its letters stay text, and neither form gets a date or a version.
    with matplotlib.rc_context({"svg.hashsalt": "hikui", "svg.fonttype": "none"}):
        figure = Figure(figsize=_SIZE, layout="tight")
        axes = figure.add_subplot()
        for index, row in enumerate(comparison.rows):
            if row.label == FLOAT:
                axes.axhline(row.bits_per_char, color="tab:gray", linestyle="--", linewidth=1, label=FLOAT)
                continue
            spread = None if row.spread is None else [[row.spread], [row.spread]]
            colour, marker = f"C{index % 10}", _MARKERS[index // 10 % len(_MARKERS)]
            axes.errorbar(
                [row.true_bpw], [row.bits_per_char], yerr=spread, fmt=marker, color=colour, capsize=3, label=row.label
            )
        axes.legend(fontsize=8)
        axes.set_xlabel("true bits per weight")
        axes.set_ylabel("bits per character")
        axes.set_title(comparison.model)
        held = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(held, format=form, dpi=_RESOLUTION, metadata=metadata)
    return held.getvalue()

"""Which columns of a `mixed` matrix are int4, and the order that brings them to the front.

The order is a stored vector that the graph gathers the activation with, once for all sites that read it: whatever
consumes the gathered activation sees matrices with their columns permuted alike.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import COLUMNS, GROUP, SITE, STATISTICS, Program
from hikui.passes.graph import aten, insert, is_measured, matrix_shape, weight_of
from hikui.passes.matrices import load_finite, row_parts

Criterion = Literal["output", "pbar", "obs", "activation", "weight", "random"]
"""What columns may be chosen by; `Mixed` says what each is."""

BY_OUTPUT: Criterion = "output"
"""What they are chosen by where nothing is said."""

_DAMPING = 0.01
"""Of the Gram matrix before it is inverted, over the mean of its diagonal, as in `gptq`."""


def mixed_order(program: Program, tied: Sequence[fx.Node], fmt: Format) -> Tensor:
    """The order of the input columns of tied sites: the int4 ones first, each part ascending.

    A column counts what the first site was marked with by `mixed`, or Σ_i w_ij² · E[x_j²], summed over the sites. Of
    equal ones the earlier counts more.

    Args:
        program: holds the weights and the statistics.
        tied: unpacked sites that read one activation.
        fmt: a `mixed` format.

    Returns:
        int32 [k].

    Raises:
        HikuiError: a site has no statistics, too few columns, or weights that are NaN or infinite.
    """
    require_mixable(tied, fmt)
    _, k = matrix_shape(tied[0])
    counts = _counts(program, tied, str(tied[0].meta.get(COLUMNS, BY_OUTPUT)))
    assert fmt.columns is not None, "the format is mixed"
    ranked = torch.sort(counts, descending=True, stable=True).indices
    chosen = torch.zeros(k, dtype=torch.bool)
    chosen[ranked[: fmt.columns]] = True
    return torch.cat((chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1))).to(torch.int32)


def _counts(program: Program, tied: Sequence[fx.Node], criterion: str) -> Tensor:
    """What each column counts by a criterion: float64 [k]."""
    _, k = matrix_shape(tied[0])
    statistics = tied[0].meta[STATISTICS]
    by, _, seed = criterion.partition("/")
    if by == "random":
        # Groups of one shape draw different columns, and each the same in every run.
        generator = torch.Generator().manual_seed(crc32(f"{tied[0].meta[GROUP]} {seed}".encode()))
        return torch.rand(k, generator=generator, dtype=torch.float64)
    squares = torch.ones(k, dtype=torch.float64) if by == "activation" else torch.zeros(k, dtype=torch.float64)
    for node in tied if by != "activation" else ():
        for rows in row_parts(*matrix_shape(node)):
            part = load_finite(program, weight_of(node), node.meta[SITE], rows).double()
            if by in ("pbar", "obs"):
                part = part.abs() - part.abs().mean(1, keepdim=True)
            squares += part.square().sum(0)
    if by == "weight":
        return squares
    if by == "obs":
        gram = program.store.load(statistics["gram"]).double()
        gram.diagonal().add_(_DAMPING * (float(gram.diagonal().mean()) or 1.0))
        return squares / torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()
    return squares * program.store.load(statistics["mean_square"]).double()


def require_mixable(nodes: Sequence[fx.Node], fmt: Format, by: Criterion | None = None) -> None:
    """Raises HikuiError where a site is too narrow for a mixed format, or its columns cannot be chosen.

    Args:
        nodes: the sites.
        fmt: a `mixed` format, or another, which is not looked at.
        by: what columns will be chosen by; None for what `mixed` has marked the sites with.
    """
    for node in nodes:
        site, (_, k) = node.meta[SITE], matrix_shape(node)
        if fmt.columns is not None and fmt.columns > k:
            raise HikuiError(f"Site {site} has {k} columns, fewer than the int4 ones of {fmt}; choose another format.")
        if not is_measured(node):
            raise HikuiError(
                f"Site {site} has no statistics to choose the int4 columns of {fmt} by; run `calibrate` first."
            )
        if (by or node.meta.get(COLUMNS)) == "obs" and "gram" not in node.meta[STATISTICS]:
            raise HikuiError(
                f"Site {site} has no Gram matrix, which 'obs' chooses the int4 columns of {fmt} by; run "
                "`calibrate{gram=true}` first."
            )


class Gathers:
    """Activations with their columns in a stored order: one order for each key, one gather for all that read it.

    Args:
        program: gets the orders and the gathers.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._placeholders: dict[Hashable, fx.Node] = {}
        self._gathers: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def gather(self, node: fx.Node, key: Hashable, name: str, order: Callable[[], Tensor]) -> tuple[fx.Node, fx.Node]:
        """What a site is to read instead of its activation, and the placeholder of the order.

        Args:
            node: the site.
            key: of the order; sites with one key share it.
            name: that it is stored under, numbered where that is taken.
            order: gives it when it is first asked for: int32 [k].
        """
        if key not in self._placeholders:
            self._placeholders[key] = self._program.add_weight(self._program.store.free_name(name), order())
        held, x = self._placeholders[key], node.args[0]
        assert isinstance(x, fx.Node)
        if (x, held) not in self._gathers:
            self._gathers[x, held] = insert(self._program, node, aten.index_select.default, (x, -1, held), node)
        return self._gathers[x, held], held


class Orders:
    """The orders of one run of a pass: one for each tied group and format, stored and gathered with once.

    Args:
        program: gets the orders and the gathers.
        nodes: the sites that the pass packs, with the format of each.
    """

    def __init__(self, program: Program, nodes: Sequence[tuple[fx.Node, Format]]) -> None:
        self._program = program
        self._gathers = Gathers(program)
        self._tied: dict[tuple[str, Format], list[fx.Node]] = {}
        for node, fmt in nodes:
            if fmt.is_mixed:
                self._tied.setdefault((node.meta[GROUP], fmt), []).append(node)

    def gather(self, node: fx.Node, fmt: Format) -> tuple[fx.Node, Tensor]:
        """The permuted activation that a site is to read, and the order: int64 [k].

        Raises:
            HikuiError: as `mixed_order`.
        """
        key = node.meta[GROUP], fmt
        x, held = self._gathers.gather(
            node, key, f"{key[0]}.order.{fmt}", lambda: mixed_order(self._program, self._tied[key], fmt)
        )
        return x, self._program.store.load(self._program.weight_of(held)).long()

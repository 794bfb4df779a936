"""What a program's weights will take beside the sites that a budget is for."""

import torch
from torch import fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import FLOAT_WEIGHT, FORMAT, SITE, Program
from hikui.passes.graph import float_sites, matrix_shape, weight_of
from hikui.passes.quantise.embedding import lookups

_FLOAT_BYTES = 4
"""Of what no pass packs: recipes bring norms and biases to float32."""


def rest_nbytes(program: Program, chosen: list[fx.Node], tables: Format) -> int:
    """Bytes of everything stored but the chosen sites' matrices.

    Tables of embeddings count as `embedding` will pack them: not at all where a head shares theirs, else in a format.

    Args:
        program: whose chosen sites are floats.
        chosen: the sites that are left out.
        tables: the format of tables that no head shares.

    Raises:
        HikuiError: another float site has no format, so nobody knows what it will take.
    """
    left_out = set(chosen)
    total, counted = 0, {program.weight_of(weight_of(node)) for node in chosen}
    for node in float_sites(program):
        key = program.weight_of(weight_of(node))
        if node in left_out or key in counted:
            continue
        if FORMAT not in node.meta:
            raise HikuiError(
                f"Site {node.meta[SITE]} has no format yet, so what it will take is not known; give it one with "
                "`override`, or assign formats over all sites."
            )
        fmt, (n, k) = Format.parse(node.meta[FORMAT]), matrix_shape(node)
        total += fmt.nbytes(n, k) + fmt.permutation_nbytes(k)
        counted.add(key)
    packed = {operand for node in program.graph.nodes if is_packed(node) for operand in node.all_input_nodes}
    for node in program.graph.nodes:
        if is_packed(node) and FLOAT_WEIGHT in node.meta and not PackedLinear.of(node).format.is_mixed:
            # Its table, if it has one, is looked up in the packed matrix.
            counted.add(str(node.meta[FLOAT_WEIGHT]))
    for node in lookups(program):
        table = node.args[0]
        assert isinstance(table, fx.Node), "it looks rows up in a stored matrix"
        key = program.weight_of(table)
        if key not in counted:
            total += tables.nbytes(*map(int, table.meta["val"].shape))
            counted.add(key)
    for node in program.weight_nodes():
        key, value = program.weight_of(node), node.meta["val"]
        # What nothing reads goes with `dead_code`.
        if key not in counted and node.users:
            counted.add(key)
            width = value.dtype.itemsize if node in packed or not value.dtype.is_floating_point else _FLOAT_BYTES
            total += int(torch.Size(value.shape).numel()) * width
    return total

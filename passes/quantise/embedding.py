"""Packs the tables that tokens and positions are looked up in; with a tied head they share one matrix."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import Format, Packed, pack
from hikui.lowering.ir.factored import is_factor
from hikui.lowering.ir.float_matrix import float_and_packed_rows
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import BRANCH, CORRECTION, FLOAT_WEIGHT, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import aten, hikui, insert, is_call, is_weight, replace
from hikui.passes.quantise.packing import float_linears, pack_by_rows, store_packed
from hikui.passes.quantise.rounding import round_matrix
from hikui.passes.quantise.underflow import refuse_underflow


@dataclass(frozen=True)
class Embedding(Pass):
    """Rewrites look-ups in stored float matrices into `hikui::embedding` on packed ones.

    A head that was packed from the very matrix of the embedding has it already: with `share` the embedding reads the
    head's, in whatever format that is. A head whose columns stand in another order, that has a branch, or whose weights
    `qep` has corrected stands for another matrix, and so does one that a transform has rescaled: those are not shared.
    Comes after the passes that pack the head.

    Attributes:
        format: of a table that is not shared: an integer format whose columns are all alike, `float16` or `float32`.
        share: let an embedding read the matrix of a head that is tied to it.
    """

    name: ClassVar[str] = "embedding"
    format: str = "int8-channel"
    share: bool = True

    def __post_init__(self) -> None:
        if not Format.parse(self.format).is_plain:
            raise UsageError(
                f"embedding cannot store rows as {self.format}; take a format of one matrix with all columns alike."
            )

    def requires(self, program: Program) -> None:
        """Raises HikuiError where a product that is still float multiplies the matrix that is to be shared."""
        if not self.share:
            return
        tables = {_key(program, node): node for node in lookups(program)}
        for node in float_linears(program):
            key = program.weight_of(node.args[1])  # type: ignore[arg-type]
            if key in tables:
                site = node.meta.get(SITE, node.name)
                raise HikuiError(
                    f"Site {site} still multiplies '{key}' as floats, which {tables[key].name} looks up too; put "
                    "`embedding` after the passes that pack it, or take share=false."
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works table by table, some rows at a time.

        Raises:
            HikuiError: a table holds NaN or infinite values, or does not fit the format.
        """
        work = program.clone()
        chosen = lookups(work)
        if not chosen:
            return PassResult(program, False)
        heads = _heads(work) if self.share else {}
        notes: list[str] = []
        own: dict[str, tuple[Format, fx.Node, fx.Node | None]] = {}
        for index, node in enumerate(chosen):
            context.progress(self.name, index, len(chosen))
            key = _key(work, node)
            head = heads.get(key)
            if head is not None:
                fmt, weight, scale = head.format, head.weight, head.scale
            else:
                if key not in own:
                    own[key] = self._packed(work, node, context)
                fmt, weight, scale = own[key]
            rows, columns = map(int, node.args[0].meta["val"].shape)  # type: ignore[union-attr]
            arguments = (node.args[1], weight, scale, str(fmt), rows, columns)
            packed = insert(work, node, hikui.embedding.default, arguments, node)
            if head is None:
                refuse_underflow(work, packed, key, _name(key))
            notes.append(_note(work, packed, key, fmt, None if head is None else head.node))
            replace(node, packed)
        context.progress(self.name, len(chosen), len(chosen))
        work.recompile()
        return PassResult(work, True, notes)

    def ensures(self, program: Program) -> None:
        """No look-up in a stored float matrix is left."""
        for node in lookups(program):
            raise VerificationError(f"Node {node.name} still looks up rows of an unpacked matrix.")

    def _packed(self, program: Program, node: fx.Node, context: PassContext) -> tuple[Format, fx.Node, fx.Node | None]:
        """The placeholders of a table in its own format."""
        table = node.args[0]
        assert is_weight(table), "it is a look-up in a stored matrix"
        key = program.weight_of(table)
        fmt, name = Format.parse(self.format), _name(key)

        def rounded(rows: Tensor) -> Packed:
            if not fmt.is_integer:
                if float(rows.abs().max()) > torch.finfo(fmt.weight_dtype).max:
                    raise HikuiError(f"Embedding {name}: its values are beyond {fmt}; take format=float32.")
                return pack(fmt, rows)
            try:
                return pack(fmt, *round_matrix(rows, fmt))
            except OverflowError as error:
                raise HikuiError(f"Embedding {name}: {error}; take format=float32.") from error

        with Workers(context.workers) as workers:
            packed = pack_by_rows(program, table, name, fmt, rounded, workers)
        return fmt, *store_packed(program, f"{key}.{fmt}", packed)


def lookups(program: Program) -> list[fx.Node]:
    """The look-ups of int64 ids in a stored float matrix, in graph order."""
    return [
        node
        for node in program.graph.nodes
        if is_call(node, aten.embedding.default)
        and is_weight(node.args[0])
        and node.args[0].meta["val"].is_floating_point()
        and isinstance(node.args[1], fx.Node)
        and node.args[1].meta["val"].dtype == torch.int64
    ]


def _key(program: Program, node: fx.Node) -> str:
    """The store key of the table that a node looks rows up in."""
    return program.weight_of(node.args[0])  # type: ignore[arg-type]


def _name(key: str) -> str:
    return key.removesuffix(".weight")


def _heads(program: Program) -> dict[str, PackedLinear]:
    """Products whose packed matrix stands for a float one as it is stored, by the float one's store key."""
    branched = {str(node.meta[BRANCH]) for node in program.graph.nodes if BRANCH in node.meta}
    found: dict[str, PackedLinear] = {}
    for node in program.graph.nodes:
        if not is_packed(node) or FLOAT_WEIGHT not in node.meta or CORRECTION in node.meta or is_factor(node):
            continue
        packed = PackedLinear.of(node)
        other = packed.branch is not None or packed.order is not None or packed.format.is_mixed
        if not other and node.meta.get(SITE) not in branched:
            found.setdefault(str(node.meta[FLOAT_WEIGHT]), packed)
    return found


def _note(program: Program, node: fx.Node, key: str, fmt: Format, head: fx.Node | None) -> str:
    """What has become of a table, and how far its rows are from their floats: ‖W − Ŵ‖ / ‖W‖."""
    lost = total = 0.0
    for floats, packed in float_and_packed_rows(program, node, program.store, key):
        lost += float((floats - packed).double().square().sum())
        total += float(floats.double().square().sum())
    error = math.sqrt(lost / total) if total else 0.0
    shared = "" if head is None else f", the matrix of {head.meta.get(SITE, head.name)}"
    return f"{_name(key)}: looked up in {fmt}{shared}, relative error {error:.3g}"

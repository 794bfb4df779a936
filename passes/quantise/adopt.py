"""Takes over what GPTQ, AWQ or a GGUF has quantised: the codes of the checkpoint themselves, in a layout of ours."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.checkpoint.quantised_matrix import CodedMatrix, QuantisedMatrix
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import KINDS, SUM_WIDTH, WIDEST_GROUP, Format, Packed, pack
from hikui.lowering.huggingface.gguf_file import FLOAT_KINDS
from hikui.lowering.ir.program import FORMAT, GROUP, SITE, Program
from hikui.lowering.ir.store import TensorSource, Transposed
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, matrix_shape, selected, sites, weight_of
from hikui.passes.matrices import row_parts
from hikui.passes.quantise.columns import Gathers
from hikui.passes.quantise.packing import pack_by_rows, replace_with_packed
from hikui.passes.quantise.rounding import dequantise, round_matrix
from hikui.passes.quantise.ternary import adopt_ternary, may_be_ternary

_EXACT = ("sign", "ternary", "int2", "int3", "int4", "int8")
"""The kinds that may hold the codes of a checkpoint, the smallest first."""

_TURNED = ("int2", "int3", "int4")
"""Those with one level more below zero than above, which a group whose scale is negative has above."""


@dataclass(frozen=True)
class Adopt(Pass):
    """Packs the sites of a GPTQ or AWQ checkpoint, of a GGUF's Q4_0 and Q8_0, or of a BitNet, without rounding again.

    A weight of theirs is scale · (field − zero); ours is scale · code. So the code is field − zero, and each site gets
    the smallest kind that holds all of its codes: symmetric 4, 3 and 2 bits are int4, int3 and int2, any other zeros
    make up to twice as many codes and take a kind of more bits. Groups of a multiple of 32 columns are kept, or split
    into groups of at most 256; act-order becomes a gather of the activation. Q4_0 is int4 and Q8_0 is int8 in groups of
    32, or a smaller kind that holds all codes. Sites that `override` gave a format, and sites of floats, are left to
    `rtn`; so are those of a GGUF that are of another type or whose codes no kind holds, and a note says from what. A
    float matrix of which every row holds but one magnitude and zero, as in a BitNet, is `ternary-channel`, or
    `sign-channel` where it has no zero; its scales are rounded to float16.

    Attributes:
        lossy: a format for the sites whose codes no kind of at most its bits holds, as `int4-g64`: they are rounded to
            it, for the least squared error, and the note of each says by how much. Without it, all kinds will do, and
            what none holds is refused.
        saturate: whether codes of −128, of which symmetric 8 bits of GPTQ have some, become −127, the lowest that int8
            holds; a note says how many and by how much. llama.cpp writes none, and a Q8_0 with some stays as floats.
        sites: regular expression of the sites to adopt; empty is all.
        skip: regular expression of the sites to leave as they are.
    """

    name: ClassVar[str] = "adopt"
    lossy: str = ""
    saturate: bool = True
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if self.lossy and not Format.parse(self.lossy).is_plain:
            raise UsageError(f"adopt cannot round to {self.lossy}; lossy takes a format whose columns are all alike.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or the model comes from no such checkpoint."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        found = [
            node
            for node in float_sites(program)
            if quantised_matrix(program, node) is not None or may_be_ternary(program, node)
        ]
        if not found and len(float_sites(program)) == len(sites(program)):
            tensors = (_gguf_tensor(program, node) for node in sites(program))
            kinds = sorted({tensor.kind for tensor in tensors if tensor is not None})
            if kinds:
                raise HikuiError(
                    f"All sites of the GGUF are stored as {', '.join(kinds)}, of which there is nothing to adopt, only "
                    "of Q4_0 and Q8_0; quantise with `rtn`."
                )
            raise HikuiError(
                "No site comes from a GPTQ or AWQ checkpoint, from a GGUF or a BitNet, so there is nothing to adopt; "
                "give such a checkpoint, or quantise with `rtn`."
            )

    def _eligible(self, program: Program) -> list[fx.Node]:
        return [node for node in selected(float_sites(program), self.sites, self.skip) if FORMAT not in node.meta]

    def _chosen(self, program: Program) -> list[tuple[fx.Node, CodedMatrix]]:
        found = ((node, quantised_matrix(program, node)) for node in self._eligible(program))
        return [(node, matrix) for node, matrix in found if matrix is not None]

    def _left_as_floats(self, program: Program) -> list[str]:
        """A note for each site of a GGUF that is of a type whose codes are none of ours."""
        found = ((node, _gguf_tensor(program, node)) for node in self._eligible(program))
        return [
            f"{node.meta[SITE]}: floats from {tensor.kind} of the GGUF, whose codes no format here has"
            for node, tensor in found
            if tensor is not None and not tensor.is_coded and tensor.kind not in FLOAT_KINDS
        ]

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Packs one site after the other, some rows at a time.

        Raises:
            HikuiError: no format holds a site exactly and `lossy` names none to round to, or the checkpoint is damaged.
        """
        work = program.clone()
        chosen = self._chosen(work)
        coded = {node for node, _ in chosen}
        ternary = [node for node in self._eligible(work) if node not in coded and may_be_ternary(work, node)]
        adopted = [note for node in ternary for note in adopt_ternary(work, node)]
        if not chosen and not adopted:
            return PassResult(program, False)
        gathers = Gathers(work)
        notes = adopted + self._left_as_floats(work)
        for index, (node, matrix) in enumerate(chosen):
            context.progress("adopt", index, len(chosen))
            notes += self._adopt(work, node, matrix, gathers)
        context.progress("adopt", len(chosen), len(chosen))
        work.recompile()
        return PassResult(work, True, notes)

    def ensures(self, program: Program) -> None:
        """No site that was to be adopted is left."""
        for node, _ in self._chosen(program):
            raise VerificationError(f"Site {node.meta[SITE]} still holds the float matrix of a quantised one.")

    def _adopt(self, program: Program, node: fx.Node, matrix: CodedMatrix, gathers: Gathers) -> list[str]:
        site, blocks = node.meta[SITE], _blocks(matrix.groups())
        if isinstance(blocks, str):
            return self._round(program, node, blocks)
        found = _exact_kind(matrix, blocks, self.saturate and not isinstance(matrix, GgufTensor))
        if isinstance(found, str) and isinstance(matrix, GgufTensor) and not self.lossy:
            program.store.alias(program.weight_of(weight_of(node)), matrix.as_floats())
            return [f"{site}: floats from {matrix.kind} of the GGUF, because {found}"]
        if isinstance(found, str):
            return self._round(program, node, found)
        if self.lossy and Format.parse(self.lossy).is_integer and found.bits > _bits(self.lossy):
            return self._round(program, node, f"its codes take {found.kind}")
        fmt = Format(found.kind, blocks.size)
        packed, moved = _pack_codes(matrix, blocks, fmt, saturate=bool(found.lowest))
        x = None
        if (order := blocks.order) is not None:
            stored = order.to(torch.int32)
            group = str(node.meta[GROUP])
            x, _ = gathers.gather(node, (group, stored.numpy().tobytes()), f"{group}.order", lambda: stored)
        notes = [f"{site}: {fmt}, as {matrix.origin}"]
        if blocks.order is not None:
            notes.append(f"{site}: its columns stand in the order of g_idx")
        if found.lowest:
            _, k = matrix_shape(node)
            notes.append(
                f"{site}: {found.lowest} of {matrix.info.shape[0] * k} codes were -128 and are -127 now, relative "
                f"error {moved:.3g}"
            )
        notes += [f"{site}: {note}" for note in fmt.notes(*matrix_shape(node))]
        replace_with_packed(program, node, fmt, packed, x)
        return notes

    def _round(self, program: Program, node: fx.Node, reason: str) -> list[str]:
        """Rounds a site to the format of `lossy`, its columns as the model has them."""
        site = node.meta[SITE]
        if not self.lossy:
            raise HikuiError(
                f"Site {site} cannot be adopted as it is: {reason}; let it be rounded, for example with "
                "lossy=int8-g64, or leave it out with skip."
            )
        fmt = Format.parse(self.lossy)
        sums = torch.zeros(2, dtype=torch.float64)

        def pack_rows(rows: Tensor) -> Packed:
            if fmt.is_integer:
                try:
                    rounded = round_matrix(rows, fmt)
                except OverflowError as error:
                    raise HikuiError(f"Site {site}: {error}; leave it out with skip.") from error
                got, packed = dequantise(rounded, fmt), pack(fmt, rounded.codes, rounded.scale)
            else:
                got, packed = rows.to(fmt.weight_dtype).float(), pack(fmt, rows)
                if not bool(got.isfinite().all()):
                    raise HikuiError(f"Site {site}: its weights are beyond {fmt}; take lossy=float32.")
            sums[0] += (rows - got).double().square().sum()
            sums[1] += rows.double().square().sum()
            return packed

        packed = pack_by_rows(program, weight_of(node), site, fmt, pack_rows)
        error = math.sqrt(float(sums[0] / sums[1])) if float(sums[1]) else 0.0
        notes = [f"{site}: rounded to {fmt}, because {reason}; relative error {error:.3g}"]
        notes += [f"{site}: {note}" for note in fmt.notes(*matrix_shape(node))]
        replace_with_packed(program, node, fmt, packed)
        return notes


def quantised_matrix(program: Program, node: fx.Node) -> CodedMatrix | None:
    """The quantised matrix behind a float site, if a checkpoint has one there."""
    source = _source(program, node)
    if isinstance(source, GgufTensor):
        return source if source.is_coded else None
    return source if isinstance(source, QuantisedMatrix) else None


def _gguf_tensor(program: Program, node: fx.Node) -> GgufTensor | None:
    """The tensor of a GGUF behind a float site, of whatever type."""
    source = _source(program, node)
    return source if isinstance(source, GgufTensor) else None


def _source(program: Program, node: fx.Node) -> TensorSource:
    source = program.store.source(program.weight_of(weight_of(node)))
    if isinstance(source, Transposed) and isinstance(source.source, Transposed):
        # A module that keeps [K, N] had it turned, and `canonicalise` turned it back.
        return source.source.source
    return source


class _Blocks(NamedTuple):
    """How the columns of a matrix fall into groups of a format.

    `order` int64 [K] brings the columns of each group together, None where they are together already; `size` is the
    format's group, None for the channel; `groups` int64 is the checkpoint's group of each of the format's, of which
    every one but the last has `width` columns.
    """

    order: Tensor | None
    size: int | None
    groups: Tensor
    width: int


class _Found(NamedTuple):
    """The kind that holds a matrix, and how many codes of −128 it would not."""

    kind: str
    lowest: int

    @property
    def bits(self) -> int:
        return KINDS[self.kind].bits


def _bits(name: str) -> int:
    return KINDS[Format.parse(name).kind].bits


def _blocks(groups: Tensor) -> _Blocks | str:
    """Cuts columns into groups of a format that lie within groups of the checkpoint, or says why that cannot be.

    Args:
        groups: int64 [K], the checkpoint's group of each column.
    """
    k = groups.shape[0]
    settled = bool((groups[1:] >= groups[:-1]).all())
    order = None if settled else torch.sort(groups, stable=True).indices
    ordered = groups if order is None else groups[order]
    for size in (None, *range(WIDEST_GROUP, 0, -SUM_WIDTH)):
        width = Format("int8", size).group_size(k)
        if size not in (None, width):
            continue
        firsts = ordered[::width]
        if torch.equal(firsts.repeat_interleave(width)[:k], ordered):
            return _Blocks(order, size, firsts, width)
    smallest = int(ordered.unique_consecutive(return_counts=True)[1].min())
    return f"it has a group of {smallest} columns, and ours are multiples of 32"


def _exact_kind(matrix: CodedMatrix, blocks: _Blocks, saturate: bool) -> _Found | str:
    """The smallest kind that holds every code, or why there is none."""
    n, k = matrix.info.shape
    groups = matrix.groups()
    odd = True
    lowest = 0
    low, high = 0, 0
    fits = dict.fromkeys(_TURNED, True)
    for part in row_parts(n, k):
        grid = matrix.rows(part.start, part.stop).grid()
        half = grid.scale.to(torch.float16).float()
        if not torch.equal(half, grid.scale):
            return f"float16 does not hold its scales, as {matrix.origin}"
        codes = grid.codes(groups)
        odd = odd and bool((codes & 1).all())
        low, high = min(low, int(codes.min())), max(high, int(codes.max()))
        lowest += int((codes == -128).sum())
        least, most = _grouped(codes, blocks).aminmax(dim=-1)
        for kind, (lowest_level, *_, highest_level) in ((kind, KINDS[kind].levels) for kind in _TURNED):
            as_it_is = (least >= lowest_level) & (most <= highest_level)
            turned = (least >= -highest_level) & (most <= -lowest_level)
            fits[kind] = fits[kind] and bool((as_it_is | turned).all())
    for kind in _EXACT:
        levels = KINDS[kind].levels
        held = fits.get(kind, low >= levels[0] and high <= levels[-1])
        if held and (odd or KINDS[kind].step == 1):
            return _Found(kind, 0)
    if low >= -128 and high <= 127:
        return _Found("int8", lowest) if saturate else f"{lowest} of its codes are -128, which int8 does not hold"
    return f"its codes reach from {low} to {high}, beyond int8"


def _pack_codes(matrix: CodedMatrix, blocks: _Blocks, fmt: Format, *, saturate: bool) -> tuple[Packed, float]:
    """Packs codes and scales as they are; what saturating has changed, ‖W − Ŵ‖ / ‖W‖, comes with them."""
    n, k = matrix.info.shape
    groups = matrix.groups()
    parts: list[Packed] = []
    moved = total = 0.0
    for part in row_parts(n, k):
        grid = matrix.rows(part.start, part.stop).grid()
        codes, scale = grid.codes(groups), grid.scale[:, blocks.groups]
        if blocks.order is not None:
            codes = codes[:, blocks.order]
        if fmt.kind in _TURNED:
            # A group that reaches beyond the highest level is turned round: it has the lowest one above zero.
            turned = _grouped(codes, blocks, ordered=True).amax(dim=-1) > fmt.levels[-1]
            scale = torch.where(turned, -scale, scale)
            codes = torch.where(turned.repeat_interleave(blocks.width, dim=1)[:, :k], -codes, codes)
        if saturate:
            wide = scale.double().repeat_interleave(blocks.width, dim=1)[:, :k]
            moved += float((wide * (codes < -127)).square().sum())
            total += float((wide * codes).square().sum())
            codes = codes.clamp_min(-127)
        parts.append(pack(fmt, codes.to(torch.int8), scale))
    scales = [part.scale for part in parts if part.scale is not None]
    packed = Packed(torch.cat([part.weight for part in parts]), torch.cat(scales))
    return packed, math.sqrt(moved / total) if moved else 0.0


def _grouped(codes: Tensor, blocks: _Blocks, *, ordered: bool = False) -> Tensor:
    """Codes by the groups of the format: [n, groups, width], the padding 0."""
    k = codes.shape[1]
    if blocks.order is not None and not ordered:
        codes = codes[:, blocks.order]
    grouped: Tensor = F.pad(codes, (0, -k % blocks.width)).unflatten(1, (-1, blocks.width))
    return grouped

"""QuaRot's rotations that fold into weights: outliers of the residual stream are spread over all its columns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import BLOCK, FIXED, FORMAT, GROUP, ROTATED, SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import argument, aten, float_sites, groups, insert, is_weight, sites, weight_of
from hikui.passes.matrices import load_finite
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.passing import is_view, mixes_rows
from hikui.passes.patterns.residual import Residual, match_residual
from hikui.passes.transform.folding import Fold, find_fold, replace_weight, rewrite
from hikui.passes.transform.hadamard import Rotation, random_hadamard, random_orthogonal

_PART = 1 << 21
"""Weights rotated at a time; they are float64 meanwhile."""


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates the residual stream x to x·R, by weights alone; the program computes what it did.

    Norm weights are folded into the products behind them, so that the norms keep rotations; the embedding E becomes
    E·R, what reads the stream W·R, what writes into it Rᵀ·W. This is R1 of QuaRot (Ashkboos et al., 2024, section 4,
    stage 1a), without its online Hadamard transforms. A head that is tied to the embedding becomes a matrix of its own,
    unless `ends` has products by R and Rᵀ stand behind the embedding and before the last norm: what is outside of
    blocks then stays as it is.
    Statistics and sensitivities of the sites concerned no longer hold and are dropped: `calibrate` comes after.

    Attributes:
        kind: `hadamard`, a Hadamard matrix with random signs (for sizes without a known one, its power of two times a
            random orthogonal matrix), or `orthogonal`, drawn evenly from all.
        seed: of signs and matrices.
        heads: also rotate the values within each head by a Hadamard matrix, between v and o (QuaRot's stage 1c, without
            its part across heads); the value caches then hold rotated values.
        ends: the format of products at both ends, as `float16`, in the place of other embeddings and heads; empty is
            none.
        required: whether a stream that cannot be rotated is an error; else a warning says why, and nothing is rotated.
    """

    name: ClassVar[str] = "rotate"
    evens_columns: ClassVar[bool] = True
    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    seed: int = 0
    heads: bool = False
    ends: str = ""
    required: bool = True

    def __post_init__(self) -> None:
        if self.ends and not Format.parse(self.ends).is_plain:
            raise UsageError(f"rotate cannot have its ends in {self.ends}; give float16 or a format of one kind.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or something at the residual stream keeps no rotation."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        if self.required:
            _residual(program)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works matrix by matrix on a clone; what is rotated is not rotated again, whatever the seed.

        Raises:
            HikuiError: a matrix holds NaN or infinite values.
        """
        work = program.clone()
        residual = _residual(work) if self.required else match_residual(work.graph)
        if isinstance(residual, NoMatch):
            context.warn(f"The residual stream stays as it is, for it cannot be rotated: {residual.reason}.")
            return PassResult(program, False)
        generator = torch.Generator().manual_seed(self.seed)
        size = int(residual.embeddings[0].meta["val"].shape[-1])
        rotation, known = self._draw(size, generator)
        touched: list[fx.Node] = []
        notes: list[str] = []
        if not all(_is_done(node, "stream") for node in residual.embeddings):
            if self.ends:
                residual, added = _with_ends(work, residual, rotation, str(Format.parse(self.ends)))
                notes += added
            touched += _rotate_stream(work, residual, rotation, context)
            notes.append(f"residual stream of {size}: {self.kind if known else 'orthogonal times Hadamard'}")
        if self.heads:
            rotated, said = _rotate_heads(work, generator)
            touched += rotated
            notes += said
        if not touched:
            return PassResult(program, False, notes)
        if (lost := _forget(work, touched)) > 0:
            notes.append(f"statistics of {lost} sites no longer hold; run `calibrate` after this")
        work.recompile()
        return PassResult(work, True, notes)

    def _draw(self, size: int, generator: torch.Generator) -> tuple[Rotation, bool]:
        if self.kind == "orthogonal":
            return random_orthogonal(size, generator), True
        return random_hadamard(size, generator)

    def ensures(self, program: Program) -> None:
        """The stream is still one, and everything at it is rotated."""
        residual = _residual(program) if self.required else match_residual(program.graph)
        if isinstance(residual, NoMatch):
            return
        for node in residual.embeddings:
            if not _is_done(node, "stream"):
                raise VerificationError(f"Node {node.name} was not rotated.")


def _residual(program: Program) -> Residual:
    found = match_residual(program.graph)
    if isinstance(found, NoMatch):
        raise HikuiError(
            f"The residual stream cannot be rotated: {found.reason}; rotate takes unquantised models with RMS norms."
        )
    return found


def _with_ends(program: Program, residual: Residual, rotation: Rotation, fmt: str) -> tuple[Residual, list[str]]:
    """Products by R behind the embeddings and by Rᵀ before what reads the stream outside of blocks.

    Returns:
        What of the stream is still to be rotated, and what to say.
    """
    outside = [(node, norm) for node, norm in residual.readers if BLOCK not in node.meta]
    inside = {norm.output for node, norm in residual.readers if norm is not None and BLOCK in node.meta}
    if mixed := next((norm for _, norm in outside if norm is not None and norm.output in inside), None):
        raise HikuiError(
            f"The residual stream cannot be rotated back: {mixed.output.name} is read inside of a block and outside; "
            "leave out rotate's ends."
        )
    matrix = rotation.matrix().float()
    notes: list[str] = []
    for number, node in enumerate(residual.embeddings):
        users = list(node.users)
        product = _end(program, f"rotation.in{number or ''}", matrix.t(), node, users, node, fmt)
        _mark([node, product], "stream")
        notes.append(f"{product.meta[SITE]}: {fmt}")
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    for node, norm in outside:
        x, users = (node.args[0], [node]) if norm is None else (norm.x, sorted(residual.reads[norm.output], key=str))
        assert isinstance(x, fx.Node), "it reads the stream"
        reads.setdefault(x, {}).update(dict.fromkeys(users))
    for number, (x, readers) in enumerate(reads.items()):
        product = _end(program, f"rotation.out{number or ''}", matrix, x, readers, next(iter(readers)), fmt)
        _mark([product], "stream")
        notes.append(f"{product.meta[SITE]}: {fmt}")
    done = {node for node, _ in outside}
    norms = {norm.output for _, norm in outside if norm is not None}
    return replace(
        residual,
        embeddings=[],
        readers=[reader for reader in residual.readers if reader[0] not in done],
        norms=[norm for norm in residual.norms if norm.output not in norms],
    ), notes


def _end(
    program: Program, site: str, weight: Tensor, x: fx.Node, users: Iterable[fx.Node], like: fx.Node, fmt: str
) -> fx.Node:
    """A product x·weightᵀ that some users of x read in its place; a site outside of blocks whose format is settled."""
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    first = min(users, key=order.__getitem__)
    stored = program.add_weight(program.store.free_name(f"{site}.weight"), weight.contiguous())
    product = insert(program, first, aten.linear.default, (x, stored), like)
    for user in users:
        user.replace_input_with(x, product)
    product.meta |= {SITE: site, GROUP: site, FORMAT: fmt, FIXED: fmt}
    return product


def _rotate_stream(program: Program, residual: Residual, rotation: Rotation, context: PassContext) -> list[fx.Node]:
    steps = len(residual.embeddings) + len(residual.readers) + len(residual.writers)
    done = 0

    def step() -> None:
        nonlocal done
        context.progress("rotate", done, steps)
        done += 1

    for node in residual.embeddings:
        step()
        rewrite(program, node, 0, "rotated", lambda rows, _: _by_parts(rows, rotation.apply))
    for node, norm in residual.readers:
        step()
        gain = None if norm is None else program.store.load(program.weight_of(norm.weight)).double()

        def read(rows: Tensor, _: slice, gain: Tensor | None = gain) -> Tensor:
            return _by_parts(rows, lambda part: rotation.apply(part if gain is None else part * gain))

        rewrite(program, node, 1, "rotated", read)
    for norm in residual.norms:
        at = [index for index, arg in enumerate(norm.output.args) if arg is norm.weight]
        ones = torch.ones(rotation.size)
        if not torch.equal(program.store.load(program.weight_of(norm.weight)), ones):
            replace_weight(program, norm.output, at[0], "rotated", ones)
    for node in residual.writers:
        step()
        rotate_outputs(program, node, rotation.apply)
    context.progress("rotate", steps, steps)
    touched = [*residual.embeddings, *(node for node, _ in residual.readers), *residual.writers]
    _mark(touched, "stream")
    return touched


def rotate_outputs(program: Program, node: fx.Node, apply: Callable[[Tensor], Tensor]) -> None:
    """Rotates what a product gives: Rᵀ·W, and its bias b·R.

    Args:
        program: is changed.
        node: a float `linear`.
        apply: float64 [..., n] times R.
    """
    weight = load_finite(program, weight_of(node), node.meta.get(SITE, node.name))
    out = torch.empty_like(weight)
    columns = max(1, _PART // weight.shape[0])
    for start in range(0, weight.shape[1], columns):
        part = slice(start, start + columns)
        out[:, part] = apply(weight[:, part].t().double()).t().float()
    replace_weight(program, node, 1, "rotated", out)
    bias = argument(node, 2, "bias")
    if is_weight(bias):
        held = load_finite(program, bias, node.meta.get(SITE, node.name))
        replace_weight(program, node, 2, "rotated", apply(held.double()).float())


def _by_parts(rows: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Changes rows in float64, some at a time; float32 in and out."""
    step = max(1, _PART // rows.shape[1])
    return torch.cat([apply(part.double()).float() for part in rows.split(step)])


def _rotate_heads(program: Program, generator: torch.Generator) -> tuple[list[fx.Node], list[str]]:
    """Rotates the values of each KV head, where one product makes them and products read nothing but their mixtures."""
    touched: list[fx.Node] = []
    notes: list[str] = []
    for name, members in groups(float_sites(program)).items():
        found = find_fold(program, members)
        if isinstance(found, NoMatch) or _is_done(members[0], "heads"):
            continue
        size = _head_size(found)
        if size is None:
            continue
        # Each run of `size` channels is a KV head; the columns of the query heads that share it turn alike.
        turns = [random_hadamard(size, generator)[0] for _ in range(len(found.channels) // size)]

        def write(columns: Tensor, found: Fold = found, turns: list[Rotation] = turns, size: int = size) -> Tensor:
            out = columns.clone()
            for index, turn in enumerate(turns):
                own = found.channels[index * size : (index + 1) * size]
                out[..., own] = turn.apply(columns[..., own])
            return out

        by_query = [turns[head] for head in (found.ties[::size] // size).tolist()]

        def read(rows: Tensor, _: slice, by_query: list[Rotation] = by_query, size: int = size) -> Tensor:
            parts = rows.double().split(size, dim=1)
            return torch.cat([turn.apply(part) for turn, part in zip(by_query, parts, strict=True)], 1).float()

        rotate_outputs(program, found.producer, write)
        for node in members:
            rewrite(program, node, 1, "rotated", read)
        _mark(members, "heads")
        touched += [found.producer, *members]
        notes.append(f"{name}: {len(turns)} heads of {size}")
    return touched, notes


def _head_size(found: Fold) -> int | None:
    """The size of the heads whose values a group reads; None where it does not read whole heads of attention."""
    mixed = [node for node in found.path[1:] if mixes_rows(node)]
    if not mixed or not all(is_view(node) or mixes_rows(node) for node in found.path[1:]):
        return None
    size = int(mixed[-1].meta["val"].shape[-1])
    if len(found.channels) % size or len(found.ties) % size:
        return None
    own = torch.arange(size)
    channels, ties = found.channels.view(-1, size), found.ties.view(-1, size)
    whole = torch.equal(channels, channels[:, :1] + own) and torch.equal(ties, ties[:, :1] + own)
    return size if whole and not bool((ties[:, 0] % size).any()) else None


def _forget(program: Program, nodes: list[fx.Node]) -> int:
    """Drops what was measured of nodes and their groups; returns how many sites had statistics."""
    keys: set[str] = set()
    count = 0
    for node in dict.fromkeys(nodes):
        node.meta.pop(SENSITIVITY, None)
        if (held := node.meta.pop(STATISTICS, None)) is not None:
            count += 1
            keys |= set(held.values())
    still = {key for node in sites(program) for key in node.meta.get(STATISTICS, {}).values()}
    program.store.drop(keys - still)
    return count


def _mark(nodes: list[fx.Node], what: str) -> None:
    for node in nodes:
        node.meta[ROTATED] = (*node.meta.get(ROTATED, ()), what)


def _is_done(node: fx.Node, what: str) -> bool:
    return what in node.meta.get(ROTATED, ())

"""Weights for a program of which only the text is at hand: made from a seed and each weight's name.

They are what a matrix, a norm, a scale or a packed weight may look like, so that passes and the interpreter take them:
logits stay finite, packed fields are codes of their format, padding rows have scale 0.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import ROWS, Format, pack
from hikui.lowering.ir.packed import PackedEmbedding, PackedLinear, is_packed, is_packed_embedding, is_stored
from hikui.lowering.ir.program import STATISTICS, WEIGHT, Program
from hikui.lowering.ir.store import TensorInfo, TensorSource

aten = torch.ops.aten
hikui = torch.ops.hikui

_BIASES: Mapping[object, int] = {
    aten.linear.default: 2,
    aten.layer_norm.default: 3,
    aten.addmm.default: 0,
}
"""Where biases stand; they are small and lie around 0."""

_STEP = 0.05
"""A static step of activations."""


@dataclass(frozen=True)
class _Role:
    """What a weight is there for.

    Attributes:
        kind: `matrix`, `codes`, `scale`, `bias`, `step` or the name of a statistic.
        format: of codes and scales.
        rows: of the matrix that they belong to.
        columns: likewise, padding included.
    """

    kind: str = "matrix"
    format: Format | None = None
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True)
class SeededTensor:
    """A tensor that is drawn anew at each load, always the same."""

    key: str
    seed: int
    info: TensorInfo
    role: _Role

    def load(self) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{self.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return _draw(self.role, self.info, generator).to(self.info.dtype).reshape(self.info.shape).contiguous()


def seeded_sources(program: Program, infos: Mapping[str, TensorInfo], seed: int) -> dict[str, TensorSource]:
    """A source for each tensor, by the part that it plays in the program's graph."""
    roles = _roles(program)
    return {key: SeededTensor(key, seed, info, roles.get(key, _Role())) for key, info in infos.items()}


def _roles(program: Program) -> dict[str, _Role]:
    roles: dict[str, _Role] = {}
    for node in program.graph.nodes:
        for kind, key in node.meta.get(STATISTICS, {}).items():
            roles[key] = _Role(kind)
        if (at := _BIASES.get(node.target)) is not None and len(node.args) > at:
            _note(roles, node.args[at], _Role("bias"))
        if node.target is hikui.quantize_activation_static.default:
            _note(roles, node.args[1], _Role("step"))
        if is_packed(node):
            packed = PackedLinear.of(node)
            if packed.bias is not None:
                _note(roles, packed.bias, _Role("bias"))
            _note_packed(roles, packed)
        if is_packed_embedding(node):
            _note_packed(roles, PackedEmbedding.of(node))
    return roles


def _note(roles: dict[str, _Role], operand: object, role: _Role) -> None:
    if is_stored(operand):
        roles[operand.meta[WEIGHT]] = role


def _note_packed(roles: dict[str, _Role], packed: PackedLinear | PackedEmbedding) -> None:
    weight, fmt, rows = packed.weight, packed.format, packed.rows
    if not fmt.is_integer or packed.scale is None:
        return
    shape = tuple(weight.meta["val"].shape)
    columns = fmt.stored_columns(int(shape[1]), int(packed.scale.meta["val"].shape[1]))
    if _fits(fmt, rows, columns, shape):
        _note(roles, weight, _Role("codes", fmt, rows, columns))
        _note(roles, packed.scale, _Role("scale", fmt, rows, columns))


def _fits(fmt: Format, rows: int, columns: int, shape: tuple[int, ...]) -> bool:
    """Whether a weight has the shape of its format: the verifier does not know the columns of quantised activations."""
    try:
        return fmt.weight_shape(rows, columns) == shape
    except UsageError:
        return False


def _draw(role: _Role, info: TensorInfo, generator: torch.Generator) -> Tensor:
    count = math.prod(info.shape)
    if role.kind == "codes":
        return _codes(role, generator)
    if role.kind == "scale":
        return _scales(role, info, generator)
    if role.kind in _STATISTICS:
        return _statistic(role.kind, info, generator)
    if not info.dtype.is_floating_point:
        return torch.ones(count) if info.dtype == torch.bool else torch.randperm(count, generator=generator)
    if role.kind == "step":
        return torch.full((count,), _STEP)
    drawn = torch.randn(count, generator=generator)
    if role.kind == "bias":
        return drawn * 0.1
    if count == max(info.shape, default=1):
        return 1 + drawn.clamp(-3, 3) * 0.1  # A norm's weight, or factors of columns: positive.
    # A packed float matrix is [blocks, K, 16].
    columns = info.shape[1] if len(info.shape) == 3 and info.shape[2] == ROWS else info.shape[-1]
    return drawn / math.sqrt(max(1, columns))


_STATISTICS: Mapping[str, tuple[float, float]] = {
    "mean_square": (0.5, 1.5),
    "mean_abs": (0.4, 0.7),
    "max_abs": (2.0, 4.0),
    "tokens": (64.0, 64.0),
    "gram": (0.0, 0.0),
    "sample": (-1.0, 1.0),
    "token_weight": (0.5, 1.5),
}
"""Bounds of what `calibrate` and `guide` would have measured."""


def _statistic(kind: str, info: TensorInfo, generator: torch.Generator) -> Tensor:
    if kind == "gram" and len(info.shape) == 2:
        samples = torch.randn(2 * info.shape[0], info.shape[0], generator=generator)
        return samples.t() @ samples / samples.shape[0]
    low, high = _STATISTICS[kind]
    return low + (high - low) * torch.rand(math.prod(info.shape), generator=generator)


def _codes(role: _Role, generator: torch.Generator) -> Tensor:
    """A packed weight of random codes of its format."""
    fmt = role.format
    assert fmt is not None, "codes have a format"
    parts = []
    for part in fmt.segments(role.columns):
        levels = torch.tensor(part.format.levels, dtype=torch.int16)
        at = torch.randint(0, len(levels), (role.rows, part.stop - part.start), generator=generator)
        parts.append(levels[at])
    ones = torch.ones(role.rows, fmt.groups(role.columns))
    return pack(fmt, torch.cat(parts, 1), ones).weight


def _scales(role: _Role, info: TensorInfo, generator: torch.Generator) -> Tensor:
    """Scales that make of random codes a matrix whose products keep the size of what they read."""
    assert role.format is not None, "scales have a format"
    largest = max(map(abs, role.format.levels))
    drawn = 0.5 + torch.rand(info.shape, generator=generator)
    row = torch.arange(info.shape[0])[:, None, None] * ROWS + torch.arange(info.shape[2])
    return torch.where(row < role.rows, drawn / (largest * math.sqrt(max(1, role.columns)) / 1.7), 0.0)

"""Every kernel with random tensors and the numbers that it has to give."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hikui.backends.kernels.cuda import launch
from hikui.backends.kernels.cuda.kernels import DENSE, FLOAT_ROWS, INTEGER_ROWS, KINDS, QUANTIZERS
from hikui.backends.kernels.cuda.launch import Launch
from hikui.lowering.formats import Format, activation_k, pack, quantize_activation, quantize_activation_static, unpack

TOLERANCE = 1e-6
"""Of the sum of all terms' magnitudes."""


@dataclass(frozen=True)
class Case:
    """A kernel's call and its result.

    Attributes:
        launch: the call; its outputs are poisoned.
        expected: by position among the tensors of the call: values in float64, and the largest error allowed of each.
    """

    launch: Launch
    expected: dict[int, tuple[Tensor, Tensor]]

    def worst(self, results: dict[int, Tensor]) -> float:
        """The largest error as a share of what is allowed; NaN and what was not written count as infinite."""
        shares = [0.0]
        for position, (value, allowed) in self.expected.items():
            share = ((results[position].double() - value).abs() / allowed).nan_to_num(torch.inf, torch.inf, torch.inf)
            shares.append(float(share.max()))
        return max(shares)


def random_format(kind: str, n: int, k: int, group: int, generator: torch.Generator) -> tuple[Format, Tensor, Tensor]:
    """A format of that kind, with random codes [n, k] and scales."""
    fmt = Format(kind, group, k // 2 // group * group or group) if kind == "mixed" else Format(kind, group)
    codes = torch.empty(n, k, dtype=torch.int8)
    for segment in fmt.segments(k):
        levels = torch.tensor(segment.format.levels, dtype=torch.int8)
        columns = segment.stop - segment.start
        codes[:, segment.start : segment.stop] = levels[torch.randint(len(levels), (n, columns), generator=generator)]
    return fmt, codes, torch.rand(n, fmt.groups(k), generator=generator) * 0.01 + 0.001


def cases(n: int = 83, k: int = 1000, seed: int = 0) -> Iterator[Case]:
    """Every kernel, at as many rows of activations as its tile has and at one less."""
    generator = torch.Generator().manual_seed(seed)
    for kind in KINDS:
        fmt, codes, scales = random_format(kind, n, k, 64, generator)
        packed = pack(fmt, codes, scales)
        assert packed.scale is not None
        weight = unpack(fmt, packed.weight, packed.scale, n, k)
        for m in _rows(INTEGER_ROWS):
            x = torch.randn(m, k, generator=generator)
            yield _integer(kind, x, packed.weight, packed.scale, weight, generator)
        for dtype in (torch.float32, torch.float16):
            for m in _rows(FLOAT_ROWS):
                x = torch.randn(m, k, generator=generator).to(dtype)
                y = torch.full((m, n), torch.nan)
                bias = torch.randn(n, generator=generator)
                call = launch.weight_only(kind, x, packed.weight, packed.scale, bias, y)
                yield Case(call, {4: _allowed(_terms(x, weight) + _terms(torch.ones(m, 1), bias.unsqueeze(1)))})
    for kind in DENSE:
        for m in _rows(FLOAT_ROWS):
            x = torch.randn(m, k, generator=generator)
            dense = pack(Format(kind), torch.randn(n, k, generator=generator)).weight
            call = launch.dense(kind, x, dense, torch.empty(0), torch.full((m, n), torch.nan))
            yield Case(call, {3: _allowed(_terms(x, unpack(Format(kind), dense, None, n, k)))})
    for suffix in QUANTIZERS:
        x, step = torch.randn(5, k, generator=generator), torch.tensor([0.02])
        outputs = (torch.full((5, activation_k(k)), 99, dtype=torch.int8), torch.full((5,), torch.nan))
        sums = torch.full((5, activation_k(k) // 32), -9999, dtype=torch.int32)
        if suffix == "_static":
            expected = quantize_activation_static(x, step)
        else:
            expected = quantize_activation(x, 4 if suffix else 8)
        exact = {i + 2: (value.double(), torch.full(value.shape, 1e-9).double()) for i, value in enumerate(expected)}
        yield Case(launch.quantize_activation(x, *outputs, sums, suffix, step), exact)


def _rows(tiles: tuple[int, ...]) -> list[int]:
    return sorted({max(1, rows - less) for rows in tiles for less in (0, 1)} | {tiles[-1] + 3})


def _integer(
    kind: str, x: Tensor, weight: Tensor, scale: Tensor, plain: Tensor, generator: torch.Generator, rank: int = 24
) -> Case:
    m, k = x.shape
    n = plain.shape[0]
    q, q_scale, sums = quantize_activation(x)
    bias, t = torch.randn(n, generator=generator), torch.randn(m, rank, generator=generator)
    b = pack(Format("float16"), torch.randn(n, rank, generator=generator)).weight
    reference = _terms(q_scale.double().unsqueeze(1) * q[:, :k], plain) + _terms(torch.ones(m, 1), bias.unsqueeze(1))
    reference += _terms(t, unpack(Format("float16"), b, None, n, rank))
    y = torch.full((m, n), torch.nan)
    return Case(launch.integer(kind, q, q_scale, sums, weight, scale, bias, y, b, t), {8: _allowed(reference)})


def _terms(left: Tensor, right: Tensor) -> Tensor:
    """Left · rightᵀ in float64, and the same with every term's magnitude."""
    left, right = left.double(), right.double()
    return torch.stack((left @ right.T, left.abs() @ right.abs().T))


def _allowed(reference: Tensor) -> tuple[Tensor, Tensor]:
    return reference[0], TOLERANCE * reference[1]

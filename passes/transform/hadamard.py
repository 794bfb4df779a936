"""Orthogonal matrices that spread a vector's entries evenly: random Hadamard rotations, and Gaussian ones."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R = diag(signs)·(A ⊗ H), H being Sylvester's Hadamard matrix over the root of its order.

    Attributes:
        signs: float64 [n], ±1.
        left: A, float64 [m, m], orthogonal; m divides n and n/m is a power of two.
    """

    signs: Tensor
    left: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x·R for float64 x [..., n]."""
        m = self.left.shape[0]
        parts = (x * self.signs).unflatten(-1, (m, self.size // m))
        if m > 1:
            parts = self.left.t() @ parts
        return _sylvester(parts).flatten(-2)

    def matrix(self) -> Tensor:
        """R itself, float64 [n, n]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def _sylvester(x: Tensor) -> Tensor:
    """x·H over its last dimension, a power of two, by the fast transform: H is symmetric."""
    n, half = x.shape[-1], 1
    while half < n:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        half *= 2
    return x.div(n**0.5)


def random_hadamard(n: int, generator: torch.Generator) -> tuple[Rotation, bool]:
    """A Hadamard matrix over √n with random signs in front.

    Powers of two are Sylvester's; other sizes his times a small one after Paley (1933), as 12, 20 or 28. Where none of
    these is known the odd factor of n gets a random orthogonal matrix.

    Args:
        n: the order.
        generator: the signs are drawn from it.

    Returns:
        The rotation, and whether it is a Hadamard matrix.
    """
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int64).double() * 2 - 1
    odd = n
    while odd % 2 == 0:
        odd //= 2
    order = odd
    while n % order == 0:
        if (small := _paley(order)) is not None:
            return Rotation(signs, small / order**0.5), True
        order *= 2
    return Rotation(signs, _orthogonal(odd, generator)), False


def random_orthogonal(n: int, generator: torch.Generator) -> Rotation:
    """A rotation drawn evenly from all (Stewart, 1980): the Q of a Gaussian matrix's QR with R's diagonal positive."""
    return Rotation(torch.ones(n, dtype=torch.float64), _orthogonal(n, generator))


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return torch.where(r.diagonal() < 0, -q, q)


@cache
def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of entries ±1 by one of Paley's constructions over a prime field; None where neither gives one.

    S is Jacobsthal's matrix with a border of ones. With q = order − 1 ≡ 3 (mod 4) it is skew and I + S will do; with
    q = order/2 − 1 ≡ 1 (mod 4) it is symmetric and gives S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]].
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):
        bordered = _bordered(order - 1, -1.0)
        return bordered + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        bordered, one = _bordered(q, 1.0), torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(bordered, plus) + torch.kron(one, minus)
    return None


def _bordered(q: int, corner: float) -> Tensor:
    """[[0, 1], [corner·1, Q]] with Jacobsthal's Q: 1 where the difference is a square modulo the prime q, else −1."""
    squares = {value * value % q for value in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:] = 1.0
    out[1:, 0] = corner
    out[1:, 1:] = character[(index.unsqueeze(1) - index) % q]
    return out


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, int(value**0.5) + 1))

"""Adds a low-rank float branch beside each quantised site, which takes back part of what rounding lost.

The residual is W−Ŵ; the branch B·A is its best approximation of that rank in the norm of the site's own activations:
with R = E[x·xᵀ] (or its diagonal) and S = R^½, the truncated SVD of (W−Ŵ)·S gives B·A = U_r Σ_r V_rᵀ S⁻¹ (LQER with the
diagonal, QERA with the whole matrix).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.factored import is_factor
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BRANCH, FLOAT_WEIGHT, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import (
    aten,
    hikui,
    insert,
    is_call,
    is_measured,
    selected,
    sites,
)

_DENSE = 512
"""Up to this many rows or columns the whole SVD is taken; above, only the leading part is iterated for."""

_DAMPING = 1e-4
"""Added to R's diagonal, over its mean: columns that the text never excites stay finite."""


@dataclass(frozen=True)
class SubBranch(Pass):
    """Adds y += B(A x) to quantised sites, as plain visible nodes.

    Attributes:
        rank: columns of B.
        sites: regular expression of the sites that get a branch; empty is all.
        skip: regular expression of the sites that get none.
    """

    name: ClassVar[str] = "sub_branch"
    rank: int = 16
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"sub_branch cannot have a rank of {self.rank}; it takes 1 or more.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where a site lacks its float weights or its statistics."""
        if not _integer_sites(program):
            raise HikuiError("No site with integer weights is left that a branch could mend; run `rtn` first.")
        chosen = self._chosen(program)
        if not chosen:
            without = f" without those of '{self.skip}'" if self.skip else ""
            raise HikuiError(f"No site with integer weights matches '{self.sites}'{without}; widen `sites`.")
        for node in chosen:
            key = node.meta.get(FLOAT_WEIGHT)
            if key is None or key not in program.store:
                raise HikuiError(
                    f"Site {node.meta[SITE]} has lost its float weights; run `sub_branch` after `rtn` and before "
                    "`dead_code`."
                )
            if not is_measured(node):
                raise HikuiError(f"Site {node.meta[SITE]} has no statistics; run `calibrate` before `rtn`.")

    def _chosen(self, program: Program) -> list[fx.Node]:
        return list(selected(_integer_sites(program), self.sites, self.skip))

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works site by site on a clone; a site that has a branch gets no second one."""
        work = program.clone()
        chosen = [node for node in self._chosen(work) if not _has_branch(node)]
        notes: list[str] = []
        for index, node in enumerate(chosen):
            context.progress("sub_branch", index, len(chosen))
            notes += self._add(work, node)
        context.progress("sub_branch", len(chosen), len(chosen))
        if not chosen:
            return PassResult(program, False)
        work.recompile()
        return PassResult(work, True, notes)

    def _add(self, program: Program, node: fx.Node) -> list[str]:
        site, x = node.meta[SITE], node.args[0]
        assert isinstance(x, fx.Node)
        residual, covariance = _residual(program, node), _covariance(program, node)
        rank = min(self.rank, *residual.shape)
        down, up = factors(residual, covariance, rank)
        if not bool(down.isfinite().all() & up.isfinite().all()):
            raise HikuiError(f"Site {site}: the branch is beyond float16; leave the site out with skip.")
        a = program.add_weight(f"{site}.branch.a", down)
        b = program.add_weight(f"{site}.branch.b", up)
        after = node.next
        t = insert(program, after, aten.linear.default, (x, a), node)
        y = insert(program, after, aten.linear.default, (t, b), node)
        total = insert(program, after, aten.add.Tensor, (node, y), node)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        total.meta[BRANCH] = site
        before, now = (
            _energy(residual, covariance),
            _energy(residual - (up.double() @ down.double()), covariance),
        )
        kept = now / before if before > 0 else 0.0
        note = f"{site}: rank {rank} leaves {100 * kept:.1f} % of the squared output error"
        return (
            [note]
            if rank == self.rank
            else [
                note,
                f"{site}: rank {self.rank} is above the matrix's, {rank} is used",
            ]
        )


def _integer_sites(program: Program) -> list[fx.Node]:
    packed = [node for node in sites(program) if is_call(node, hikui.linear.default) and not is_factor(node)]
    return [node for node in packed if PackedLinear.of(node).format.is_integer]


def _has_branch(node: fx.Node) -> bool:
    return any(user.meta.get(BRANCH) == node.meta[SITE] for user in node.users)


def _residual(program: Program, node: fx.Node) -> Tensor:
    """W − Ŵ in float64, [n, k]."""
    packed = PackedLinear.of(node)
    return packed.unrounded(program.store).double() - packed.dense(program.store).double()


def _covariance(program: Program, node: fx.Node) -> Tensor:
    """E[x·xᵀ] in float64 with its damping: [k, k], or its diagonal [k] where that is all that was measured."""
    keys, order = node.meta[STATISTICS], PackedLinear.of(node).column_order(program.store)
    if "gram" in keys:
        gram = program.store.load(keys["gram"]).double()
        gram = gram if order is None else gram[order][:, order]
        return gram + torch.eye(gram.shape[0], dtype=torch.float64) * _floor(gram.diagonal())
    diagonal = program.store.load(keys["mean_square"]).double()
    diagonal = diagonal if order is None else diagonal[order]
    return diagonal + _floor(diagonal)


def _floor(diagonal: Tensor) -> float:
    mean = float(diagonal.mean())
    return _DAMPING * mean if mean > 0 else 1.0


def _energy(matrix: Tensor, covariance: Tensor) -> float:
    """E‖M x‖²."""
    weighted = matrix * covariance if covariance.dim() == 1 else matrix @ covariance
    return float((weighted * matrix).sum())


def factors(residual: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, k] and B [n, rank], float32 with values that float16 holds, of the whitened truncated SVD.

    Args:
        residual: float64 [n, k].
        covariance: float64 [k, k], positive definite, or its diagonal [k].
        rank: at most min(n, k).
    """
    if covariance.dim() == 1:
        root = covariance.sqrt()
        whitened = residual * root
    else:
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(float(values.max()) * 1e-12).sqrt()
        whitened = residual @ (vectors * values) @ vectors.t()
    u, s, v = _leading_svd(whitened, rank)
    unwhitened = v / root if covariance.dim() == 1 else v @ (vectors / values) @ vectors.t()
    balance = s.sqrt()
    down, up = _alike(balance.unsqueeze(1) * unwhitened, u * balance)
    return down.to(torch.float16).float(), up.to(torch.float16).float()


def _alike(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the largest entries of each pair of a row and a column within a factor of two.

    Where inputs are large or small the whitening leaves one of them beyond what float16 holds. Powers of two change no
    digit.
    """
    largest = (down.abs().amax(1), up.abs().amax(0))
    known = (largest[0] > 0) & (largest[1] > 0)
    ratio = torch.where(known, largest[1] / torch.where(known, largest[0], 1.0), 1.0)
    shift = torch.exp2((0.5 * ratio.log2()).round())
    return down * shift.unsqueeze(1), up / shift


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, largest first: u [n, r], s [r], v [r, k], each pair's sign fixed."""
    if min(matrix.shape) <= max(_DENSE, 2 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        from scipy.sparse.linalg import svds

        start = np.random.default_rng(0).standard_normal(min(matrix.shape))
        found = svds(matrix.numpy(), k=rank, v0=start, solver="arpack")
        order = np.argsort(-found[1], kind="stable")
        u, s, v = (torch.from_numpy(np.ascontiguousarray(part)) for part in
                   (found[0][:, order], found[1][order], found[2][order]))  # fmt: skip
    # A singular pair is free in sign; the largest entry of each row of v is made positive.
    largest = v.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(v.gather(1, largest) < 0, -1.0, 1.0).to(v.dtype)
    return u * sign.t(), s, v * sign

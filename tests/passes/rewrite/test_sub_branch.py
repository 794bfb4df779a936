"""sub_branch: the truncated SVD of the whitened residual."""

import pytest
import torch

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.program import SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import SubBranch
from hikui.passes.graph import aten, sites
from hikui.passes.rewrite.sub_branch import _leading_svd, factors
from tests.passes.helpers import assert_settled, calibration, calls, canonical, check, lower, random


def rounded(gram: bool = False, family: str = "llama") -> Program:
    program = canonical(family)
    return lower(program, f"calibrate{{gram={str(gram).lower()}}},rtn{{bits=4,group=32}}", calibration(program, 8, 40))


def test_text() -> None:
    check(
        lower(rounded(), "sub_branch{rank=3,sites=layers.0.self_attn}"),
        """
        // CHECK: "model.layers.0.self_attn.q_proj.branch.a" : f32[3, 48]
        // CHECK: "model.layers.0.self_attn.q_proj.branch.b" : f32[48, 3]
        // CHECK: %[[Y:.*]] = hikui.linear(%[[X:mul[_0-9]*]],{{.*}}site=model.layers.0.self_attn.q_proj
        // CHECK-NEXT: %[[T:.*]] = aten.linear(%[[X]], %w_model_layers_0_self_attn_q_proj_branch_a) : f32[1, T, 3]
        // CHECK-NEXT: %[[B:.*]] = aten.linear(%[[T]], %w_model_layers_0_self_attn_q_proj_branch_b) : f32[1, T, 48]
        // CHECK-NEXT: aten.add.Tensor(%[[Y]], %[[B]]) : f32[1, T, 48]
        """,
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("n", "k", "rank"), [(20, 30, 4), (30, 20, 1), (9, 9, 9)])
def test_factors_are_the_best_of_their_rank(n: int, k: int, rank: int, full: bool) -> None:
    residual = random(n, k, seed=1).double()
    x = random(200, k, seed=2).double() * torch.linspace(0.1, 3.0, k, dtype=torch.float64)
    covariance = x.t() @ x / 200
    if not full:
        covariance = covariance.diagonal()
    down, up = factors(residual, covariance, rank)
    assert down.shape == (rank, k)
    assert up.shape == (n, rank)
    for factor in (down, up):
        assert torch.equal(factor, factor.half().float())

    def energy(matrix: torch.Tensor) -> float:
        second = covariance if full else torch.diag(covariance)
        return float(torch.trace(matrix @ second @ matrix.t()))

    # Eckart–Young in the whitened space: the least energy is that of the singular values left out.
    factor = torch.linalg.cholesky(covariance if full else torch.diag(covariance))
    least = float(torch.linalg.svdvals(residual @ factor)[rank:].square().sum())
    left = energy(residual - up.double() @ down.double())
    assert left <= least + 1e-5 * energy(residual)
    assert left >= least * (1 - 1e-9)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("size", [2.0**-64, 2.0**64])
def test_factors_are_as_good_for_inputs_of_any_size(size: float, full: bool) -> None:
    residual = random(20, 30, seed=1).double()
    x = random(200, 30, seed=2).double()
    covariance = x.t() @ x / 200
    usual, scaled = covariance, covariance * size
    if not full:
        usual, scaled = usual.diagonal(), scaled.diagonal()
    down, up = factors(residual, scaled, 4)
    wanted = factors(residual, usual, 4)
    product = wanted[1].double() @ wanted[0].double()
    assert float((up.double() @ down.double() - product).norm()) < 1e-3 * float(product.norm())


def test_large_matrices_take_the_iterated_svd() -> None:
    matrix = random(530, 600, seed=3).double()
    u, s, v = _leading_svd(matrix, 5)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(s, exact.S[:5], rtol=1e-9)
    best = (exact.U[:, :5] * exact.S[:5]) @ exact.Vh[:5]
    assert torch.allclose((u * s) @ v, best, atol=1e-7)
    again = _leading_svd(matrix, 5)
    assert all(torch.equal(one, two) for one, two in zip((u, s, v), again, strict=True))
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("gram", [True, False])
def test_output_errors_fall_with_the_rank(gram: bool) -> None:
    program = rounded(gram)
    whole = lower(program, "sub_branch{rank=48}")
    some = lower(program, "sub_branch{rank=8}")

    def error(work: Program, site: str) -> float:
        (node,) = [n for n in sites(program) if n.meta[SITE] == site]
        keys = node.meta[STATISTICS]
        second = (
            program.store.load(keys["gram"]).double()
            if gram
            else torch.diag(program.store.load(keys["mean_square"]).double())
        )
        from hikui.passes.rewrite.sub_branch import _residual

        left = _residual(program, node)
        if work is not program:
            a, b = (work.store.load(f"{site}.branch.{name}").double() for name in "ab")
            left = left - b @ a
        return float(torch.trace(left @ second @ left.t()))

    for site in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
        nothing, a_little, much = (error(work, site) for work in (program, some, whole))
        assert much < a_little < 0.8 * nothing
        assert much < 1e-4 * nothing or site == "lm_head"


def test_the_whole_matrix_whitens_better_than_its_diagonal() -> None:
    program = rounded(True)
    exact = lower(program, "sub_branch{rank=4}")
    diagonal = lower(rounded(False), "sub_branch{rank=4}")
    from hikui.passes.rewrite.sub_branch import _residual

    for node in sites(program)[::4]:
        gram, residual = program.store.load(node.meta[STATISTICS]["gram"]).double(), _residual(program, node)
        left = []
        for work in (exact, diagonal):
            a, b = (work.store.load(f"{node.meta[SITE]}.branch.{name}").double() for name in "ab")
            rest = residual - b @ a
            left.append(float(torch.trace(rest @ gram @ rest.t())))
        assert left[0] < left[1]


def test_second_run_and_skips() -> None:
    program = lower(rounded(), "sub_branch{rank=2,skip=lm_head}")
    assert len(calls(program, aten.linear.default)) == 2 * 21
    assert_settled(SubBranch(2, skip="lm_head"), program)


def test_a_rank_above_the_matrix_is_cut_and_noted() -> None:
    result = SubBranch(1000, sites="layers.0.self_attn.k_proj").run(rounded(), PassContext())
    assert result.notes[1] == "model.layers.0.self_attn.k_proj: rank 1000 is above the matrix's, 16 is used"


def test_what_is_missing() -> None:
    with pytest.raises(UsageError, match="rank of 0"):
        SubBranch(0)
    data = calibration(canonical("llama"))
    with pytest.raises(HikuiError, match="run `rtn` first"):
        lower(canonical("llama"), "calibrate,sub_branch", data)
    with pytest.raises(HikuiError, match="after `rtn` and before `dead_code`"):
        lower(canonical("llama"), "calibrate,rtn,dead_code,sub_branch", data)
    with pytest.raises(HikuiError, match=r"matches 'mlp' without those of 'mlp'; widen `sites`"):
        lower(canonical("llama"), "calibrate,rtn,sub_branch{sites=mlp,skip=mlp}", data)
    with pytest.raises(HikuiError, match="run `calibrate` before `rtn`"):
        lower(canonical("llama"), "rtn,sub_branch")

"""sensitivity: predicted errors against measured ones."""

import pytest
import torch

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Sensitivity
from hikui.passes.graph import sites
from hikui.passes.precision.sensitivity import measure_columns
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.passes.helpers import assert_settled, calibration, canonical, check, lower

FORMATS = ("int4-g32", "int4-channel", "int8-g64", "sign-g32", "ternary-g64", "nf4-channel", "float16")


def measured(pipeline: str) -> Program:
    return lower(canonical("llama"), pipeline, calibration(canonical("llama")))


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    fmt = Format.parse(name)
    return dequantise(round_matrix(weight, fmt), fmt) if fmt.is_integer else weight.half().float()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("metric", ["output", "pbar", "weight"])
def test_against_brute_force_in_float64(metric: str, gram: bool) -> None:
    options = f"metric={metric},formats={'|'.join(FORMATS)}"
    program = measured(f"calibrate{{gram={str(gram).lower()}}},sensitivity{{{options}}}")
    for node in sites(program)[::5]:
        weight = program.store.load(f"{node.meta[SITE]}.weight")
        keys = node.meta[STATISTICS]
        mean_square = program.store.load(keys["mean_square"]).double()
        second = program.store.load(keys["gram"]).double() if gram and metric == "output" else torch.diag(mean_square)
        for name in FORMATS:
            error = weight.double() - rounded(weight, name).double()
            if metric == "weight":
                want = error.square().sum() / weight.double().square().sum()
            else:
                want = torch.trace(error @ second @ error.t())
                if metric == "output":
                    want = want / torch.trace(weight.double() @ second @ weight.double().t())
            assert node.meta[SENSITIVITY][name] == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("metric", ["output", "pbar", "weight"])
def test_columns_against_brute_force_in_float64(metric: str) -> None:
    step = Sensitivity(metric=metric, formats="int4-g32|sign-g32")  # type: ignore[arg-type]
    program = measured("calibrate{gram=true}")
    (found,) = (
        shares
        for task in step.tasks(program)
        for site, shares in zip(task.sites, measure_columns(task, 24), strict=True)
        if site.name == "model.layers.1.mlp.down_proj"
    )
    (node,) = (node for node in sites(program) if node.meta[SITE] == "model.layers.1.mlp.down_proj")
    weight, keys = program.store.load(f"{node.meta[SITE]}.weight"), node.meta[STATISTICS]
    mean_square = program.store.load(keys["mean_square"]).double()
    second = program.store.load(keys["gram"]).double() if metric == "output" else torch.diag(mean_square)
    if metric == "weight":
        second = torch.eye(weight.shape[1], dtype=torch.float64)
    whole = 1.0 if metric == "pbar" else float(torch.trace(weight.double() @ second @ weight.double().t()))
    for row, name in zip(found, ("int4-g32", "sign-g32"), strict=True):
        error = weight.double() - rounded(weight, name).double()
        by_column = (error.t() @ error * second).sum(0) / whole
        wanted = torch.stack([part.sum() for part in by_column.split(24)])
        torch.testing.assert_close(row, wanted, rtol=1e-6, atol=1e-12)


def test_fewer_bits_cost_more_and_metrics_differ() -> None:
    out = {
        m: measured(f"calibrate{{gram=true}},sensitivity{{metric={m},formats=int4-g64|int8-g64}}")
        for m in ("output", "pbar")
    }
    for program in out.values():
        for node in sites(program):
            assert node.meta[SENSITIVITY]["int4-g64"] > 10 * node.meta[SENSITIVITY]["int8-g64"] > 0
    orders = {
        metric: sorted(sites(program), key=lambda node: node.meta[SENSITIVITY]["int4-g64"])
        for metric, program in out.items()
    }
    names = {metric: [node.meta[SITE] for node in order] for metric, order in orders.items()}
    assert names["output"] != names["pbar"]


def test_text_and_second_run() -> None:
    program = measured("calibrate,sensitivity")
    check(
        program,
        """
        // CHECK: aten.linear({{.*}}site=model.layers.0.self_attn.q_proj
        // CHECK-SAME: sensitivity={int4-g64: 0.0{{[0-9]+}}, int8-g64: {{.*}}}
        """,
    )
    assert_settled(Sensitivity(), program)
    assert "sensitivity" not in to_text(canonical("llama"))


def test_what_is_missing() -> None:
    with pytest.raises(HikuiError, match=r"q_proj has no statistics; run `calibrate` first, or choose metric=weight"):
        lower(canonical("llama"), "sensitivity")
    lower(canonical("llama"), "sensitivity{metric=weight}")
    with pytest.raises(UsageError, match="Format 'int5' is not known"):
        parse_pipeline("sensitivity{formats=int4-g64|int5}", PASSES)
    with pytest.raises(UsageError, match="metric"):
        parse_pipeline("sensitivity{metric=guess}", PASSES)

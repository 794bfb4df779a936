"""The error of each site against the two programs run apart, in float64."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.evaluation.error_table import ErrorTable, SiteError, error_table, is_float
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import BRANCH, SITE, Program
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.lowering.trace import trace
from hikui.passes import PASSES
from tests.lowering.handmade import program as handmade

hikui = torch.ops.hikui
TEXTS = [[0, 5, 9, 40, 33, 21, 60], [0, 70, 71, 72, 9, 14, 15, 99, 100, 3, 8]]


@pytest.fixture(scope="module")
def traced(tiny: Path) -> Program:
    return trace(tiny)


class KeepFloat:
    """Keeps the last program of a run whose sites are all float."""

    program: Program | None = None

    def before(self, step: object, program: Program) -> None: ...

    def after(self, step: object, result: object, seconds: float) -> None:
        found = result.program  # type: ignore[attr-defined]
        if is_float(found):
            self.program = found


def lower(traced: Program, pipeline: str) -> tuple[Program, Program]:
    """The last float program, and the lowered one."""
    generator = torch.Generator().manual_seed(1)
    chunks = tuple(torch.randint(0, 131, (1, 20), generator=generator) for _ in range(4))
    keep = KeepFloat()
    passes = parse_pipeline(f"canonicalise,{pipeline}", PASSES)
    lowered = Pipeline(passes, (keep,)).run(traced, PassContext(Calibration(chunks, "dice")))
    assert keep.program is not None
    return keep.program, lowered


def seen(
    program: Program, texts: Sequence[Sequence[int]]
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], list[Tensor]]:
    """What each site reads and gives, and the logits, a text at a time."""
    sites: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def observe(node: fx.Node, args: tuple[object, ...], result: object) -> None:
        if SITE in node.meta:
            sites.setdefault(node.meta[SITE], []).append((args[0], result))  # type: ignore[arg-type]
        elif BRANCH in node.meta:
            x, _ = sites[node.meta[BRANCH]].pop()
            sites[node.meta[BRANCH]].append((x, result))  # type: ignore[arg-type]

    interpreter = Interpreter(program, observe=observe)
    logits = [interpreter.run(torch.tensor([ids]), 0, interpreter.new_caches())[0] for ids in texts]
    return sites, logits


def effective(program: Program, site: str, k: int) -> Tensor:
    """The matrix that a packed site multiplies with, found by feeding it unit vectors: float64 [n, k]."""
    node = next(node for node in program.graph.nodes if node.meta.get(SITE) == site)
    held = {
        operand: program.store.load(program.weight_of(operand))
        for operand in node.all_input_nodes
        if "hikui.weight" in operand.meta
    }
    args = [held.get(arg, arg) for arg in node.args]
    eye = torch.eye(k)
    if node.target is hikui.linear.default:
        whole: Tensor = hikui.linear(eye, args[1], args[2], None, *args[4:])
        return whole.double().t()
    if node.target is hikui.linear_a8.default:
        packed: Tensor = hikui.linear(eye, args[3], args[4], None, *args[6:])
        return packed.double().t()
    assert node.target is hikui.linear_a8_branch.default
    plain: Tensor = hikui.linear(eye, args[3], args[4], None, *args[9:])
    plain = plain.double().t()
    rank = args[8].shape[1]
    down = hikui.linear(eye, args[7], None, None, "float16", rank)
    branch: Tensor = hikui.linear(down, args[8], None, None, "float16", plain.shape[0])
    return plain + branch.double().t()


def matrix(program: Program, site: str) -> Tensor:
    node = next(node for node in program.graph.nodes if node.meta.get(SITE) == site)
    return program.store.load(program.weight_of(node.args[1])).double()


def ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Σ‖reference − approximation‖² / Σ‖reference‖²."""
    over = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return over / sum(float(a.double().square().sum()) for a, _ in pairs)


def reference(floats: Program, lowered: Program, orders: dict[str, Tensor] | None = None) -> ErrorTable:
    """The same table by definition; `orders` are those of the columns of packed sites."""
    ours, logits = seen(floats, TEXTS)
    theirs, others = seen(lowered, TEXTS)
    rows = []
    for site in theirs:
        weight = matrix(floats, site)
        order = (orders or {}).get(site, torch.arange(weight.shape[1]))
        packed = torch.empty_like(weight)
        packed[:, order] = effective(lowered, site, weight.shape[1])
        products = [(x.double() @ weight.t(), x.double() @ packed.t()) for x, _ in ours[site]]
        outputs = [(a, b) for (_, a), (_, b) in zip(ours[site], theirs[site], strict=True)]
        rows.append(SiteError(site, "", ratio([(weight, packed)]), ratio(products), ratio(outputs)))
    divergence, same, tokens = 0.0, 0, 0
    for a, b in zip(logits, others, strict=True):
        p, q = a[0].double().log_softmax(-1), b[0].double().log_softmax(-1)
        divergence += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += p.shape[0]
    pairs = list(zip(logits, others, strict=True))
    return ErrorTable(len(TEXTS), tokens, tuple(rows), ratio(pairs), divergence / tokens, same / tokens)


def assert_equal(found: ErrorTable, expected: ErrorTable) -> None:
    assert (found.excerpts, found.tokens) == (expected.excerpts, expected.tokens)
    assert [row.name for row in found.sites] == [row.name for row in expected.sites]
    for a, b in zip(found.sites, expected.sites, strict=True):
        assert a.weight == pytest.approx(b.weight, rel=1e-4), a.name
        assert a.output == pytest.approx(b.output, rel=1e-4), a.name
        # Activations of the two runs may round otherwise in the last bit.
        assert a.cumulative == pytest.approx(b.cumulative, rel=1e-2, abs=1e-9), a.name
    assert found.logits == pytest.approx(expected.logits, rel=1e-2)
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-2)
    assert found.agreement == expected.agreement


@pytest.mark.parametrize(
    "pipeline",
    [
        "rtn{bits=4,group=32}",
        "rtn{bits=3,group=32},pack{format=float32},activation,fuse,dead_code",
        "calibrate,rtn{bits=3,group=32},sub_branch{rank=4},pack{format=float16},activation,fuse,dead_code",
    ],
)
def test_the_table_is_that_of_two_runs_in_float64(traced: Program, pipeline: str) -> None:
    floats, lowered = lower(traced, pipeline)
    table = error_table(floats, lowered, TEXTS)
    assert_equal(table, reference(floats, lowered))
    assert table.sites[-1].name == "lm_head"
    assert table.sites[-1].cumulative == pytest.approx(table.logits)
    assert all(row.output > 0 for row in table.sites)


def test_a_branch_that_stands_beside_its_site_counts_as_the_fused_one(traced: Program) -> None:
    steps = "calibrate,rtn{bits=3,group=32},sub_branch{rank=4},pack{format=float16},activation"
    floats, apart = lower(traced, steps)
    _, fused = lower(traced, f"{steps},fuse,dead_code")
    beside, inside = (error_table(floats, lowered, TEXTS) for lowered in (apart, fused))
    plain = error_table(*lower(traced, steps.replace("sub_branch{rank=4},", "")), TEXTS)
    for a, b, without in zip(beside.sites, inside.sites, plain.sites, strict=True):
        assert a.weight == pytest.approx(b.weight, rel=1e-4)
        assert a.output == pytest.approx(b.output, rel=1e-4)
        assert a.cumulative == pytest.approx(b.cumulative, rel=5e-2)
        assert a.output < without.output


def test_columns_in_another_order_are_compared_column_by_column(traced: Program) -> None:
    from tests.passes.helpers import order_of

    floats, lowered = lower(
        traced, "calibrate,rtn{format=mixed-g32-c32},pack{format=float32},activation,fuse,dead_code"
    )
    nodes = {node.meta[SITE]: node for node in lowered.graph.nodes if SITE in node.meta}
    orders = {site: order for site, node in nodes.items() if (order := order_of(lowered, node)) is not None}
    assert any(not torch.equal(order, torch.arange(order.numel())) for order in orders.values())
    assert_equal(error_table(floats, lowered, TEXTS), reference(floats, lowered, orders))


def test_transformed_weights_are_compared_with_the_transformed_float_program(traced: Program) -> None:
    floats, lowered = lower(traced, "rotate,rtn{bits=4,group=32},pack{format=float32},activation,fuse,dead_code")
    table = error_table(floats, lowered, TEXTS)
    assert_equal(table, reference(floats, lowered))
    assert max(row.weight for row in table.sites) < 0.05
    before = Pipeline(parse_pipeline("canonicalise", PASSES)).run(traced)
    # Held against the program before the rotation, unrelated matrices would be compared.
    assert error_table(before, lowered, TEXTS).sites[0].weight > 0.5


def test_a_program_has_no_error_against_itself(traced: Program) -> None:
    floats, lowered = lower(traced, "pack{format=float32},fuse")
    table = error_table(floats, lowered, TEXTS)
    assert [row.weight for row in table.sites] == [0.0] * len(table.sites)
    assert [row.output for row in table.sites] == [0.0] * len(table.sites)
    assert table.logits < 1e-10
    assert table.divergence == pytest.approx(0, abs=1e-9)
    assert table.agreement == 1


def test_files_and_threads_change_nothing(traced: Program, tmp_path: Path) -> None:
    floats, lowered = lower(traced, "rtn{bits=4,group=32},pack{format=float32},activation,fuse,dead_code")
    table = error_table(floats, lowered, TEXTS)
    assert error_table(floats, lowered, TEXTS, memory=0, scratch=tmp_path) == table
    assert not list(tmp_path.iterdir())
    with Workers(2) as workers:
        assert error_table(floats, lowered, TEXTS, workers=workers) == table


def test_programs_without_a_common_site_and_long_texts_are_refused(traced: Program) -> None:
    floats, lowered = lower(traced, "rtn")
    with pytest.raises(HikuiError, match="no linear site in common"):
        error_table(handmade(), lowered, [[1, 2, 3]])
    with pytest.raises(HikuiError, match="do not fit the cache of 64"):
        error_table(floats, lowered, [[1] * 65])


def test_the_shipped_recipe_on_its_text(prepared: Prepared) -> None:
    assert prepared.origin is not None
    assert is_float(prepared.origin)
    assert not is_float(prepared.program)
    table = error_table(prepared.origin, prepared.program, TEXTS)
    formats = {row.name: row.format for row in table.sites}
    assert formats.pop("lm_head") == "int8-g64"
    assert set(formats.values()) == {"int4-g128"}
    assert table.sites[-1].weight < 1e-3 < table.sites[0].weight

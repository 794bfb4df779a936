"""The order of a mixed matrix's columns: found by counting, stored and gathered with once."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import GROUP, SITE, STATISTICS, Program
from hikui.passes.graph import aten, float_sites, matrix_shape
from hikui.passes.quantise.columns import Orders, mixed_order, require_mixable
from tests.passes.helpers import calls, canonical, lower, program_of, random

N, K = 24, 96
FMT, WIDER = Format.parse("mixed-g32-c32"), Format.parse("mixed-g32-c64")


def tied(*weights: Tensor, mean_square: Tensor) -> Program:
    """Sites that read one activation, whose columns have these mean squares."""
    names = [f"{name}__weight" for name, _ in zip("abcd", weights, strict=False)]

    def body(x: Tensor, **held: Tensor) -> Tensor:
        return sum((F.linear(x, held[name])[..., :N] for name in names), torch.zeros(1))

    held = dict(zip(names, weights, strict=True))
    program = lower(program_of(body, embedding=random(N, K), **held), "canonicalise").clone()
    program.store.put("statistics/mean_square", mean_square)
    for node in float_sites(program):
        node.meta[STATISTICS] = {"mean_square": "statistics/mean_square"}
    return program


def counted(*weights: Tensor, mean_square: Tensor, columns: int) -> list[int]:
    """By definition, in Python's own numbers: what each column's weights and activation make of the outputs."""
    counts = [
        sum(float(value) ** 2 for weight in weights for value in weight[:, j]) * float(mean_square[j]) for j in range(K)
    ]
    ranked = sorted(range(K), key=lambda j: (-counts[j], j))
    return sorted(ranked[:columns]) + sorted(ranked[columns:])


@pytest.mark.parametrize("fmt", [FMT, WIDER])
def test_the_order_is_the_one_that_is_counted(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random(3 * N, K, seed=1) * 3, random(N, K, seed=2) * torch.linspace(0, 9, K)]
    mean_square = random(K, seed=3).square()
    program = tied(*weights, mean_square=mean_square)
    want = counted(*weights, mean_square=mean_square, columns=fmt.columns or 0)
    order = mixed_order(program, float_sites(program), fmt)
    assert order.dtype == torch.int32 and order.tolist() == want
    assert want != counted(weights[0], mean_square=mean_square, columns=fmt.columns or 0), "both sites count"
    # In parts, of which the two have unlike numbers, each row counts once as before.
    monkeypatch.setattr("hikui.passes.matrices.PART", 16 * K)
    assert torch.equal(mixed_order(program, float_sites(program), fmt), order)


def test_of_equal_columns_the_earlier_lead() -> None:
    weight = torch.ones(N, K)
    weight[:, 40:] *= 2  # 56 columns count four times as much as the others, all alike among themselves
    program = tied(weight, mean_square=torch.ones(K))
    assert mixed_order(program, float_sites(program), FMT).tolist() == [
        *range(40, 72), *range(40), *range(72, 96),
    ]  # fmt: skip
    assert mixed_order(program, float_sites(program), WIDER).tolist() == [
        *range(8), *range(40, 96), *range(8, 40),
    ]  # fmt: skip


def test_a_broken_matrix_is_named() -> None:
    weight = random(N, K)
    weight[1, 1] = torch.inf
    program = tied(weight, mean_square=torch.ones(K))
    with pytest.raises(HikuiError, match="Site a: 1 of 2304 values of 'a.weight' are NaN or infinite"):
        mixed_order(program, float_sites(program), FMT)


def test_sites_that_are_too_narrow_or_unmeasured_are_refused() -> None:
    program = tied(random(N, K), random(N, K, seed=1), mean_square=torch.ones(K))
    nodes = float_sites(program)
    require_mixable(nodes, FMT)
    require_mixable(nodes, Format.parse("mixed-g32-c96"))
    sentence = r"^Site a has 96 columns, fewer than the int4 ones of mixed-g64-c128; choose another format\.$"
    with pytest.raises(HikuiError, match=sentence):
        require_mixable(nodes, Format.parse("mixed-g64-c128"))
    del nodes[1].meta[STATISTICS]
    sentence = r"^Site b has no statistics to choose the int4 columns of mixed-g32-c32 by; run `calibrate` first\.$"
    with pytest.raises(HikuiError, match=sentence):
        require_mixable(nodes, FMT)
    with pytest.raises(HikuiError, match=sentence):
        mixed_order(program, nodes, FMT)
    require_mixable(nodes[:1], FMT)


def test_tied_sites_of_one_format_share_one_order_and_one_gather() -> None:
    weights = [random(N, K, seed=seed) for seed in (1, 2, 3, 4)]
    mean_square = random(K, seed=5).square()
    program = tied(*weights, mean_square=mean_square)
    nodes = float_sites(program)
    given = [FMT, Format("int8", 32), FMT, WIDER]
    orders = Orders(program, list(zip(nodes, given, strict=True)))
    first, wider = orders.gather(nodes[0], FMT), orders.gather(nodes[3], WIDER)
    again = orders.gather(nodes[2], FMT)
    assert again[0] is first[0] and torch.equal(again[1], first[1])
    assert calls(program, aten.index_select.default) == [first[0], wider[0]]
    # The order is that of the sites of the format alone, also before the second of them is asked for.
    assert first[1].dtype == torch.int64
    assert first[1].tolist() == counted(weights[0], weights[2], mean_square=mean_square, columns=32)
    assert wider[1].tolist() == counted(weights[3], mean_square=mean_square, columns=64)
    group = nodes[0].meta[GROUP]
    assert [key for key in program.store.keys() if ".order." in key] == [f"{group}.order.{fmt}" for fmt in (FMT, WIDER)]
    for (gather, order), fmt in ((first, FMT), (wider, WIDER)):
        x, dimension, held = gather.args
        assert (x, dimension) == (nodes[0].args[0], -1)
        assert isinstance(held, torch.fx.Node) and program.weight_of(held) == f"{group}.order.{fmt}"
        stored = program.store.load(program.weight_of(held))
        assert stored.dtype == torch.int32 and torch.equal(stored.long(), order)
        assert gather.meta["val"].shape[-1] == K


def test_a_gather_stands_before_its_first_reader() -> None:
    program = tied(random(N, K, seed=1), random(N, K, seed=2), mean_square=torch.ones(K))
    nodes = float_sites(program)
    gather, _ = Orders(program, [(node, FMT) for node in nodes]).gather(nodes[0], FMT)
    listed = list(program.graph.nodes)
    assert listed.index(gather) == listed.index(nodes[0]) - 1


def test_the_orders_of_another_run_have_names_of_their_own() -> None:
    program = tied(random(N, K, seed=1), mean_square=torch.ones(K))
    nodes = float_sites(program)
    for _ in range(3):
        Orders(program, [(nodes[0], FMT)]).gather(nodes[0], FMT)
    name = f"{nodes[0].meta[GROUP]}.order.{FMT}"
    assert [key for key in program.store.keys() if ".order." in key] == [name, f"{name}#2", f"{name}#3"]


def test_each_group_has_an_order_of_its_own() -> None:
    program = canonical("llama").clone()
    for node in float_sites(program):
        node.meta[STATISTICS] = {"mean_square": f"statistics/{node.meta[SITE]}"}
        program.store.put(f"statistics/{node.meta[SITE]}", torch.ones(matrix_shape(node)[1]))
    nodes = float_sites(program)
    orders = Orders(program, [(node, FMT) for node in nodes])
    gathers = {orders.gather(node, FMT)[0] for node in nodes}
    assert len(gathers) == len({node.meta[GROUP] for node in nodes})

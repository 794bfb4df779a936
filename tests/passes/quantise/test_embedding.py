"""embedding: what is looked up, from which matrix, and when a head's is not the embedding's."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import KINDS, Format
from hikui.lowering.ir import sizes
from hikui.lowering.ir.packed import PackedEmbedding, PackedLinear, is_packed
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import Embedding
from hikui.passes.graph import aten, hikui
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.passes.helpers import (
    assert_same,
    assert_settled,
    calibration,
    calls,
    canonical,
    lower,
    program_of,
    random,
    run,
)

N, K = 24, 40
TOKENS = torch.arange(N)[None, :15]


def tied(weight: Tensor) -> Program:
    """Tokens looked up in the very matrix that is their head."""
    program = program_of(lambda x, other: F.linear(x, other), embedding=weight, other=weight)
    table, other = program.weight_nodes()
    other.replace_all_uses_with(table)
    program.graph.erase_node(other)
    program.store.drop({"other"})
    program.recompile()
    return lower(program, "canonicalise")


@cache
def plain() -> Program:
    return tied(random(N, K))


def packed(program: Program) -> list[PackedEmbedding]:
    return [PackedEmbedding.of(node) for node in calls(program, hikui.embedding.default)]


def looked_up(program: Program) -> Tensor:
    """What the program's only table holds: float32 [rows, columns]."""
    (table,) = packed(program)
    return torch.cat(list(table.dense_rows(program.store)))


@pytest.mark.parametrize("name", [*(f"{kind}-g32" for kind in KINDS), "int8-channel", "float16", "float32"])
def test_a_table_of_its_own_is_rounded_to_its_format(name: str) -> None:
    program = program_of(
        lambda x, a__weight: F.linear(x, a__weight), embedding=random(N, K), a__weight=random(N, K, seed=1)
    )
    result = Embedding(format=name).run(program, PassContext())
    fmt = Format.parse(name)
    (table,) = packed(result.program)
    assert result.modified and table.format == fmt and (table.rows, table.columns) == (N, K)
    floats = random(N, K)
    want = dequantise(round_matrix(floats, fmt), fmt) if fmt.is_integer else floats.to(fmt.weight_dtype).float()
    assert torch.equal(looked_up(result.program), want)
    error = float((want - floats).double().norm() / floats.double().norm())
    assert result.notes == [f"embedding: looked up in {fmt}, relative error {error:.3g}"]
    got = run(result.program, TOKENS, decode=2)[0].double()
    due = want[TOKENS].double() @ random(N, K, seed=1).double().t()
    assert float((got - due).abs().max()) <= 1e-5 * float(due.abs().max())
    assert_settled(Embedding(format=name), result.program)
    Embedding().ensures(result.program)
    # The floats go with the next dead code.
    after = lower(result.program, "dead_code")
    assert "embedding" not in after.store.keys()
    assert table.weight.name in {node.name for node in after.weight_nodes()}


@pytest.mark.parametrize("name", ["int8-g64", "int4-g32", "sign-g32", "nf4-channel", "float16", "float32"])
@pytest.mark.parametrize("then", ["", ",activation,fuse"])
def test_a_tied_head_and_the_embedding_are_one_matrix(name: str, then: str) -> None:
    step = f"pack{{format={name}}}" if name.startswith("float") else f"rtn{{format={name}}}"
    program = lower(plain(), f"{step}{then}")
    result = Embedding().run(program, PassContext())
    (table,), (head,) = packed(result.program), [node for node in result.program.graph.nodes if is_packed(node)]
    product = PackedLinear.of(head)
    assert table.weight is product.weight and table.scale is product.scale and str(table.format) == name
    assert f"looked up in {name}, the matrix of " in result.notes[0]
    out = lower(result.program, "dead_code")
    assert len(out.weight_nodes()) == (1 if product.scale is None else 2)
    assert torch.equal(looked_up(out), product.dense(program.store))
    measured = sizes.measure(out)
    assert measured.total_bytes == Format.parse(name).nbytes(N, K)
    assert measured.parameters == N * K
    assert measured.all_bpw == pytest.approx(measured.true_bpw)


def test_share_can_be_declined() -> None:
    out = lower(plain(), "rtn{format=int4-g32},embedding{share=false},dead_code")
    (table,) = packed(out)
    assert str(table.format) == "int8-channel"
    assert sizes.measure(out).total_bytes == sum(Format.parse(f).nbytes(N, K) for f in ("int4-g32", "int8-channel"))


def test_columns_in_another_order_are_not_shared() -> None:
    out = lower(tied(random(N, 96)), "calibrate,mixed{group=32,share=0.5},rtn,embedding", calibration(plain()))
    assert [str(table.format) for table in packed(out)] == ["int8-channel"]


def test_a_head_with_a_branch_is_not_shared() -> None:
    for then in ("", ",pack{format=float16},activation,fuse"):
        pipeline = f"calibrate{{gram=true}},rtn{{group=32}},sub_branch{{rank=2}}{then or ',pack{format=float16}'}"
        out = lower(plain(), f"{pipeline},embedding", calibration(plain()))
        assert [str(table.format) for table in packed(out)] == ["int8-channel"]


def test_a_corrected_head_is_not_shared() -> None:
    data = calibration(plain())
    for mark, name in (("qep,", "int8-channel"), ("", "int4-g32")):
        out = lower(plain(), f"{mark}rtn{{group=32}},embedding", data)
        assert [str(table.format) for table in packed(out)] == [name]


def test_a_transformed_head_is_not_shared() -> None:
    program = canonical("qwen2")
    data = calibration(program)
    for transform in ("rotate", "calibrate,smooth"):
        floats = lower(program, transform, data)
        out = lower(floats, "rtn{bits=8},pack,embedding")
        for table in packed(out):
            key = table.weight.meta["hikui.weight"].rpartition(".")[0]
            rows = torch.cat(list(table.dense_rows(out.store)))
            source = floats.store.load(key.removesuffix(".scale")).float()
            assert float((rows - source).norm() / source.norm()) < 0.02, "it stands for its own floats"
        assert_same(floats, lower(floats, "embedding{share=false}"), 0.05)


def test_positions_are_packed_too() -> None:
    program = canonical("opt")
    tables = len(calls(program, aten.embedding.default))
    assert tables == 2
    out = lower(program, "rtn{bits=8},pack,embedding,dead_code")
    assert len(packed(out)) == tables and not calls(out, aten.embedding.default)
    assert_same(program, out, 0.1)


def test_nothing_to_do() -> None:
    done = lower(plain(), "pack,embedding")
    result = Embedding().run(done, PassContext())
    assert not result.modified and result.program is done


def test_before_the_head_is_packed_it_is_refused() -> None:
    with pytest.raises(
        HikuiError, match=r"still multiplies 'embedding' as floats, .* put `embedding` after the passes"
    ):
        lower(plain(), "embedding")
    lower(plain(), "embedding{share=false}")


def test_rotate_after_it_is_refused() -> None:
    out = lower(canonical("llama"), "embedding{share=false}")
    with pytest.raises(HikuiError, match="looks tokens up in a packed matrix, which stays as it is; rotate takes unqu"):
        lower(out, "rotate")


def test_broken_values_are_named() -> None:
    weight = random(N, K)
    weight[3, 4] = torch.nan
    program = program_of(lambda x, a: F.linear(x, a), embedding=weight, a=random(N, K, seed=1))
    with pytest.raises(HikuiError, match="1 of 960 values of 'embedding' are NaN or infinite"):
        Embedding().run(program, PassContext())


@pytest.mark.parametrize(
    ("factor", "name", "error"),
    [
        (1e8, "int8-channel", r"^Embedding embedding: a scale of .* is beyond float16; take format=float32\.$"),
        (1e6, "float16", r"^Embedding embedding: its values are beyond float16; take format=float32\.$"),
        (
            1e-7,
            "int8-channel",
            r"^Embedding embedding: its weights are so small .*; let `embedding` take format=float32\.$",
        ),
    ],
)
def test_what_a_format_does_not_hold_is_refused(factor: float, name: str, error: str) -> None:
    program = program_of(lambda x, a: F.linear(x, a), embedding=random(N, K) * factor, a=random(N, K, seed=1))
    with pytest.raises(HikuiError, match=error):
        Embedding(format=name).run(program, PassContext())
    Embedding(format="float32").run(program, PassContext())


def test_mixed_is_refused() -> None:
    with pytest.raises(UsageError, match="embedding cannot store rows as mixed-g32-c32"):
        Embedding(format="mixed-g32-c32")


def test_what_is_left_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^Node embedding still looks up rows of an unpacked matrix\.$"):
        Embedding().ensures(plain())


def test_the_site_keeps_its_name() -> None:
    out = lower(plain(), "rtn{bits=8},embedding")
    assert [node.meta[SITE] for node in out.graph.nodes if is_packed(node)]

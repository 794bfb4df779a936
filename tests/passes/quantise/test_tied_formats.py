"""Tied sites of several formats: each is rounded as if it stood alone with what the group reads.

The sites of a group share what is measured, and the last of them may use its Gram matrix up; those of a mixed format
see their columns in another order. Here every site is rounded on its own, from evidence that is measured anew.
"""

import pytest
import torch
from torch import Tensor, fx

from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.formats import pack
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import CORRECTION, GROUP, SITE, Program
from hikui.passes import Gptq
from hikui.passes.graph import blocks, float_sites, groups, sites, weight_of
from hikui.passes.measure import footprint
from hikui.passes.measure.evidence import OwnEvidence, Sums
from hikui.passes.quantise import walk
from hikui.passes.quantise.correction import correct
from hikui.passes.quantise.packer import column_key, preparations
from tests.passes.helpers import calibration, canonical, lower

BEFORE = "override{sites=q_proj,format=int8-g32},calibrate,mixed{group=32}"


def matrices(program: Program, out: Program, *, correcting: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every site what it is to be rounded from: (float32 [n, k], E[x·xᵀ] float64 [k, k]), columns in their order.

    Args:
        program: with the float matrices.
        out: the same, rounded; what a group reads there is what it read when it was rounded.
        correcting: take the matrices that `qep` asks for.
    """
    texts = calibration(program).chunks
    counterparts = {node.meta[SITE]: node for node in sites(program)}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Workers(1) as workers, Stream(program, texts, workers) as exact, Stream(out, texts, workers) as rounded:
        for tied in groups(sites(out)).values():
            names = [node.meta[SITE] for node in tied]
            floats = [counterparts[name] for name in names]
            # In front of the first site, and of the gather of its columns.
            first = min((_before_gather(node) for node in tied), key=list(out.graph.nodes).index)
            source = floats[0].args[0]
            assert isinstance(source, fx.Node)
            sums: list[Sums] = []

            def observe(
                number: int, args: tuple[object, ...], _: object, sums: list[Sums] = sums, source: fx.Node = source
            ) -> None:
                x = args[0]
                assert isinstance(x, Tensor)
                if not sums:
                    sums.append(Sums(x.shape[-1], {"gram"}, workers, cross=correcting))
                sums[0].add(x, exact.value(number, source) if correcting else None)

            exact.advance(floats[0])
            rounded.advance(first, {first: observe})
            gram = sums[0].evidence().take_gram()
            weights = {name: program.store.load(program.weight_of(weight_of(counterparts[name]))) for name in names}
            if correcting:
                assert all(CORRECTION in node.meta for node in floats)
                weights = correct(program, floats, gram.clone(), sums[0].cross(), workers)
            found |= {name: (weights[name], gram) for name in names}
    return found


def _before_gather(node: fx.Node) -> fx.Node:
    packed = PackedLinear.of(node)
    return node if packed.order is None else packed.source


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("correction", ["", ",qep{alpha=0.5}"])
def test_each_site_is_rounded_as_if_it_stood_alone(correction: str, act_order: bool) -> None:
    whole = canonical("llama")
    program = lower(whole, BEFORE + correction, calibration(whole))
    step = Gptq(act_order=act_order)
    out = lower(program, f"gptq{{act_order={str(act_order).lower()}}}", calibration(whole))
    formats = {node.meta[SITE]: str(PackedLinear.of(node).format) for node in sites(out)}
    mixed = {name for name, fmt in formats.items() if fmt == "mixed-g32-c32"}
    assert {name for name in formats if "q_proj" in name} == {
        name for name, fmt in formats.items() if fmt == "int8-g32"
    }
    assert len(mixed) == len(formats) - 3
    due = matrices(program, out, correcting=bool(correction))
    for node in sites(out):
        packed = PackedLinear.of(node)
        weight, gram = due[node.meta[SITE]]
        order = packed.column_order(out.store)
        assert (order is None) == (not packed.format.is_mixed)
        if order is not None:
            weight, gram = weight[:, order], gram[order][:, order]
        with Workers(1) as workers:
            prepared = step.prepare(OwnEvidence(gram=gram.clone()), workers, packed.format)
            rounded = step.quantise(weight, packed.format, prepared)
        want = pack(packed.format, rounded.codes, rounded.scale)
        assert packed.scale is not None and want.scale is not None
        assert torch.equal(out.store.load(out.weight_of(packed.weight)), want.weight), node.meta[SITE]
        assert torch.equal(out.store.load(out.weight_of(packed.scale)), want.scale), node.meta[SITE]


@pytest.mark.parametrize("first", ["q", "k", "v"])
def test_the_place_of_the_plain_site_does_not_matter(first: str) -> None:
    """In the first block nothing has been rounded before: a plain site gets the bytes that it gets alone."""
    whole, name = canonical("llama"), f"model.layers.0.self_attn.{first}_proj"
    out = lower(whole, BEFORE.replace("q_proj", f"{first}_proj") + ",gptq", calibration(whole))
    alone = lower(whole, f"gptq{{format=int8-g32,sites={name}}}", calibration(whole))
    for suffix in ("", ".scale"):
        key = f"{name}.weight.int8-g32{suffix}"
        assert torch.equal(out.store.load(key), alone.store.load(key))


def given(program: Program, formats: dict[str, str]) -> list[fx.Node]:
    """q, k and v of the first block with formats of their own."""
    pipeline = ",".join(
        f"override{{sites=layers.0.self_attn.{name}_proj,format={fmt}}}" for name, fmt in formats.items()
    )
    return next(iter(groups(float_sites(lower(program, pipeline))).values()))


@pytest.mark.parametrize(
    ("formats", "held"),
    [
        # All see the columns in their own order: the Gram matrix itself is used up.
        (("int8-g32", "int4-g64", "sign-channel"), 0),
        (("int8-g32", "float16", "int8-g32"), 0),
        (("float16", "float32", "float16"), 0),
        # A mixed format takes a permuted matrix beside the shared one, or in its place while it is made.
        (("mixed-g32-c32", "mixed-g32-c32", "mixed-g32-c32"), 1),
        (("mixed-g32-c32", "float16", "float16"), 1),
        (("int8-g32", "mixed-g32-c32", "mixed-g32-c32"), 2),
        (("mixed-g32-c32", "mixed-g64-c64", "float16"), 2),
        (("mixed-g32-c32", "mixed-g64-c64", "int4-g32"), 3),
    ],
)
def test_matrices_that_tied_sites_hold_at_once(
    formats: tuple[str, ...], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = given(canonical("llama"), dict(zip("qkv", formats, strict=True)))
    assert len(tied) == 3 and len({node.meta[GROUP] for node in tied}) == 1
    assert preparations(Gptq(), tied) == held


def test_the_key_of_an_order_of_columns() -> None:
    from hikui.lowering.formats import Format

    assert column_key(Format("float16")) is None
    assert column_key(Format("int8", 32)) == column_key(Format("sign")) == ""
    assert column_key(Format.parse("mixed-g32-c32")) == "mixed-g32-c32"


@pytest.mark.parametrize(
    ("pipeline", "spare", "matrices_", "streams", "corrected"),
    [
        # act_order takes a copy in another order, and the group of both formats holds two more.
        (f"{BEFORE},gptq", 1 + 2, 1, 1, False),
        (f"{BEFORE},gptq{{act_order=false}}", 2, 1, 1, False),
        (f"{BEFORE},qep,gptq{{act_order=false}}", 2, 2, 2, True),
        ("gptq", 1, 1, 1, False),
        ("gptq{inputs=float}", 1, 1, 1, False),
    ],
)
def test_the_walk_asks_for_the_most_that_a_group_holds(
    pipeline: str, spare: int, matrices_: int, streams: int, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def recorded(*args: object, **options: object) -> footprint.Footprint:
        asked.append(options)
        return footprint.estimate(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(walk, "estimate", recorded)
    whole = canonical("llama")
    lower(whole, pipeline, calibration(whole))
    (found,) = asked
    found.pop("workers")
    assert found == {"streams": streams, "matrices": matrices_, "spare": spare, "corrected": corrected}


def test_groups_come_block_by_block() -> None:
    names = [
        [[node.meta[SITE].split(".")[-1] for node in tied] for tied in block]
        for block in blocks(sites(canonical("llama")))
    ]
    inner = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == [inner, inner, inner, [["lm_head"]]]

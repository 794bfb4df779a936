"""kv_cache: what it leaves in the graph, how far it goes from the float cache, and how `fuse` takes it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from hikui.lowering import formats
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.models.synthetic import FAMILIES
from hikui.passes import Fuse, KvCache
from hikui.passes.graph import aten, hikui, is_call
from tests.passes.helpers import assert_same, assert_settled, calibration, calls, canonical, check, lower, run

COLUMNS = "kv_cache{bits=4,keys=channel,values=channel}"


def cached(pipeline: str, family: str = "llama") -> Program:
    return lower(canonical(family), pipeline, calibration(canonical(family)))


def test_text_of_eight_bits() -> None:
    check(
        cached("kv_cache"),
        """
        // CHECK: %key_cache_0 = input : i8[1, 2, 64, 8]
        // CHECK-NEXT: %value_cache_0 = input : i8[1, 2, 64, 8]
        // CHECK-NEXT: %key_scale_0 = input : f16[1, 2, 64]
        // CHECK-NEXT: %value_scale_0 = input : f16[1, 2, 64]
        // CHECK-NEXT: %key_cache_1 = input : i8[1, 2, 64, 8]
        // CHECK: %[[K:.*]] = hikui.cache_update_quantized(%key_cache_0, %key_scale_0, %{{.*}}, %past)
        // CHECK-NEXT: %[[READ:.*]] = getitem(%[[K]], 0) : f32[1, 2, 64, 8]
        // CHECK-NEXT: %[[CODES:.*]] = getitem(%[[K]], 1) : i8[1, 2, 64, 8]
        // CHECK-NEXT: %[[SCALE:.*]] = getitem(%[[K]], 2) : f16[1, 2, 64]
        // CHECK: hikui.cache_update_quantized(%value_cache_0, %value_scale_0, %{{.*}}, %past)
        // CHECK-NOT: hikui.cache_update(
        // CHECK: return %{{.*}}, %[[CODES]], %{{.*}}, %[[SCALE]],
        """,
    )


def test_text_of_four_bits_by_column() -> None:
    check(
        cached(COLUMNS),
        """
        // CHECK: %[[MEAN:.*]] = weight "key_cache_0.centre" : f32[1, 2, 1, 8]
        // CHECK: %[[STEP:.*]] = weight "key_cache_0.step" : f32[1, 2, 1, 8]
        // CHECK: %key_cache_0 = input : u8[1, 2, 64, 4]
        // CHECK: %[[AWAY:.*]] = aten.sub.Tensor(%{{.*}}, %[[MEAN]])
        // CHECK-NEXT: %[[EVEN:.*]] = aten.div.Tensor(%[[AWAY]], %[[STEP]])
        // CHECK-NEXT: %[[K:.*]] = hikui.cache_update_quantized(%key_cache_0, %key_scale_0, %[[EVEN]], %past)
        // CHECK-NEXT: %[[READ:.*]] = getitem(%[[K]], 0)
        // CHECK: %[[WIDE:.*]] = aten.mul.Tensor(%[[READ]], %[[STEP]])
        // CHECK-NEXT: aten.add.Tensor(%[[WIDE]], %[[MEAN]])
        """,
    )


def test_text_fused() -> None:
    """The keys' step goes to the queries, repeated for the heads that share them, and their centre goes away."""
    check(
        cached(f"{COLUMNS},fuse,dead_code"),
        """
        // CHECK-NOT: "key_cache_0.step" :
        // CHECK: %[[MEAN:.*]] = weight "key_cache_0.centre"
        // CHECK: %[[STEP:.*]] = weight "key_cache_0.step" : f32[1, 2, 1, 8]
        // CHECK: %[[WIDE:.*]] = weight "key_cache_0.step.queries" : f32[1, 6, 1, 8]
        // CHECK: %[[Q:.*]] = aten.mul.Tensor(%{{.*}}, %[[WIDE]])
        // CHECK-NEXT: hikui.attention_quantized(%[[Q]], %{{.*}}, %{{.*}}, %key_cache_0, %value_cache_0,
        // CHECK-SAME: %key_scale_0, %value_scale_0, %past,
        """,
    )


def logits(program: Program) -> Tensor:
    return run(program)[0]


def distance(program: Program, float_program: Program) -> float:
    want = logits(float_program)
    return float((logits(program) - want).norm() / want.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pipeline", "most"), [("kv_cache", 0.02), ("kv_cache{bits=4}", 0.3), (COLUMNS, 0.3)])
def test_every_family_stays_near_the_float_cache(family: str, pipeline: str, most: float) -> None:
    plain = cached(pipeline, family)
    verify(plain)
    assert 0 < distance(plain, canonical(family)) < most
    fused = lower(plain, "fuse,dead_code")
    verify(fused)
    written_out = family == "bloom"
    assert len(calls(fused, hikui.attention_quantized.default)) == (0 if written_out else len(fused.config.caches))
    assert len(calls(fused, hikui.cache_update_quantized.default)) == (2 * len(fused.config.caches) * written_out)
    a, b = logits(plain), logits(fused)
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_what_is_read_is_what_was_quantised() -> None:
    """Against the formats' own functions on the float keys, for a prompt and the steps after it."""
    before, after = canonical("llama"), cached("kv_cache{bits=4}")
    tokens = torch.randint(0, 24, (1, 9), generator=torch.Generator().manual_seed(1))
    keys: list[Tensor] = []

    def observe(node: fx.Node, args: tuple[object, ...], result: object) -> None:
        if is_call(node, hikui.cache_update.default) and not keys:
            assert isinstance(args[1], Tensor)
            keys.append(args[1])

    runs = Interpreter(before, observe=observe)
    runs.run(tokens, 0, runs.new_caches())
    codes, scale = formats.quantize_cache(keys[0], "int4")
    interpreter = Interpreter(after)
    caches = interpreter.new_caches()
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        _, caches = interpreter.run(tokens[:, start:stop], start, caches)
    assert torch.equal(caches[0][:, :, :9], codes)
    assert torch.equal(caches[2][:, :, :9], scale)
    assert not bool(caches[0][:, :, 9:].any())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_columns_against_float64(family: str) -> None:
    program = canonical(family)
    data = Calibration((*calibration(program).chunks, torch.tensor([[1, 2, 3]])))
    seen: dict[str, list[Tensor]] = {}

    def observe(node: fx.Node, args: tuple[object, ...], result: object) -> None:
        if is_call(node, hikui.cache_update.default):
            assert isinstance(args[1], Tensor)
            seen.setdefault(str(node.args[0]), []).append(args[1].double())

    for chunk in data.chunks:
        interpreter = Interpreter(program, observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    out = lower(program, COLUMNS, data)
    for name, pieces in seen.items():
        x = torch.cat(pieces, 2)
        mean = x.mean(2, keepdim=True)
        step = (x - mean).abs().amax(2, keepdim=True).sqrt()
        torch.testing.assert_close(out.store.load(f"{name}.centre").double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.store.load(f"{name}.step").double(), step, rtol=1e-5, atol=1e-6)
    keys_only = lower(program, "kv_cache{bits=4,keys=channel}", data)
    assert {key for key in keys_only.store.keys() if key.endswith(".step")} == {
        f"{name}.step" for name in seen if name.startswith("key")
    }


def test_large_columns_of_keys_cost_little_when_they_are_known() -> None:
    """One column of each head's keys made 16 times as large, and shifted, with the queries' as much smaller."""
    program = canonical("opt").clone()
    for node in calls(program, aten.linear.default):
        role = next((name for name in ("k_proj", "q_proj") if name in str(node.meta["hikui.site"])), None)
        if role is None:
            continue
        factor = torch.ones(48)
        factor[3::12] = 16.0 if role == "k_proj" else 1 / 16
        shift = torch.zeros(48)
        shift[5::12] = 6.0 if role == "k_proj" else 0.0
        weight, bias = node.args[1:]
        assert isinstance(weight, fx.Node) and isinstance(bias, fx.Node)
        stored = {operand: program.store.load(program.weight_of(operand)) for operand in (weight, bias)}
        skewed = {weight: stored[weight] * factor[:, None], bias: stored[bias] * factor + shift}
        for operand, tensor in skewed.items():
            node.replace_input_with(operand, program.add_weight(f"{program.weight_of(operand)}.skewed", tensor))
    program.recompile()
    torch.testing.assert_close(logits(program), logits(canonical("opt")), rtol=1e-4, atol=1e-4)
    data = calibration(program)
    token, channel = (
        distance(lower(program, f"kv_cache{{bits=4,keys={keys}}}", data), program) for keys in ("token", "channel")
    )
    assert channel < 0.5 * token


def test_bytes_are_counted() -> None:
    context = 64
    program, layers = canonical("llama"), 3
    assert program.config.cache_bytes == layers * 2 * 2 * context * 8 * 4
    assert cached("kv_cache").config.cache_bytes == layers * 2 * 2 * context * (8 + 2)
    four = KvCache(bits=4).run(program, PassContext())
    assert four.program.config.cache_bytes == layers * 2 * 2 * context * (4 + 2)
    assert four.notes == [f"caches: {four.program.config.cache_bytes} bytes, {program.config.cache_bytes} in float32"]
    assert four.program.config.cache_format == "int4"
    assert program.config.cache_format == "float32"


@pytest.mark.parametrize("options", ["", "{bits=4,keys=channel,values=channel}"])
def test_same_bytes_again_and_nothing_more_the_second_time(options: str) -> None:
    one, two = (cached(f"kv_cache{options}") for _ in range(2))
    assert to_text(one) == to_text(two)
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), two.store.load(key))
    assert_settled(KvCache(bits=4 if options else 8), one)
    assert_settled(Fuse(), lower(one, "fuse"))


def test_a_float_cache_is_left_as_it_was() -> None:
    before = to_text(canonical("llama"))
    cached(COLUMNS)
    assert to_text(canonical("llama")) == before
    assert_same(canonical("llama"), lower(canonical("llama"), "fuse"))


def broken(edit: Callable[[Program], None], pipeline: str = "kv_cache") -> Program:
    out = cached(pipeline).clone()
    edit(out)
    out.recompile()
    return out


def test_what_it_cannot_do_it_says() -> None:
    with pytest.raises(UsageError, match="cannot store 3 bits"):
        KvCache(bits=3)
    with pytest.raises(UsageError, match="no keys='row'"):
        KvCache(keys="row")  # type: ignore[arg-type]
    with pytest.raises(HikuiError, match="put kv_cache before fuse"):
        lower(canonical("llama"), "fuse,kv_cache")
    with pytest.raises(HikuiError, match="is int8 already"):
        lower(canonical("llama"), "kv_cache,kv_cache{bits=4}")
    with pytest.raises(HikuiError, match="measures columns of keys or values on real text"):
        lower(canonical("llama"), "kv_cache{keys=channel}")

    def odd(work: Program) -> None:
        work.config = replace(work.config, caches=(CacheShape(2, 7), *work.config.caches[1:]))

    with pytest.raises(HikuiError, match="heads of 7 columns"):
        program = canonical("llama").clone()
        odd(program)
        KvCache(bits=4).requires(program)

    def read_before(work: Program) -> None:
        update = calls(work, hikui.cache_update.default)[0]
        with work.graph.inserting_before(update):
            work.graph.call_function(aten.add.Tensor, (update.args[0], 1.0))

    with pytest.raises(HikuiError, match="read by other nodes"):
        lower(broken(read_before, "dead_code"), "kv_cache")


def test_whether_it_needs_text_is_known_beforehand() -> None:
    assert not KvCache(bits=4).calibrates
    assert KvCache(keys="channel").calibrates
    assert KvCache(values="channel").calibrates


def test_a_broken_promise_and_a_broken_program_are_found() -> None:
    with pytest.raises(VerificationError, match="layer 0 stayed float32"):
        KvCache().ensures(canonical("llama"))
    program = cached("kv_cache").clone()
    program.config = replace(program.config, caches=canonical("llama").config.caches)
    with pytest.raises(VerificationError, match="inputs; tokens, past and 6 caches are due"):
        verify(program)
    program.config = replace(program.config, caches=tuple(CacheShape(2, 8, "int4") for _ in range(3)))
    with pytest.raises(VerificationError, match="key_cache_0 is torch.int8"):
        verify(program)


def test_attention_near_misses_of_quantised_caches_say_why() -> None:
    sdpa = aten.scaled_dot_product_attention.default

    def read_by_two(work: Program) -> None:
        call = calls(work, hikui.cache_update_quantized.default)[0]
        read = next(user for user in call.users if user.args[1] == 0)
        logit, *rest = work.outputs()
        with work.graph.inserting_before(work.output_node):
            tail = work.graph.call_function(aten.mean.default, (read,))
            work.output_node.args = ((work.graph.call_function(aten.add.Tensor, (logit, tail)), *rest),)

    def shifted_by_an_activation(work: Program) -> None:
        node = calls(work, sdpa)[0]
        with work.graph.inserting_before(node):
            keys = work.graph.call_function(aten.add.Tensor, (node.args[1], node.args[1]))
        node.args = (node.args[0], keys, *node.args[2:])

    for edit, reason in ((read_by_two, "is read by 2 calls"), (shifted_by_an_activation, "not an updated cache")):
        program = broken(edit)
        result = Fuse().run(program, PassContext())
        assert len(calls(result.program, hikui.attention_quantized.default)) == 2
        assert any("attention: not fused" in note and reason in note for note in result.notes), result.notes
        torch.testing.assert_close(logits(result.program), logits(program), rtol=1e-5, atol=1e-5)

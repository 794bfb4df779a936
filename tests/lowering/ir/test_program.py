"""Program, store, verifier, printer, interpreter on a program written by hand."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.ir.interpreter import Interpreter, ReferenceRunner
from hikui.lowering.ir.printer import diff, to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import FileTensor, MemoryTensor, WeightStore
from hikui.lowering.ir.verifier import verify
from hikui.lowering.trace import trace
from hikui.models.synthetic import tiny_model
from hikui.passes.graph import block_segments
from tests.lowering import handmade

TOKENS = torch.randint(0, handmade.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(name="program")
def _program() -> Program:
    return handmade.program()


def logits(program: Program, *lengths: int) -> torch.Tensor:
    """Logits of TOKENS fed in pieces of the given lengths."""
    interpreter = Interpreter(program)
    caches, past, out = interpreter.new_caches(), 0, []
    for length in lengths:
        piece, caches = interpreter.run(TOKENS[:, past : past + length], past, caches)
        out.append(piece)
        past += length
    return torch.cat(out, 1)


def test_decode_and_chunks_equal_prefill(program: Program) -> None:
    whole = logits(program, 9)
    torch.testing.assert_close(logits(program, *[1] * 9), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(program, 4, 5), whole, rtol=1e-5, atol=1e-6)


def test_a_runner_frees_each_cache_where_it_is_last_read() -> None:
    program = trace(tiny_model("llama"))
    runner = ReferenceRunner(program)
    runner.forward(TOKENS[0, :4].numpy(), 0)
    held = [weakref.ref(cache) for cache in runner._caches]
    alive: list[int] = []
    runner._interpreter._observe = lambda *_: alive.append(sum(cache() is not None for cache in held))
    runner.forward(TOKENS[0, 4:5].numpy(), 4)
    layers = len(program.config.caches)
    assert alive[0] == len(held) and alive[-1] == 0
    # A layer's two die before the next layer begins, so there are places where all but its own are gone.
    assert {2 * layer for layer in range(layers)} <= set(alive)


def test_a_clone_is_equal_and_apart(program: Program) -> None:
    before, clone = to_text(program), program.clone()
    assert to_text(clone) == before
    clone.add_weight("extra", torch.ones(3, 2))
    verify(clone)
    assert 'weight "extra" : f32[3, 2]' in to_text(clone)
    assert to_text(program) == before and "extra" not in program.store
    assert clone.remove_unused_weights() == ["extra"]
    assert to_text(clone) == before


def test_exported_program_computes_the_same(program: Program) -> None:
    module = program.to_exported_program().module()
    weights = [program.store.load(program.weight_of(node)) for node in program.weight_nodes()]
    for length in (1, 9, handmade.CONTEXT):
        tokens = torch.arange(length)[None] % handmade.VOCABULARY
        caches = Interpreter(program).new_caches()
        want, _ = Interpreter(program).run(tokens, 0, caches)
        got = module(*weights, tokens, torch.tensor([0]), *caches)[0]
        if length == handmade.CONTEXT:
            assert torch.equal(got, want)
        else:
            # The interpreter leaves out keys that nobody sees, so its sums of the others go in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_propagate_restores_metadata(program: Program) -> None:
    clone = program.clone()
    for node in clone.graph.nodes:
        if node.op == "call_function":
            del node.meta["val"]
    with pytest.raises(VerificationError, match="no meta"):
        verify(clone)
    clone.recompile()
    assert to_text(clone) == to_text(program)


def test_propagate_leaves_the_range_of_t() -> None:
    """Broadcasting over T must not narrow it to what is not 1: decoding runs with T = 1."""
    program = trace(tiny_model("gpt2"))
    program.propagate(everything=True)
    (ranged,) = program.to_exported_program().range_constraints.values()
    assert (ranged.lower, ranged.upper) == (1, program.config.context_length)


def test_segments_hold_every_call_once_in_order(program: Program) -> None:
    segments = block_segments(program)
    assert [len(segment) > 0 for segment in segments] == [True, True]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [node for segment in segments for node in segment] == calls


def test_runner_keeps_its_cache(program: Program) -> None:
    runner = ReferenceRunner(program)
    tokens = TOKENS[0].numpy()
    first, second = runner.forward(tokens[:6], 0), runner.forward(tokens[6:], 6)
    torch.testing.assert_close(torch.from_numpy(second), logits(program, 9)[0, 6:], rtol=1e-5, atol=1e-6)
    runner.reset()
    assert (runner.forward(tokens[:6], 0) == first).all()


def test_too_long_a_prompt_is_refused(program: Program) -> None:
    with pytest.raises(HikuiError, match="20 tokens do not fit the cache of 16"):
        Interpreter(program).run(torch.zeros(1, 20, dtype=torch.int64), 0, [])


def _missing_tensor(program: Program) -> None:
    program.store.drop(["q.weight"])


def _wrong_shape(program: Program) -> None:
    program.store.put("q.weight", torch.ones(3))


def _lost_cache(program: Program) -> None:
    program.output_node.args = (tuple(program.outputs()[:2]),)


def _late_weight(program: Program) -> None:
    program.graph.output_node().prepend(next(iter(program.graph.nodes)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_missing_tensor, "does not have"), (_wrong_shape, "but 'q.weight' is"), (_lost_cache, "tuple of 3"),
     (_late_weight, "malformed|after an input")],
)  # fmt: skip
def test_verifier_names_what_is_broken(program: Program, damage: Callable[[Program], None], message: str) -> None:
    verify(program)
    damage(program)
    with pytest.raises(VerificationError, match=message):
        verify(program)


def test_text_is_stable_and_diffs(program: Program) -> None:
    text = to_text(program)
    assert to_text(handmade.program()) == text
    assert "%tokens = input : i64[1, T]" in text
    assert "hikui.causal_mask" in text and "return %linear_3, %cache_update, %cache_update_1" in text
    assert diff(text, text, "x") == ""
    assert diff(text, text.replace("aten.add", "aten.sub"), "x").count("\n+ ") == 1


def test_a_scratch_store_keeps_tensors_in_files(tmp_path: Path) -> None:
    store = WeightStore({}, tmp_path / "scratch")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int8), "c": torch.randn(2).half()}
    for key, tensor in tensors.items():
        store.put(key, tensor)
    fork = store.fork()
    fork.put("a", torch.zeros(1))
    for key, tensor in tensors.items():
        assert isinstance(store.source(key), FileTensor)
        assert torch.equal(store.load(key), tensor) and store.info(key).dtype == tensor.dtype
    assert fork.load("a").shape == (1,)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    file.write_bytes(b"\0" * 10)
    with pytest.raises(HikuiError, match=r"w\.bin ends inside a tensor: 6 bytes are missing"):
        FileTensor(file, 0, torch.float32, (4,)).load()
    with pytest.raises(HikuiError, match="cannot be read"):
        FileTensor(tmp_path / "absent", 0, torch.float32, (4,)).load()


def test_checkpoint_tensors_are_widened(tmp_path: Path) -> None:
    file, tensor = tmp_path / "w.bin", torch.randn(6).bfloat16()
    file.write_bytes(b"x" * 3 + tensor.view(torch.uint8).numpy().tobytes())
    source = FileTensor(file, 3, torch.bfloat16, (2, 3), widen=True)
    assert source.info.dtype == torch.float32
    assert torch.equal(source.load(), tensor.float().view(2, 3))


def test_rows_of_a_file_are_read_alone(tmp_path: Path) -> None:
    file, tensor = tmp_path / "w.bin", torch.randn(7, 3).half()
    file.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    store = WeightStore({"w": FileTensor(file, 0, torch.float16, (7, 3), widen=True)})
    store.alias("kept", MemoryTensor(tensor))
    assert torch.equal(store.load_rows("w", 2, 5), tensor[2:5].float())
    assert torch.equal(store.load_rows("kept", 2, 5), tensor[2:5])
    file.write_bytes(file.read_bytes()[:18])
    assert torch.equal(store.load_rows("w", 0, 3), tensor[:3].float()), "what lies behind the rows does not matter"


def test_a_large_tensor_is_widened_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hikui.lowering.ir.store._PART", 8)
    file, tensor = tmp_path / "w.bin", torch.randn(11, 3).bfloat16()
    file.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    assert torch.equal(FileTensor(file, 0, torch.bfloat16, (11, 3), widen=True).load(), tensor.float())

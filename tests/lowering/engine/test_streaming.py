"""Streams: the same values as the interpreter's, wherever they are cut, kept or continued."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import FLOAT_WEIGHT, Program
from hikui.passes.graph import sites
from tests.passes.helpers import calibration, canonical, lower

Seen = dict[tuple[int, str], Tensor]


def texts(program: Program) -> list[Tensor]:
    return [*calibration(program).chunks, torch.tensor([[1, 2, 3]]), torch.tensor([[4]])]


def interpreted(program: Program) -> Seen:
    """What every site reads and gives, by one independent run a text."""
    seen: Seen = {}
    for number, text in enumerate(texts(program)):

        def observe(node: fx.Node, args: tuple[object, ...], result: object, number: int = number) -> None:
            if "hikui.site" in node.meta:
                assert isinstance(args[0], Tensor) and isinstance(result, Tensor)
                seen[number, node.name] = args[0]
                seen[number, f"{node.name}()"] = result

        interpreter = Interpreter(program, observe=observe)
        interpreter.run(text, 0, interpreter.new_caches())
    return seen


def streamed(
    program: Program, workers: int = 1, memory: int = 1 << 30, stop_at: int | None = None, kept: Path | None = None
) -> Seen:
    """The same from a stream that is advanced site by site; at one of them it is saved and another one goes on."""
    seen: Seen = {}

    def reads(name: str) -> object:
        def watch(number: int, args: tuple[object, ...], result: object) -> None:
            assert isinstance(args[0], Tensor)
            assert (number, name) not in seen or torch.equal(seen[number, name], args[0])
            seen[number, name] = args[0]
            if isinstance(result, Tensor):
                seen[number, f"{name}()"] = result

        return watch

    with Workers(workers) as pool:
        stream = Stream(program, texts(program), pool, memory=memory)
        before: fx.Node | None = None
        for index, node in enumerate(sites(program)):
            watch = {each: reads(each.name) for each in (before, node) if each is not None}
            stream.advance(node, watch)  # type: ignore[arg-type]
            if index == stop_at and kept is not None:
                stream.save(Resume(kept))
                stream.close()
                stream = Stream(program, texts(program), pool, memory=memory)
                stream.restore(Resume(kept))
            before = node
        assert before is not None
        stream.advance(None, {before: reads(before.name)})  # type: ignore[dict-item]
        stream.close()
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "bloom", "gpt2"])
def test_it_is_the_interpreter_cut_into_stages(family: str) -> None:
    program = lower(canonical(family), "rtn{group=32,skip=down_proj|fc2}")
    want, got = interpreted(program), streamed(program)
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert torch.allclose(got[key], tensor, rtol=1e-4, atol=1e-5), key


def test_threads_files_and_a_new_start_change_no_bit(tmp_path: Path) -> None:
    program = lower(canonical("llama"), "rtn{group=32}")
    want = streamed(program)
    for workers, memory, stop_at in ((2, 1 << 30, None), (1, 0, 3), (2, 3000, 1), (1, 1 << 30, 6)):
        got = streamed(program, workers, memory, stop_at, tmp_path / f"{workers}-{memory}")
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_packed_sites_can_stand_for_the_floats_they_came_from() -> None:
    program = lower(canonical("llama"), "calibrate,rtn{format=mixed-g32-c32}", calibration(canonical("llama")))
    assert all(FLOAT_WEIGHT in node.meta for node in sites(program))
    floats = interpreted(canonical("llama"))
    seen: dict[int, Tensor] = {}
    with Stream(program, texts(program), as_float=True) as stream:
        *_, last = sites(program)

        def watch(number: int, args: tuple[object, ...], result: object) -> None:
            assert isinstance(result, Tensor)
            seen[number] = result

        stream.advance(None, {last: watch})
    (name,) = (node.name for node in sites(canonical("llama"))[-1:])
    for number, logits in seen.items():
        assert torch.allclose(logits, floats[number, f"{name}()"], rtol=1e-4, atol=1e-5)


def test_files_go_when_the_stream_does(tmp_path: Path) -> None:
    program = canonical("llama")
    with Stream(program, texts(program), memory=0, scratch=tmp_path) as stream:
        first, *_ = sites(program)
        stream.advance(first)
        assert len(list(tmp_path.rglob("*.safetensors"))) == len(texts(program))
        assert isinstance(first.args[0], fx.Node)
        assert stream.value(1, first.args[0]).shape[1] == texts(program)[1].shape[1]
        with pytest.raises(ValueError, match="does not lie ahead"):
            stream.advance(next(iter(program.graph.nodes)))
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_long_and_a_state_of_something_else(tmp_path: Path) -> None:
    program = canonical("llama")
    with pytest.raises(HikuiError, match="tokens do not fit the cache"):
        Stream(program, [torch.zeros(1, program.config.context_length + 1, dtype=torch.int64)])
    with Stream(program, texts(program)) as stream, pytest.raises(HikuiError, match=r"position.safetensors is missing"):
        stream.restore(Resume(tmp_path))

"""calibrate: statistics of what sites read."""

import re
from pathlib import Path

import pytest
import torch

from hikui.lowering.engine.resume import Resume
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import GROUP, STATISTICS
from hikui.lowering.ir.store import FileTensor
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.passes import Calibrate
from hikui.passes.graph import sites
from tests.passes.helpers import assert_settled, calibration, canonical, lower


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_statistics_against_float64_over_all_tokens(family: str) -> None:
    program = canonical(family)
    data = Calibration((*calibration(program).chunks, torch.tensor([[1, 2, 3]])))
    seen: dict[str, list[torch.Tensor]] = {}

    def observe(node: torch.fx.Node, args: tuple[object, ...], result: object) -> None:
        if node.name in names:
            x = args[0]
            assert isinstance(x, torch.Tensor)
            seen.setdefault(names[node.name], []).append(x.reshape(-1, x.shape[-1]).double())

    names = {node.name: node.name for node in sites(program)}
    for chunk in data.chunks:
        interpreter = Interpreter(program, observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    out = lower(program, "calibrate{gram=true}", data)
    for node in sites(out):
        x = torch.cat(seen[node.name])
        stored = {kind: out.store.load(key) for kind, key in node.meta[STATISTICS].items()}
        assert int(stored["tokens"]) == len(x) == 36
        assert torch.allclose(stored["mean_square"].double(), x.square().mean(0), rtol=1e-5, atol=0)
        assert torch.allclose(stored["max_abs"].double(), x.abs().amax(0), rtol=1e-5, atol=0)
        assert torch.allclose(stored["mean_abs"].double(), x.abs().mean(0), rtol=1e-5, atol=0)
        assert torch.equal(stored["sample"], x[::16].float())
        gram = x.t() @ x / len(x)
        assert stored["gram"].dtype == torch.float32
        assert torch.allclose(stored["gram"].double(), gram, rtol=1e-4, atol=1e-5 * float(gram.diagonal().max()))


def test_tied_sites_share_and_the_graph_stays() -> None:
    program = canonical("llama")
    out = lower(program, "calibrate", calibration(program))
    noted = re.sub(r" statistics=\{[^}]*\}", "", to_text(out))
    assert re.sub(r'  stored "statistics/.*\n', "", noted) == to_text(program)
    by_group: dict[str, set[str]] = {}
    for node in sites(out):
        assert set(node.meta[STATISTICS]) == {"mean_abs", "mean_square", "max_abs", "tokens"}
        by_group.setdefault(node.meta[GROUP], set()).add(node.meta[STATISTICS]["mean_square"])
    assert all(keys == {f"statistics/{group}/mean_square"} for group, keys in by_group.items())
    assert not [key for key in program.store.keys() if key.startswith("statistics/")]


def test_same_text_again_changes_nothing_and_other_text_does() -> None:
    program = canonical("opt")
    data = calibration(program)
    out = lower(program, "calibrate", data)
    assert_settled(Calibrate(), out, data)
    other = Calibration((torch.tensor([[9, 8, 7, 6]]),), "other")
    result = Calibrate().run(out, PassContext(other))
    assert result.modified
    assert result.notes == ["9 activations measured on 4 tokens of other"]
    assert Calibrate(gram=True).run(out, PassContext(data)).modified


def test_without_text() -> None:
    with pytest.raises(HikuiError, match="none was given; give some with --calibration"):
        lower(canonical("llama"), "calibrate")
    with pytest.raises(HikuiError, match="no unpacked linear site"):
        lower(canonical("llama"), "pack,calibrate", calibration(canonical("llama")))


def test_progress_ends_at_its_total() -> None:
    steps: list[tuple[str, int, int]] = []
    program = canonical("llama")
    context = PassContext(calibration(program), progress=lambda *step: steps.append(step))
    Calibrate().run(program, context)
    assert steps[-1][0] == "calibrate"
    assert steps[-1][1] == steps[-1][2] == len(steps)


def test_broken_activations_are_named() -> None:
    program = canonical("llama").clone()
    key = "model.layers.1.input_layernorm.weight"
    program.store.put(key, torch.full_like(program.store.load(key), float("inf")))
    with pytest.raises(HikuiError, match=r"Site model.layers.1.self_attn.q_proj reads NaN or infinite activations"):
        lower(program, "calibrate", calibration(program))


def test_a_run_that_can_go_on_keeps_each_matrix_once(tmp_path: Path) -> None:
    program = canonical("llama")
    said: list[str] = []
    context = PassContext(
        calibration(program), tmp_path / "scratch", resume=Resume(tmp_path / "resume"), announce=said.append
    )
    plain = lower(program, "calibrate{gram=true}", calibration(program))
    kept = Calibrate(gram=True).run(program, context).program
    for node in sites(kept):
        for kind, key in node.meta[STATISTICS].items():
            source = kept.store.source(key)
            assert isinstance(source, FileTensor) and tmp_path / "resume" in source.path.parents
            assert torch.equal(kept.store.load(key), plain.store.load(node.meta[STATISTICS][kind]))
    # What will lie on disk is said beforehand.
    assert any("on disk" in line for line in said)
    said.clear()
    Calibrate(gram=True).run(program, PassContext(calibration(program), announce=said.append))
    assert said and not any("on disk" in line for line in said)

"""The walk behind gptq, qep and factorise: killed runs go on, threads change no byte, what cannot fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hikui.lowering.engine.resume import Resume, run_key
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.models.synthetic import tiny_checkpoint
from hikui.passes import PASSES
from hikui.passes.graph import blocks, float_sites
from hikui.passes.measure.footprint import available_memory, estimate
from tests.passes.helpers import calibration, canonical

PIPELINES = [
    "calibrate{gram=true},rtn{bits=3,group=32,weighted=true}",
    "gptq{bits=3,group=32}",
    "qep{alpha=1},gptq{bits=2,group=32,act_order=false}",
    "calibrate,qep,rtn{format=mixed-g32-c32}",
    "qep{alpha=1},factorise{bits=3,iterations=4,rounds=1,inputs=quantised}",
]


def lowered(pipeline: str, **options: object) -> Program:
    program = canonical("llama")
    context = PassContext(calibration(program), **options)  # type: ignore[arg-type]
    return Pipeline(parse_pipeline(pipeline, PASSES)).run(program, context)


def assert_same_bytes(one: Program, two: Program) -> None:
    assert to_text(one) == to_text(two)
    assert one.store.keys() == two.store.keys()
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), two.store.load(key)), key


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_threads_change_no_byte(pipeline: str) -> None:
    assert_same_bytes(lowered(pipeline, workers=1), lowered(pipeline, workers=2))


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would be slow."""


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run_that_stopped_goes_on_to_the_same_bytes(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, save = lowered(pipeline), Resume.save
    saved: list[str] = []

    def counted(self: Resume, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self:
            saved.append(name)
            if len(saved) == limit:
                raise Killed
        save(self, name, tensors)

    monkeypatch.setattr(Resume, "save", counted)
    limit, stops = 7, 0
    for _ in range(50):
        saved.clear()
        try:
            out = lowered(pipeline, resume=Resume(tmp_path))
        except Killed:
            # Each attempt gets a little further than the one before, because it does not do again what is done.
            stops, limit = stops + 1, limit + 2
        else:
            break
    assert stops >= 2
    assert_same_bytes(out, whole)
    saved.clear()
    limit = -1
    assert_same_bytes(lowered(pipeline, resume=Resume(tmp_path)), whole)
    assert not [name for name in saved if name.startswith("finished")]


SCRIPT = """
import os, signal, sys, json, hashlib
from pathlib import Path
import torch
from hikui.lowering.engine.resume import Resume
from hikui.lowering.app.lower import read_calibration
from hikui.lowering.app.request import available_passes
from hikui.lowering.pipeline import recipe
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.trace import trace

folder, text, model = sys.argv[1:]
save, traced = Resume.save, trace(model)
chosen = recipe.load(Path(folder) / "recipe.yaml", available_passes())
data = read_calibration(traced, Path(text), chosen.calibration)

def attempt(limit):
    count = 0
    def killing(self, name, tensors):
        nonlocal count
        count += bool(self)
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, name, tensors)
    Resume.save = killing
    kept = Resume(None if limit is None else Path(folder) / "kept")
    out = Pipeline(chosen.build(available_passes())).run(traced, PassContext(data, resume=kept))
    digest = hashlib.sha256()
    for key in out.store.keys():
        digest.update(key.encode() + out.store.load(key).numpy().tobytes())
    (Path(folder) / f"digest-{limit}").write_text(digest.hexdigest())

outcomes = []
for limit in (None, 3, 9, 6, 0):
    pid = os.fork()
    if pid == 0:
        attempt(limit)
        os._exit(0)
    outcomes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(outcomes))
"""

RECIPE = """
schema: 1
name: killed
calibration: {samples: 4, tokens: 16}
passes:
  - canonicalise
  - calibrate: {gram: true}
  - qep
  - gptq: {bits: 3, group: 32}
  - pack
  - dead_code
"""


def test_kill_minus_nine(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text").write_text("once upon a time there was a small model that read this text again and again\n" * 9)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "text"), str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [0, -9, -9, -9, 0]
    assert (tmp_path / "digest-0").read_text() == (tmp_path / "digest-None").read_text()


def test_the_key_knows_weights_recipe_and_text() -> None:
    program, data = canonical("llama"), calibration(canonical("llama")).chunks
    other = program.clone()
    key = other.store.keys()[0]
    other.store.put(key, other.store.load(key) * 2)
    keys = {
        run_key(program, "a", data), run_key(program, "b", data), run_key(program, "a", data[:2]),
        run_key(other, "a", data),
    }  # fmt: skip
    assert len(keys) == 4
    assert run_key(canonical("llama").clone(), "a", data) in keys


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    lowered("gptq", resume=Resume(tmp_path))
    (path,) = tmp_path.rglob("block-0/*q_proj.safetensors")
    path.write_bytes(b"damaged")
    with pytest.raises(HikuiError, match=r"q_proj.safetensors is damaged .*; run again with --no-resume"):
        lowered("gptq", resume=Resume(tmp_path))


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    said: list[str] = []
    with pytest.raises(HikuiError, match=r"It needs about 0.0. GB of memory, most at .*; use fewer"):
        lowered("gptq", memory=1000, announce=said.append)
    assert len(said) == 1
    assert said[0].startswith("gptq needs about")
    with pytest.raises(HikuiError, match=r"It needs about .* and 0.00 GB of memory are there"):
        lowered("calibrate", memory=1000)


def test_the_estimate_counts_matrices_and_activations() -> None:
    program = canonical("llama")
    walk = blocks(float_sites(program))
    options = {"streams": 2, "spare": 1, "corrected": True, "workers": 1}
    few = estimate(program, walk, [torch.zeros(1, 4)], matrices=2, **options)  # type: ignore[arg-type]
    many = estimate(program, walk, [torch.zeros(1, 4)] * 9, matrices=2, **options)  # type: ignore[arg-type]
    assert many.activations == 9 * few.activations
    # Between sites at least the residual stream is alive, and the activation that is read next.
    assert 2 * 4 * 4 * 2 * 48 <= few.activations <= 2 * 4 * 4 * (48 + 2 * 116)
    assert many.memory - few.memory == many.activations - few.activations
    assert many.matrices in {2 * 8 * k * k for k in (48, 116)}


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert available_memory(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    assert available_memory(tmp_path) == 4096
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == 2000


def test_finished_work_that_is_gone_is_named(tmp_path: Path) -> None:
    kept = Resume(tmp_path)
    kept.save("there", {"x": torch.ones(2)})
    assert torch.equal(kept.need("there")["x"], torch.ones(2))
    with pytest.raises(HikuiError, match=r"gone.safetensors is missing; run again with --no-resume"):
        kept.need("gone")

"""What a backend built is opened and run before it is published."""

from pathlib import Path

import pytest

from hikui.lowering.app import lower as lowering
from hikui.lowering.artefact import verify
from hikui.lowering.artefact.backend import Backend, BuildResult
from hikui.lowering.artefact.target import Target
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Progress

MODEL = {"onnxruntime": "model.onnx", "tvm": "model.index"}
WEIGHTS = {"onnxruntime": "model.data", "tvm": "model.params"}
OTHER = {"onnxruntime": "tvm", "tvm": "onnxruntime"}


class Spoiling:
    """A backend that changes a file of what another one has built."""

    def __init__(self, inner: Backend, file: str) -> None:
        self.name = inner.name
        self._inner, self._file = inner, file

    def build(self, program: Program, target: Target, directory: Path, progress: Progress) -> BuildResult:
        result = self._inner.build(program, target, directory, progress)
        path = directory / self._file
        path.write_bytes(bytes(path.stat().st_size))
        return result


def spoiled(monkeypatch: pytest.MonkeyPatch, model: Path, backend: str, file: str, output: Path) -> None:
    inner = lowering.make_backend(backend)
    monkeypatch.setattr(lowering, "make_backend", lambda name: Spoiling(inner, file))
    lowering.lower(model, output, recipe="rtn-4bit", backend=backend)


@pytest.mark.parametrize("backend", MODEL)
def test_an_artefact_that_does_not_open_is_not_published(
    backend: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        HikuiError, match=rf"{backend} backend .* does not run \(.*--backend {OTHER[backend]}"
    ) as caught:
        spoiled(monkeypatch, tiny, backend, MODEL[backend], tmp_path / "out")
    assert str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", WEIGHTS)
def test_an_artefact_with_other_numbers_is_not_published(
    backend: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HikuiError, match=r"gives other numbers than the lowered program: its logits differ by 1 of"):
        spoiled(monkeypatch, tiny, backend, WEIGHTS[backend], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_artefact_for_another_machine_is_published_unopened(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(artefact: object) -> None:
        raise HikuiError("another machine")

    monkeypatch.setattr(verify, "require_machine", refused)
    spoiled(monkeypatch, tiny, "onnxruntime", MODEL["onnxruntime"], tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()

"""Opens the runner of an artefact; it needs neither passes nor torch."""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hikui.lowering.artefact.generate import Generation, Sampling, generate
from hikui.lowering.artefact.manifest import MANIFEST, Artefact
from hikui.lowering.artefact.target import machine_triple
from hikui.lowering.artefact.verify import require_machine
from hikui.lowering.errors import HikuiError

if TYPE_CHECKING:
    from hikui.backends.onnxruntime import OrtRunner
    from hikui.backends.tvm import TvmRunner
    from hikui.lowering.artefact.generate import Runner


class LoadedModel:
    """An artefact that is ready to generate; a context manager, or to be closed.

    Args:
        artefact: what to run.
        emulate: under qemu-user, where it is for another architecture.

    Raises:
        HikuiError: this machine cannot run it.
    """

    def __init__(self, artefact: Artefact, *, emulate: bool = False) -> None:
        self.artefact = artefact
        self.runner = open_runner(artefact, emulate=emulate)
        self._codec = artefact.codec()

    def __enter__(self) -> "LoadedModel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what the runner holds."""
        self.runner.close()

    def generate(
        self, prompt: str, *, max_new_tokens: int = 64, sampling: Sampling = Sampling(), ignore_eos: bool = False
    ) -> tuple[str, Generation]:
        """Goes on from a prompt: the new text, and its tokens with their times.

        Raises:
            HikuiError: the prompt is longer than the cache.
        """
        tokens = self.artefact.encode_prompt(prompt)
        stop = () if ignore_eos else self.artefact.manifest.model.eos_token_ids
        result = generate(self.runner, tokens, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        # Decoded together with the prompt, because a tokenizer may treat the start of a text in its own way.
        whole, before = self._codec.decode([*tokens, *result.tokens]), self._codec.decode(tokens)
        text = whole.removeprefix(before) if whole.startswith(before) else self._codec.decode(result.tokens)
        return text, result


def load(directory: str | Path, *, emulate: bool = False) -> LoadedModel:
    """Opens an artefact to generate with it; see `LoadedModel`."""
    return LoadedModel(Artefact.load(directory), emulate=emulate)


def is_foreign(artefact: Artefact) -> bool:
    """Whether the artefact is for another architecture than this machine's."""
    return artefact.manifest.target.triple != machine_triple()


def open_runner(artefact: Artefact, *, emulate: bool = False) -> "Runner":
    """A runner for an artefact: on this machine, or under qemu-user where it is foreign and `emulate` is set.

    Raises:
        HikuiError: this machine cannot run it; the sentence says what is missing.
    """
    foreign = is_foreign(artefact)
    if not (foreign and emulate):
        require_machine(artefact)
    runner = _open(artefact, emulate=foreign)
    try:
        _require_agreement(artefact, runner.claims())
    except HikuiError:
        runner.close()
        raise
    return runner


def _open(artefact: Artefact, *, emulate: bool) -> "TvmRunner | OrtRunner":
    if artefact.manifest.backend == "tvm":
        from hikui.backends.tvm import TvmRunner

        return TvmRunner(artefact.directory, emulate=emulate)
    if artefact.manifest.backend == "onnxruntime":
        from hikui.backends.onnxruntime import OrtRunner

        return OrtRunner(artefact.directory, emulate=emulate)
    raise HikuiError(
        f"{artefact.directory} was made by the backend '{artefact.manifest.backend}', which this hikui does not have."
    )


def open_board_runner(artefact: Artefact) -> "Runner":
    """The program that the artefact brings for the board, on this machine, which must be of its kind.

    Raises:
        HikuiError: it is missing, cannot be started, or refuses its artefact.
    """
    require_machine(artefact)
    if artefact.manifest.backend == "tvm":
        from hikui.backends.tvm.native.board import Board, BoardRunner

        return BoardRunner(artefact.directory, Board(artefact.manifest.target.triple))
    from hikui.backends.onnxruntime.emulation import ScriptModel

    return ScriptModel(artefact.directory)


def _require_agreement(artefact: Artefact, claims: dict[str, object]) -> None:
    """Checks that the manifest says of the model what the model's own files say.

    Raises:
        HikuiError: they contradict each other.
    """
    for name, claimed in claims.items():
        entry, field = name.split(".")
        said = getattr(getattr(artefact.manifest, entry), field)
        if said != claimed:
            raise HikuiError(
                f"{artefact.directory / MANIFEST} says '{name}' is {said}, but the model's own files say {claimed}; "
                "copy the folder again."
            )

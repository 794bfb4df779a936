"""Runs an ONNX Runtime artefact of hikui on any board that has Python, numpy and onnxruntime; hikui is not needed.

    python ort_run.py DIR --tokens 1,2,3 --max-new-tokens 32 --json

DIR holds model.json, model.onnx, model.data and ops/<triple>/libhikui_ops.so. With --serve it answers requests on its
standard input, one JSON object a line: {"tokens": [1, 2, 3], "past": 0} runs these tokens, {} forgets all. An answer is
a line of JSON, {"shape": [T, V]} followed by that many float32, or {"error": "…"}; the first is {"context_length": C}.
"""

import argparse
import ctypes
import json
import platform
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_CACHE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
_DESCRIPTION = {"caches_in_place", "features", "library", "model", "onnxruntime", "target", "triple"}


class LoadError(Exception):
    """One sentence on why the model cannot run here."""


def _features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()


def describe(directory: Path) -> dict[str, Any]:
    """What model.json says; raises LoadError where it is missing or damaged."""
    path = directory / "model.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read ({error}); lower the model again.") from error
    if not isinstance(description, dict) or not description.keys() >= _DESCRIPTION:
        raise LoadError(f"{path} is not the description of a model; lower the model again.")
    return description


def _check_machine(description: dict[str, Any], library: Path) -> None:
    """Raises LoadError where the artefact is not for this machine."""
    here, wanted = platform.machine(), str(description["triple"]).split("-", 1)[0]
    if here != wanted:
        raise LoadError(
            f"The artefact is for {wanted} and this machine is {here}; lower it with a target for {here}, or emulate."
        )
    missing = sorted(set(description["features"]) - _features())
    if missing:
        raise LoadError(
            f"The artefact for {description['target']} needs CPU features that this machine lacks: "
            f"{', '.join(missing)}."
        )
    try:
        with library.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise LoadError(f"{library} cannot be read: {error.strerror}; lower the model again.") from error
    machine = struct.unpack_from("<H", header, 18)[0] if len(header) == 20 and header[:4] == b"\x7fELF" else None
    if machine is None or _ELF_MACHINES.get(machine) != here:
        built = _ELF_MACHINES.get(machine, "another machine") if machine is not None else "no machine at all"
        raise LoadError(f"{library} is built for {built}, not for {here}; lower the model again.")


def _check_onnxruntime(installed: str, oldest: str) -> None:
    """Raises LoadError where ONNX Runtime is too old."""
    have, need = ([int(part) for part in version.split(".")[:2]] for version in (installed, oldest))
    if have < need:
        raise LoadError(f"The artefact needs onnxruntime {oldest} or newer and {installed} is installed; upgrade it.")


class OrtModel:
    """A loaded model with its caches, which ONNX Runtime updates in place.

    Args:
        directory: the artefact.
        threads: threads for a single step; None leaves the choice to ONNX Runtime.

    Raises:
        LoadError: the artefact does not fit this machine, or ONNX Runtime refuses it.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        description = describe(directory)
        library = directory / str(description["library"])
        _check_machine(description, library)
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise LoadError("onnxruntime is not installed; install it with pip.") from error
        _check_onnxruntime(onnxruntime.__version__, str(description["onnxruntime"]))
        self._ort = onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            options.register_custom_ops_library(str(library.resolve()))
            self._session = onnxruntime.InferenceSession(
                str(directory / str(description["model"])), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for each status, without a common base
            raise LoadError(f"ONNX Runtime cannot load {directory}: {_first_line(error)}") from error
        self._tensors = {
            value.name: (value.shape, _CACHE_TYPES[value.type]) for value in self._session.get_inputs()[2:]
        }
        width = self._session.get_outputs()[0].shape[-1]
        self.vocabulary = width if isinstance(width, int) else None
        self._in_place = bool(description["caches_in_place"])
        shape, _ = next(iter(self._tensors.values()))
        self.context_length = int(shape[2])
        self.reset()

    def _zeros(self) -> dict[str, Any]:
        value = self._ort.OrtValue.ortvalue_from_numpy
        return {name: value(np.zeros(shape, dtype)) for name, (shape, dtype) in self._tensors.items()}

    def reset(self) -> None:
        """Forgets every token."""
        self._caches = self._zeros()
        self._spare = self._caches if self._in_place else self._zeros()

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of int64 tokens [T], with `past` tokens in the caches.

        Raises:
            LoadError: ONNX Runtime or a kernel fails; the sentence says why.
        """
        if past + len(tokens) > self.context_length:
            raise LoadError(
                f"{past + len(tokens)} tokens do not fit the cache of {self.context_length}; "
                "shorten the prompt or lower with a larger --context."
            )
        wrong = tokens[(tokens < 0) | (tokens >= (self.vocabulary or np.iinfo(np.int64).max))]
        if wrong.size:
            raise LoadError(
                f"Token {wrong[0]} is outside the model's vocabulary of {self.vocabulary}; give ids of the model's own "
                "tokenizer."
            )
        binding = self._session.io_binding()
        binding.bind_cpu_input("tokens", np.ascontiguousarray(tokens, np.int64)[None])
        binding.bind_cpu_input("past", np.array([past], np.int64))
        binding.bind_output("logits", "cpu")
        for name in self._tensors:
            binding.bind_ortvalue_input(name, self._caches[name])
            binding.bind_ortvalue_output(f"new_{name}", self._spare[name])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise LoadError(f"ONNX Runtime stopped: {_first_line(error)}") from error
        self._caches, self._spare = self._spare, self._caches
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()[0]
        return logits


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def generate(
    model: OrtModel, prompt: list[int], max_new_tokens: int, stop: frozenset[int]
) -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
    """Greedy continuation without the token that ends it; returns the report and each step's logits, [N, V].

    Raises:
        LoadError: logits are not finite.
    """
    tokens: list[int] = []
    rows: list[npt.NDArray[np.float32]] = []
    fed, past, first = prompt, 0, 0.0
    started = time.perf_counter()
    while len(tokens) < max_new_tokens and past + len(fed) <= model.context_length:
        rows.append(model.forward(np.array(fed, np.int64), past)[-1])
        past += len(fed)
        if not np.isfinite(rows[-1]).all():
            raise LoadError(
                f"After {past} tokens the model gives logits that are not finite, so there is no next token."
            )
        fed = [int(rows[-1].argmax())]
        if len(rows) == 1:
            first = time.perf_counter() - started
        if fed[0] in stop:
            break
        tokens += fed
    decode = time.perf_counter() - started - first
    rate = (len(rows) - 1) / decode if len(rows) > 1 else None
    return {"tokens": tokens, "first_token_seconds": first, "tokens_per_second": rate}, np.stack(rows)


def serve(directory: Path, threads: int | None, requests: TextIO, answers: BinaryIO) -> None:
    """Loads a model and answers requests until their end; the module's text has the protocol."""

    def answer(head: dict[str, Any], body: bytes = b"") -> None:
        answers.write(json.dumps(head).encode() + b"\n" + body)
        answers.flush()

    try:
        model = OrtModel(directory, threads)
    except LoadError as error:
        answer({"error": str(error)})
        return
    answer({"context_length": model.context_length})
    for line in requests:
        request = json.loads(line)
        if "tokens" not in request:
            model.reset()
            answer({})
            continue
        try:
            logits = model.forward(np.array(request["tokens"], np.int64), int(request["past"]))
        except LoadError as error:
            answer({"error": str(error)})
        else:
            answer({"shape": logits.shape}, logits.tobytes())


def say_kernels(directory: Path) -> None:
    """Says on stderr which instruction set the kernels use here, and which formats only have the fallback."""
    description = describe(directory)
    library = ctypes.CDLL(str(directory / description["library"]))
    library.hikui_kernels_isa.restype = library.hikui_kernels_describe.restype = ctypes.c_char_p
    isa, served = library.hikui_kernels_isa(), library.hikui_kernels_describe()
    if isa is None or served is None:
        return
    print(f"kernels for {isa.decode()}", file=sys.stderr)
    for line in served.decode().splitlines():
        kind, size, kernel = line.split(" ", 2)
        if kernel.startswith("generic"):
            print(f"fallback for {kind} {size}", file=sys.stderr)


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.replace(",", " ").split()]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Continue a list of tokens with an ONNX Runtime artefact of hikui.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=_ids, default=[], help="the prompt, as token ids with commas between")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", type=_ids, default=[], help="token ids that end the text")
    parser.add_argument("--threads", type=int, help="threads for a step")
    parser.add_argument("--dump-logits", type=Path, metavar="FILE", help="save the logits of each step as .npy")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the ids")
    parser.add_argument("--verbose", action="store_true", help="say which kernels are used, on standard error")
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.directory, options.threads, sys.stdin, sys.stdout.buffer)
        return 0
    if not options.tokens or options.max_new_tokens < 1:
        parser.error("--tokens and --max-new-tokens need at least one token, unless --serve is given")
    try:
        model = OrtModel(options.directory, options.threads)
        if len(options.tokens) > model.context_length:
            raise LoadError(f"{len(options.tokens)} tokens do not fit the cache of {model.context_length}.")
        if options.verbose:
            say_kernels(options.directory)
        report, logits = generate(model, options.tokens, options.max_new_tokens, frozenset(options.stop))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    if options.dump_logits is not None:
        np.save(options.dump_logits, logits)
    print(json.dumps(report) if options.json else " ".join(map(str, report["tokens"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

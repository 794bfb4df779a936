"""Runs an ONNX Runtime artefact of hikui on any board that has Python, numpy and onnxruntime; hikui is not needed.

    python ort_run.py DIR --tokens 1,2,3 --max-new-tokens 32 --json

DIR holds model.json, model.onnx, model.data and ops/<triple>/libhikui_ops.so. With --serve it answers requests on its
standard input, one JSON object a line: {"tokens": [1, 2, 3], "past": 0} runs these tokens, {} forgets all. An answer is
a line of JSON, {"shape": [T, V]} followed by that many float32, or {"error": "…"}; the first is {"context_length": C}.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import struct
import sys
import time
from pathlib import Path, PurePosixPath
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
        raise LoadError(f"{path} cannot be read ({_first_line(error)}); lower the model again.") from error
    if not isinstance(description, dict) or not description.keys() >= _DESCRIPTION:
        raise LoadError(f"{path} is not the description of a model; lower the model again.")
    texts = ("library", "model", "onnxruntime", "target", "triple")
    features = description["features"]
    if not all(isinstance(description[name], str) for name in texts) or not (
        isinstance(features, list) and all(isinstance(feature, str) for feature in features)
    ):
        raise LoadError(f"{path} holds something else than names; lower the model again.")
    if not isinstance(description["caches_in_place"], bool):
        raise LoadError(f"{path} does not say whether caches are written in place; lower the model again.")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6}){1,3}", description["onnxruntime"]):
        raise LoadError(f"{path} names no version of onnxruntime; lower the model again.")
    for name in ("library", "model"):
        _require_inside(directory, path, description[name])
    return description


def _require_inside(directory: Path, path: Path, name: str) -> None:
    """Raises LoadError where a file that model.json names does not lie in the artefact: it would be loaded as code."""
    parts = PurePosixPath(name)
    wrong = not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in name
    if wrong or (directory / name).resolve() != directory.resolve() / name:
        raise LoadError(f"{path} names '{name}', which is no plain file inside the artefact; copy the artefact again.")


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
        inputs = self._session.get_inputs()[2:]
        if any(value.type not in _CACHE_TYPES for value in inputs):
            raise LoadError(f"{directory / str(description['model'])} is not a model of hikui; lower the model again.")
        self._tensors = {value.name: (value.shape, _CACHE_TYPES[value.type]) for value in inputs}
        self._in_place = bool(description["caches_in_place"])
        logits = self._session.get_outputs()[0].shape
        shape, _ = next(iter(self._tensors.values()), ([], None))
        if len(shape) < 3 or not isinstance(shape[2], int) or not logits or not isinstance(logits[-1], int):
            raise LoadError(f"{directory / str(description['model'])} is not a model of hikui; lower the model again.")
        self.context_length, self.vocabulary = shape[2], logits[-1]
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
        if past < 0 or len(tokens) == 0:
            raise LoadError(f"{len(tokens)} tokens after {past} are no step; give at least one, after none or more.")
        if past + len(tokens) > self.context_length:
            raise LoadError(
                f"{past + len(tokens)} tokens do not fit the cache of {self.context_length}; "
                "shorten the prompt or lower with a larger --context."
            )
        wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
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


def _request(line: str) -> tuple[npt.NDArray[np.int64], int] | None:
    """Tokens and past of a request, None to forget all; raises LoadError where it is no request."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"A request is not JSON ({_first_line(error)}).") from error
    if request == {}:
        return None
    if not isinstance(request, dict) or request.keys() != {"tokens", "past"} or not isinstance(request["tokens"], list):
        raise LoadError("A request has 'tokens', a list, and 'past'; or it is {} to forget all.")
    if not all(type(number) is int and 0 <= number < 2**31 for number in (*request["tokens"], request["past"])):
        raise LoadError("Token ids and 'past' are whole numbers from 0 on, below 2147483648.")
    return np.array(request["tokens"], np.int64), request["past"]


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
        try:
            request = _request(line)
            if request is None:
                model.reset()
                answer({})
                continue
            logits = model.forward(*request)
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
    return [_number(part, 0, 2**31 - 1) for part in text.replace(",", " ").split()]


def _number(text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} to {most}")
    return int(text)


def _count(text: str) -> int:
    return _number(text, 1, 2**31 - 1)


def _threads(text: str) -> int:
    """More threads than sixteen for each processor only wait for each other."""
    return _number(text, 1, 16 * (os.cpu_count() or 1))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Continue a list of tokens with an ONNX Runtime artefact of hikui.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=_ids, default=[], help="the prompt, as token ids with commas between")
    parser.add_argument("--max-new-tokens", type=_count, default=32)
    parser.add_argument("--stop", type=_ids, default=[], help="token ids that end the text")
    parser.add_argument("--threads", type=_threads, help="threads for a step")
    parser.add_argument("--dump-logits", type=Path, metavar="FILE", help="save the logits of each step as .npy")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the ids")
    parser.add_argument("--verbose", action="store_true", help="say which kernels are used, on standard error")
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    options = parser.parse_args(arguments)
    if sys.stdout is None:
        return _stopped("the standard output is closed.")
    try:
        if options.serve:
            serve(options.directory, options.threads, sys.stdin, sys.stdout.buffer)
            return 0
        if not options.tokens:
            parser.error("--tokens needs at least one token, unless --serve is given")
        report = _generate(options)
        print(json.dumps(report) if options.json else " ".join(map(str, report["tokens"])), flush=True)
    except LoadError as error:
        return _stopped(str(error))
    except OSError as error:
        # What is left in the buffer is lost too; without this, Python would try again at its end and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _stopped(f"the output cannot be written: {error.strerror}.")
    return 0


def _stopped(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a prompt; raises LoadError."""
    model = OrtModel(options.directory, options.threads)
    if len(options.tokens) > model.context_length:
        raise LoadError(f"{len(options.tokens)} tokens do not fit the cache of {model.context_length}.")
    if options.verbose:
        say_kernels(options.directory)
    report, logits = generate(model, options.tokens, options.max_new_tokens, frozenset(options.stop))
    if options.dump_logits is not None:
        try:
            np.save(options.dump_logits, logits)
        except OSError as error:
            raise LoadError(f"{options.dump_logits} cannot be written: {error.strerror}.") from error
    return report


if __name__ == "__main__":
    sys.exit(main())

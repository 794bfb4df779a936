"""Programs and single-operator models for the tests of the ONNX Runtime backend."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import nn

from hikui.backends.onnxruntime import OnnxRuntimeBackend, library
from hikui.lowering.app.request import available_passes
from hikui.lowering.artefact.target import Target, resolve
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.lowering.progress import no_progress
from hikui.lowering.trace import trace
from hikui.models.synthetic import TINY_VOCABULARY, tiny_model

FLOAT = "canonicalise,pack{format=float32},fuse,dead_code"
HALF = "canonicalise,pack{format=float16},fuse,dead_code"
QUANTISED = "canonicalise,rtn{bits=4,group=32},activation{bits=8},pack{format=float16},fuse,dead_code"
BYTES = "canonicalise,rtn{bits=8,group=64},activation{bits=8},pack{format=float16},fuse,dead_code"
EMBEDDED = "canonicalise,rtn{bits=8,group=64},pack,embedding{format=int4-g32},activation,fuse,dead_code"
FLOAT_ACTIVATIONS = "canonicalise,rtn{bits=4,group=32},dead_code"
SIGNS = "canonicalise,rtn{bits=1,group=32},activation{bits=4},pack{format=float16},fuse,dead_code"
CODEBOOK = "canonicalise,rtn{format=nf4-g64},activation{bits=8},pack{format=float16},fuse,dead_code"
MIXED = (
    "canonicalise,calibrate,mixed{group=32},rtn,sub_branch{rank=2},activation{static=true},pack{format=float16},fuse,"
    "dead_code"
)
FACTORS = "canonicalise,factorise{bits=3,iterations=5,skip=lm_head},rtn,activation,pack,fuse,dead_code"

Array = npt.NDArray[Any]


@cache
def traced(family: str) -> Program:
    """A tiny model of a family, traced."""
    return trace(tiny_model(family))


@cache
def lowered(family: str, pipeline: str) -> Program:
    """A tiny model after some passes; "" is none."""
    program = traced(family)
    if not pipeline:
        return program
    generator = torch.Generator().manual_seed(5)
    chunks = tuple(torch.randint(0, TINY_VOCABULARY, (1, 11), generator=generator) for _ in range(3))
    passes = parse_pipeline(pipeline, available_passes().values())
    return Pipeline(passes, ()).run(program, PassContext(Calibration(chunks)))


def build(program: Program, directory: Path, target: Target | None = None) -> Path:
    """The program as the backend writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    OnnxRuntimeBackend().build(program, target or resolve("host"), directory, no_progress)
    return directory


def tokens(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, TINY_VOCABULARY, count)


def in_pieces(runner: Any, lengths: Sequence[int], seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits of random tokens that are fed in pieces of the given lengths: [sum of lengths, V]."""
    ids, past, rows = tokens(sum(lengths), seed), 0, []
    for length in lengths:
        rows.append(runner.forward(ids[past : past + length], past))
        past += length
    return np.concatenate(rows)


def reference(program: Program, lengths: Sequence[int], seed: int = 0) -> npt.NDArray[np.float32]:
    return in_pieces(ReferenceRunner(program), lengths, seed)


def relative_error(found: Array, wanted: Array) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@cache
def host_library() -> Path:
    """libhikui_ops.so for this machine, built once."""
    path = Path(mkdtemp(prefix="hikui-test-")) / "libhikui_ops.so"
    library.build(resolve("host"), path)
    return path


def session(model: ir.Model, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session with hikui's operators."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(host_library()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: ir.Model, feed: Mapping[str, Array], threads: int = 1) -> list[Array]:
    outputs: list[Array] = session(model, threads).run(None, dict(feed))
    return outputs


def operators(model: ir.Model) -> list[str]:
    """The operators of the graph in order, with their domains."""
    return [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph]


class Plain(nn.Module):
    """A module around a function, for torch.export."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function

    def forward(self, *arguments: Any) -> Any:
        return self._function(*arguments)

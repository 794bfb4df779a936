"""The ONNX Runtime backend: `model.onnx`, its mapped weights, and the library of hikui's operators."""

import json
import shutil
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from hikui.backends import toolchain
from hikui.backends.kernels.cuda import artefact as cuda
from hikui.backends.onnxruntime import external_data, library, schemas
from hikui.backends.onnxruntime.attention_rotary import RotateInAttention
from hikui.backends.onnxruntime.group_query_attention import UseGroupQueryAttention
from hikui.backends.onnxruntime.normalization import (
    UseSimplifiedLayerNormalization,
    UseSkipSimplifiedLayerNormalization,
)
from hikui.backends.onnxruntime.translation import to_onnx
from hikui.lowering.artefact.backend import BuildResult
from hikui.lowering.artefact.target import Target
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Progress

API_FLOOR = 18
"""The interface version that libhikui_ops.so asks for: that of ONNX Runtime 1.18."""

MODEL = "model.onnx"
DATA = "model.data"
DESCRIPTION = "model.json"
SCRIPT = "bin/ort_run.py"


_IN_PLACE = frozenset(
    ("GroupQueryAttention", "Attention", "AttentionInt8", "AttentionInt4", "CacheUpdateInt8", "CacheUpdateInt4")
)
"""Operators that can write a new cache over the old one."""


def passes(program: Program) -> tuple[ir.passes.InPlacePass, ...]:
    """What happens to a translated model, in order."""
    return (
        UseGroupQueryAttention(),
        RotateInAttention(program.config.context_length, lambda key: program.store.load(key).numpy()),
        UseSimplifiedLayerNormalization(),
        UseSkipSimplifiedLayerNormalization(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
        # The exporter leaves stack traces there, with the paths of this machine.
        ClearMetadataAndDocStringPass(),
    )


def _oldest_onnxruntime(model: ir.Model) -> str:
    """The first ONNX Runtime that computes the model rightly."""
    # GroupQueryAttention of 1.18 rotates tokens after the first step by wrong angles, as run.
    rotates = any(node.attributes.get_int("do_rotary", 0) for node in model.graph)
    return "1.19" if rotates else f"1.{API_FLOOR}"


_PROGRAM = 2_000_000
"""Bytes of the graph of a model of 30 blocks, of the operators for all kernels, and of report and manifest."""


def _updates_caches_in_place(model: ir.Model) -> bool:
    """Whether every new cache comes from an operator that can write it over the old one."""
    producers = [output.producer() for output in model.graph.outputs[1:]]
    return all(node is not None and node.op_type in _IN_PLACE for node in producers)


class OnnxRuntimeBackend:
    """Builds an ONNX model that runs where ONNX Runtime does, with hikui's kernels beside it."""

    name = "onnxruntime"

    def nbytes_beside_weights(self, target: Target) -> int:
        """The graph and the custom operators; ONNX Runtime itself is the board's."""
        return _PROGRAM

    def build(self, program: Program, target: Target, directory: Path, progress: Progress) -> BuildResult:
        """Writes the model under an existing, empty `directory`.

        Raises:
            HikuiError: a node has no translation, the compiler for the target is missing, or the folder is not
                writable.
        """
        progress("translate", 0, 1)
        model, weights = to_onnx(program)
        for step in passes(program):
            step(model)
        progress("translate", 1, 1)
        # A pass may have left a weight without readers.
        weights = {key: value for key, value in weights.items() if value.uses()}
        external_data.write(weights, program.store, directory / DATA, progress)
        for value in weights.values():
            model.graph.register_initializer(value)
        ir.save(model, directory / MODEL)

        library_path = f"ops/{target.triple}/libhikui_ops.so"
        progress("operators", 0, 1)
        operators = {node.op_type for node in model.graph if node.domain == schemas.DOMAIN}
        library.build(target, directory / library_path, sorted(map(schemas.kernel_of, operators)))
        progress("operators", 1, 1)
        script = directory / SCRIPT
        script.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("ort_run.py"), script)

        cuda_files, cuda_entry = cuda.write(target, directory)
        oldest = _oldest_onnxruntime(model)
        entry: dict[str, object] = {
            "onnxruntime": oldest,
            "caches_in_place": _updates_caches_in_place(model),
            "emulator_cpu": target.emulator_cpu,
            "features": list(target.features),
            "library": library_path,
            "model": MODEL,
            "target": target.name,
            "triple": target.triple,
            **cuda_entry,
        }
        (directory / DESCRIPTION).write_text(json.dumps(entry, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files = tuple(sorted((DATA, MODEL, DESCRIPTION, SCRIPT, library_path, *cuda_files)))
        return BuildResult(
            files, entry, {"glibc": toolchain.GLIBC, "onnxruntime": oldest, "onnxruntime_api": str(API_FLOOR)}
        )

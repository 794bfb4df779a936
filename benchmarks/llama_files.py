"""Files of llama.cpp's low-bit types from the same weights, with an importance matrix.

    python -m benchmarks.llama_files MODEL --library LIBLLAMA.so --calibration TEXT --out DIR
        [--types Q2_K,IQ2_XXS,IQ1_S,TQ1_0] [--samples 64] [--tokens 256] [--plain]

MODEL is `smollm2`, whose own file is taken, or the folder of a Llama, of which a file of floats is made first. The
library is llama.cpp's of 2026 (an importance matrix is a C structure since then); those it needs lie beside it. The
matrix is what llama.cpp's own tool sums up: the mean square of each column that a matrix reads, over the calibration
text. Embedding and head have none, as there. `benchmarks.yardstick --files` and `hikui eval` measure the files.
"""

import argparse
import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from hikui.lowering.app.lower import read_calibration
from hikui.lowering.app.request import Request
from hikui.lowering.ir.program import BLOCK, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.recipe import CalibrationSettings
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES
from hikui.passes.graph import sites

TYPES = {
    "Q2_K": 10, "Q3_K_S": 11, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ2_S": 28, "IQ1_M": 31,
    "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
"""llama.cpp's numbers of its types (`llama_ftype`), of those that hikui reads."""


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "type", "output_type", "embedding_type")),
        *(
            (name, ctypes.c_bool)
            for name in ("allow_requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry_run")
        ),
        ("importance", ctypes.POINTER(_Importance)),
        *((name, ctypes.c_void_p) for name in ("overrides", "tensor_overrides", "pruned")),
        ("most_bytes", ctypes.c_size_t),
    )


def load(library: Path) -> ctypes.CDLL:
    """The library, after what it needs and the processor's own part."""
    for pattern in ("libggml-base.so*", "libggml.*so*"):
        for path in sorted(library.parent.glob(pattern)):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    found.llama_model_quantize_default_params.restype = _Parameters
    found.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    if found.llama_model_quantize_default_params().most_bytes != 8 << 30:
        raise SystemExit(f"{library} lays its parameters out in another way; take one of October 2026 or so.")
    return found


def importance(program: Program, calibration: Path, samples: int, tokens: int) -> dict[str, npt.NDArray[np.float32]]:
    """The mean square of each column that a matrix of the blocks reads, by the matrix's name in the file."""
    data = read_calibration(program, calibration, CalibrationSettings(samples=samples, tokens=tokens))
    measured = Pipeline(parse_pipeline("calibrate", PASSES)).run(program, PassContext(data))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1 + _layers(measured))
    found = {}
    for node in sites(measured):
        name = names.get_name(f"{node.meta[SITE]}.weight", (".weight",))
        if name is not None and name.startswith("blk."):
            mean_square = measured.store.load(node.meta[STATISTICS]["mean_square"])
            found[name] = mean_square.numpy().astype(np.float32)
    return found


def _layers(program: Program) -> int:
    return max(int(node.meta[BLOCK]) for node in sites(program) if BLOCK in node.meta)


def write_floats(program: Program, folder: Path, target: Path) -> None:
    """A file of a Llama's floats: rows of queries and keys in the order that llama.cpp rotates them in."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers = int(config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    weights = {key: program.store.load(key).float().numpy() for key in program.store.keys()}
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, value in weights.items():
        name = names.get_name(key, (".weight", ".bias"))
        if name is None or key.startswith("lm_head"):
            continue
        count = next((count for part, count in heads.items() if part in key), None)
        if count is not None:
            value = value.reshape(count, 2, value.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(
    library: ctypes.CDLL, source: Path, target: Path, kind: str, matrix: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """One file."""
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.type, parameters.allow_requantize = 1, TYPES[kind], True
    entries = (_Importance * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if matrix:
        parameters.importance = entries
    if status := library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        target.unlink(missing_ok=True)
        raise SystemExit(f"llama.cpp cannot make {target}: {status}.")


def main() -> None:
    """Makes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="Q2_K,IQ2_XXS,IQ1_S,TQ1_0")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="without an importance matrix")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    request = Request(options.model, None)
    program = request.traced(finite=False)
    canonical = Pipeline(parse_pipeline("canonicalise", PASSES)).run(program, PassContext())
    source = Path(str(request.source))
    if source.is_dir():
        folder, source = source, options.out / "floats.gguf"
        write_floats(canonical, folder, source)
    matrix = {} if options.plain else importance(canonical, options.calibration, options.samples, options.tokens)
    library = load(options.library)
    for kind in options.types.split(","):
        quantise(library, source, options.out / f"{kind}.gguf", kind, matrix)


if __name__ == "__main__":
    main()

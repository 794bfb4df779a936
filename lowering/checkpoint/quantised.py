"""Recognises a checkpoint that GPTQ or AWQ has quantised, and puts a source of floats in the place of its tensors.

Both methods leave a folder like any other, but for a config of the quantisation and, for each quantised module X, the
tensors X.qweight, X.qzeros, X.scales (and X.g_idx) instead of X.weight; `quantised_matrix` has their layouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from hikui.lowering.checkpoint.quantised_matrix import QuantisedMatrix, Zeros
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import FileTensor

CONFIG_KEY = "quantization_config"
"""Where config.json holds the quantisation."""

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of older folders that hold it instead, and whose they are."""

_FORMAT_KEYS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "checkpoint_format", "format")}
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_GROUP = {"gptq": -1, "awq": 128}
"""The group where the config names none, as the libraries of each have it."""

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FLOAT = "give the float checkpoint instead"


@dataclass(frozen=True)
class Quantisation:
    """What a config says of the quantisation.

    Attributes:
        file: where it stands, for messages.
        method: `gptq` or `awq`.
        bits: of a weight.
        group: input columns that share a scale and a zero; −1 is all of them.
        zeros: how zeros are stored.
        symmetric: what it says of symmetry, if anything.
        dynamic: whether some modules differ from this in bits and group.
    """

    file: Path
    method: Literal["gptq", "awq"]
    bits: int
    group: int
    zeros: Zeros
    symmetric: bool | None
    dynamic: bool


def parse_quantisation(entry: object, file: Path, method: str = "") -> Quantisation:
    """Reads the config of a quantisation.

    Args:
        entry: the JSON object.
        file: where it stands, for messages.
        method: what it is where it does not say.

    Raises:
        HikuiError: it is malformed, or a variant that is not read; names the file and the key.
    """
    if not isinstance(entry, dict):
        raise HikuiError(f"{file}: the quantisation's config must be a JSON object, not {type(entry).__name__}.")
    told = str(entry.get("quant_method", method)).lower()
    if told not in ("gptq", "awq"):
        _refuse(file, "quant_method", told, "gptq or awq")
    known: Literal["gptq", "awq"] = "gptq" if told == "gptq" else "awq"
    if entry.get("is_marlin_format"):
        _refuse(file, "is_marlin_format", "true", "false")
    formats = {key: str(entry[key]).lower() for key in _FORMAT_KEYS[known] if entry.get(key) is not None}
    for key, value in formats.items():
        if value not in _FORMATS[known]:
            _refuse(file, key, value, " or ".join(_FORMATS[known]))
    if len(set(formats.values())) > 1:
        named = " and ".join(f"{key} '{value}'" for key, value in formats.items())
        raise HikuiError(f"{file} says both {named}; leave in it the one that holds.")
    if str(entry.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        _refuse(file, "pack_dtype", str(entry["pack_dtype"]), "int32")
    bits = entry.get("bits", entry.get("w_bit"))
    if bits not in _BITS[known]:
        _refuse(file, "bits", str(bits), ", ".join(map(str, _BITS[known])))
    group = entry.get("group_size", entry.get("q_group_size", _GROUP[known]))
    if not isinstance(group, int) or (group != -1 and group < 1):
        _refuse(file, "group_size", str(group), "a number above 0, or -1")
    if known == "awq" or "gptq_v2" in formats.values():
        zeros: Zeros = "plain"
    else:
        zeros = "less_one_words" if _by_gptqmodel(entry) else "less_one"
    symmetric = entry["sym"] if isinstance(entry.get("sym"), bool) else None
    return Quantisation(file, known, int(bits), group, zeros, symmetric, bool(entry.get("dynamic")))


def _refuse(file: Path, key: str, value: str, known: str) -> NoReturn:
    raise HikuiError(
        f"The checkpoint is already quantised in a way that hikui does not read: {file} has {key} '{value}', where "
        f"{known} is due; {_FLOAT}."
    )


def _by_gptqmodel(entry: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the checkpoint: it takes one off all zeros of a word at once, with borrows."""
    meta = entry.get("meta")
    quantisers = meta.get("quantizer") if isinstance(meta, dict) else None
    named = quantisers if isinstance(quantisers, list) else [quantisers]
    return any(str(name).startswith("gptqmodel") for name in named)


def with_floats(
    quantisation: Quantisation, tensors: Mapping[str, FileTensor]
) -> dict[str, FileTensor | QuantisedMatrix]:
    """The tensors of a checkpoint, with X.weight in the place of X.qweight and what belongs to it.

    Raises:
        HikuiError: parts of a quantised module are missing or do not fit each other, or a tensor scales activations.
    """
    stems = [key.removesuffix(".qweight") for key in sorted(tensors) if key.endswith(".qweight")]
    if not stems:
        raise HikuiError(
            f"{quantisation.file} says that the checkpoint is already quantised ({quantisation.method}), but none of "
            f"its tensors ends in .qweight; if its weights are floats, take the quantisation out of that file."
        )
    taken = {f"{stem}.{part}" for stem in stems for part in _PARTS}
    left: dict[str, FileTensor | QuantisedMatrix] = {key: value for key, value in tensors.items() if key not in taken}
    for key in left:
        if key.endswith(".scales"):
            # AutoAWQ puts a factor behind activation functions of some models, which a float model has no place for.
            raise HikuiError(
                f"The tensor '{key}' belongs to no quantised matrix, it scales activations, which hikui does not "
                f"read; {_FLOAT}."
            )
    for stem in stems:
        if f"{stem}.weight" in left:
            raise HikuiError(f"The checkpoint holds both '{stem}.weight' and '{stem}.qweight'; remove one of them.")
        left[f"{stem}.weight"] = _matrix(quantisation, stem, tensors)
    return left


def _matrix(quantisation: Quantisation, stem: str, tensors: Mapping[str, FileTensor]) -> QuantisedMatrix:
    qweight = tensors[f"{stem}.qweight"]
    for part in ("qzeros", "scales"):
        if f"{stem}.{part}" not in tensors:
            raise HikuiError(
                f"The checkpoint has '{stem}.qweight' but no '{stem}.{part}', so it is no {quantisation.method} "
                f"checkpoint that hikui reads ({qweight.path}); {_FLOAT}."
            )
    qzeros, scales, g_idx = tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"], tensors.get(f"{stem}.g_idx")
    for part, tensor, dimensions, right in (
        ("qweight", qweight, 2, qweight.dtype == torch.int32),
        ("qzeros", qzeros, 2, qzeros.dtype == torch.int32),
        ("scales", scales, 2, scales.dtype.is_floating_point),
        ("g_idx", g_idx, 1, g_idx is None or not g_idx.dtype.is_floating_point),
    ):
        if tensor is not None and (not right or len(tensor.shape) != dimensions):
            raise HikuiError(
                f"The tensor '{stem}.{part}' in {tensor.path} is {str(tensor.dtype).removeprefix('torch.')} "
                f"{list(tensor.shape)}, where hikui expects another kind for {quantisation.method}; {_FLOAT}."
            )
    g_idx = None if quantisation.method == "awq" else g_idx
    bits, n, k = _sizes(quantisation, qweight, scales, g_idx)
    groups, group = scales.shape[0], k if quantisation.group == -1 else quantisation.group
    if quantisation.dynamic and g_idx is None and groups:
        group = -(-k // groups)
    matrix = QuantisedMatrix(
        stem, quantisation.method, bits, qweight, qzeros, scales, g_idx, group, quantisation.zeros,
        quantisation.symmetric, 0, n,
    )  # fmt: skip
    fits = (
        bits in _BITS[quantisation.method]
        and (quantisation.dynamic or bits == quantisation.bits)
        and matrix.in_features == k
        and n * bits % 32 == 0
        and k * bits % 32 == 0
        and scales.shape == (groups, n)
        and qzeros.shape == (groups, n * bits // 32)
        and (g_idx is not None or groups == -(-k // group))
    )
    if not fits:
        shapes = ", ".join(
            f"{part} {list(tensor.shape)}"
            for part, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales), ("g_idx", g_idx))
            if tensor is not None
        )
        raise HikuiError(
            f"The tensors of '{stem}' in {qweight.path} ({shapes}) do not fit each other and the {quantisation.bits} "
            f"bits and group_size {quantisation.group} of {quantisation.file}; {_FLOAT}."
        )
    return matrix


def _sizes(
    quantisation: Quantisation, qweight: FileTensor, scales: FileTensor, g_idx: FileTensor | None
) -> tuple[int, int, int]:
    """Bits, N and K by the tensors: where modules differ, the number of columns tells how words are cut."""
    rows, columns = qweight.shape
    if quantisation.method == "awq":
        return quantisation.bits, 8 * columns, rows
    k = rows * 32 // quantisation.bits if g_idx is None else g_idx.shape[0]
    bits = quantisation.bits if not k else rows * 32 // k
    return bits, columns, k

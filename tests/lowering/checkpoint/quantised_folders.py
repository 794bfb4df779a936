"""Checkpoints in the formats of GPTQ and AWQ, packed bit by bit from integers, and the matrices that they stand for."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from hikui.models.synthetic import TINY_CONTEXT, write_tokenizer

Integers = NDArray[np.int64]
WEIGHTS = "model.safetensors"
VOCABULARY = 128

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": TINY_CONTEXT, "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 64, "n_inner": 160, "n_layer": 1, "n_head": 4, "n_positions": TINY_CONTEXT},
}  # fmt: skip
"""Models whose matrices fill whole words at every number of bits."""


@dataclass(frozen=True)
class Grid:
    """A quantised matrix in plain integers.

    Attributes:
        bits: of a field.
        fields: [n, k], below 2^bits.
        zeros: [n, groups].
        scale: float16 [n, groups].
        groups: [k], the group of each column.
    """

    bits: int
    fields: Integers
    zeros: Integers
    scale: Tensor
    groups: Integers

    def matrix(self) -> Tensor:
        """What it stands for, element by element: float32 [n, k]."""
        n, k = self.fields.shape
        scale = self.scale.double().numpy()
        out = np.empty((n, k))
        for column in range(k):
            group = self.groups[column]
            out[:, column] = scale[:, group] * (self.fields[:, column] - self.zeros[:, group])
        return torch.from_numpy(out).float()


def random_grid(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Grid:
    """Random fields; zeros in the middle or, asymmetric, from 1 to the highest field; `group` −1 is the channel."""
    random = np.random.default_rng(seed)
    group = k if group == -1 else group
    count = -(-k // group)
    groups = np.arange(k) // group
    if act_order:
        groups = groups[random.permutation(k)]
    middle = 1 << (bits - 1)
    zeros = np.full((n, count), middle) if symmetric else random.integers(1, 1 << bits, (n, count))
    scale = torch.from_numpy(random.uniform(0.5, 1.0, (n, count)) * 0.3 / (1 << bits)).half()
    return Grid(bits, random.integers(0, 1 << bits, (n, k)), zeros.astype(np.int64), scale, groups)


def _signed(words: list[list[int]]) -> Tensor:
    """Words as int32."""
    return torch.from_numpy(np.array(words, dtype=np.uint64).astype(np.uint32).view(np.int32).copy())


def stream(values: Integers, bits: int) -> Tensor:
    """Packs each column of `values` [count, n] into one stream of bits, cut into words: int32 [count·bits/32, n]."""
    count, n = values.shape
    words = [[0] * n for _ in range(count * bits // 32)]
    for column in range(n):
        for index in range(count):
            for bit in range(bits):
                at = index * bits + bit
                words[at // 32][column] |= (int(values[index, column]) >> bit & 1) << (at % 32)
    return _signed(words)


def interleaved(values: Integers) -> Tensor:
    """Packs rows of nibbles [rows, n] as AWQ does: int32 [rows, n/8]."""
    rows, n = values.shape
    words = [[0] * (n // 8) for _ in range(rows)]
    for row in range(rows):
        for word in range(n // 8):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row][word] |= int(values[row, 8 * word + output]) << (4 * nibble)
    return _signed(words)


def gptq(grid: Grid, *, stored_less: int = 1, with_g_idx: bool = True) -> dict[str, Tensor]:
    """The tensors of a module as AutoGPTQ writes them; zeros are stored with `stored_less` taken off."""
    tensors = {
        "qweight": stream(grid.fields.T, grid.bits),
        "qzeros": stream(grid.zeros - stored_less, grid.bits).t().contiguous(),
        "scales": grid.scale.t().contiguous(),
    }
    return tensors | ({"g_idx": torch.from_numpy(grid.groups.astype(np.int32))} if with_g_idx else {})


def awq(grid: Grid) -> dict[str, Tensor]:
    """The tensors of a module as AutoAWQ's `gemm` writes them."""
    return {
        "qweight": interleaved(grid.fields.T),
        "qzeros": interleaved(grid.zeros.T),
        "scales": grid.scale.t().contiguous(),
    }


def gptq_config(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}


def awq_config(group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **more}


def write_matrices(folder: Path, config: dict[str, Any], modules: dict[str, dict[str, Tensor]]) -> Path:
    """A folder with nothing but quantised modules."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file({f"{name}.{part}": t for name, parts in modules.items() for part, t in parts.items()}, folder / WEIGHTS)
    return folder


def write_model(
    folder: Path,
    *,
    family: str = "llama",
    method: str = "gptq",
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    grids: dict[str, Grid] | None = None,
) -> dict[str, Tensor]:
    """Writes a tiny quantised model with a tokenizer.

    Of sites that read one activation (q, k, v; gate, up) the columns have one order, as GPTQ leaves them.

    Args:
        folder: made.
        family: a key of `SIZES`.
        method: `gptq` or `awq`.
        bits: of a field.
        group: columns of a group.
        symmetric: as of `random_grid`.
        act_order: likewise.
        grids: what to write for some modules, instead of a random one.

    Returns:
        The parameters of the float model that it stands for, by name, as the module has them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1, **SIZES[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY, TINY_CONTEXT)
    tensors = load_file(folder / WEIGHTS)
    floats = dict(tensors)
    inside = [name for name, tensor in tensors.items() if tensor.dim() == 2 and (".layers." in name or ".h." in name)]
    orders: dict[str, Integers] = {}
    for seed, name in enumerate(sorted(inside)):
        stem = name.removesuffix(".weight")
        n, k = tensors[name].shape if family != "gpt2" else reversed(tensors[name].shape)
        grid = random_grid(n, k, bits=bits, group=group, symmetric=symmetric, act_order=act_order, seed=seed)
        parent, _, leaf = stem.rpartition(".")
        shared = parent + {"o_proj": ".o", "down_proj": ".d", "c_proj": ".p"}.get(leaf, "")
        grid = replace(grid, groups=orders.setdefault(shared, grid.groups))
        grid = (grids or {}).get(stem, grid)
        del tensors[name]
        parts = gptq(grid) if method == "gptq" else awq(grid)
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        matrix = grid.matrix()
        floats[name] = matrix if family != "gpt2" else matrix.t().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    quantisation = (
        gptq_config(bits, group, sym=symmetric, desc_act=act_order) if method == "gptq" else awq_config(group)
    )
    edit_config(folder, quantization_config=quantisation)
    return floats


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

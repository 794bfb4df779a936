"""Writes the weights and their index; `index.py` describes both."""

from pathlib import Path

import numpy as np
import torch

from hikui.backends.tvm.index import ALIGNMENT, INDEX, PARAMETERS, Index, Weight
from hikui.lowering.artefact.target import Target
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Progress

_DTYPES = (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)


def write_parameters(program: Program, target: Target, directory: Path, progress: Progress) -> Index:
    """Writes `model.params` and `model.index`, one tensor in memory at a time.

    Raises:
        HikuiError: a weight has a dtype that the runners do not know.
    """
    nodes = program.weight_nodes()
    weights: list[Weight] = []
    with (directory / PARAMETERS).open("wb") as file:
        for done, node in enumerate(nodes):
            progress("weights", done, len(nodes))
            key = program.weight_of(node)
            tensor = program.store.load(key).detach().contiguous()
            if tensor.dtype not in _DTYPES:
                raise HikuiError(f"Weight '{key}' is {tensor.dtype}, which the tvm backend cannot store.")
            file.write(bytes(-file.tell() % ALIGNMENT))
            data = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
            weights.append(
                Weight(key, str(tensor.dtype).removeprefix("torch."), file.tell(), data.nbytes, tuple(tensor.shape))
            )
            file.write(data.data)
        # A kernel may read a whole vector at the end of the last tensor.
        file.write(bytes(-file.tell() % ALIGNMENT + ALIGNMENT))
        size = file.tell()
    progress("weights", len(nodes), len(nodes))
    config = program.config
    index = Index(
        target=target.name,
        triple=target.triple,
        emulator_cpu=target.emulator_cpu,
        context_length=config.context_length,
        vocabulary=config.vocabulary,
        caches=config.caches,
        eos_token_ids=config.eos_token_ids,
        features=target.features,
        weights=tuple(weights),
        parameters=size,
    )
    (directory / INDEX).write_text("\n".join(index.lines()) + "\n", "utf-8")
    return index

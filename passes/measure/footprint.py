"""What a walk through a model will need at once, worked out from shapes before it starts."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from hikui.lowering.engine.streaming import ACTIVATION_MEMORY, sees_text
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, WEIGHT, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.graph import matrix_shape
from hikui.passes.matrices import row_parts

_BYTES_A_WEIGHT = 32
"""Of what is made of a part of the rows: by corrections float64 matrices, by `gptq` half as much of twice as many."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a walk needs beside what the process already holds.

    Attributes:
        memory: at its peak.
        disk: for activations beyond what is kept in memory.
        site: where the peak is.
        matrices: of the peak, the K×K matrices.
        activations: of the peak, the activations.
    """

    memory: int
    disk: int
    site: str
    matrices: int
    activations: int

    def __str__(self) -> str:
        disk = f" and {gigabytes(self.disk)} on disk" if self.disk else ""
        return (
            f"about {gigabytes(self.memory)} of memory{disk}, most at {self.site} ({gigabytes(self.matrices)} of K×K "
            f"matrices, {gigabytes(self.activations)} of activations)"
        )


def gigabytes(nbytes: int) -> str:
    """1.23 GB."""
    return f"{nbytes / 1e9:.2f} GB"


def estimate(
    program: Program,
    blocks: Sequence[Sequence[Sequence[fx.Node]]],
    texts: Sequence[Tensor],
    *,
    streams: int,
    matrices: int,
    spare: int,
    corrected: bool,
    workers: int,
) -> Footprint:
    """The footprint of a walk.

    Args:
        program: what is walked through.
        blocks: its tied groups, block by block.
        texts: int64 [1, T] each.
        streams: how many sets of activations are kept.
        matrices: K×K float64 matrices that are summed up at each group.
        spare: further ones while it is rounded.
        corrected: whether the group's matrices are held in float32 beside the stored ones.
        workers: threads, each of which has a text or a part of the rows in hand.
    """
    lengths = [text.shape[1] for text in texts]
    widest = max(lengths)
    firsts = {group[0]: group for block in blocks for group in block}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    last = {value: index for index, node in enumerate(nodes) for value in node.all_input_nodes}
    tokens = program.input_nodes()[0].name
    varying: set[str] = set()
    alive = dict.fromkeys(lengths, 0)
    weights = transient = most = peak = 0
    site, squares = "", 0
    seen: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        if node in firsts:
            most = max(most, sum(alive[length] for length in lengths))
            group = firsts[node]
            k = matrix_shape(node)[1]
            held = sum(4 * n * k for n, _ in map(matrix_shape, group)) if corrected else 0
            part = max(rows.stop - rows.start for each in group for rows in row_parts(*matrix_shape(each)))
            measuring = weights + workers * transient + 8 * k * k * matrices
            rounding = 8 * k * k * (matrices - corrected + spare) + held + workers * part * k * _BYTES_A_WEIGHT
            packed = sum(n * k for n, _ in map(matrix_shape, group))
            if max(measuring, rounding + packed) > peak:
                peak, site, squares = max(measuring, rounding + packed), str(node.meta[SITE]), 8 * k * k * matrices
            weights, transient = 0, 0
            seen = set()
        for value in node.all_input_nodes:
            if WEIGHT in value.meta and value not in seen:
                seen.add(value)
                weights += value_nbytes(value, widest)
        flowing = [value for value in node.all_input_nodes if WEIGHT not in value.meta]
        transient = max(transient, sum(value_nbytes(value, widest) for value in (*flowing, node)))
        if sees_text(node, varying, tokens):
            varying.add(node.name)
            born = [node] if node in last else []
            dead = [value for value in flowing if value.name in varying and last[value] == index]
            for length in alive:
                alive[length] += sum(value_nbytes(value, length) for value in born)
                alive[length] -= sum(value_nbytes(value, length) for value in dead)
    activations = streams * most
    kept = min(activations, streams * ACTIVATION_MEMORY)
    return Footprint(peak + kept, activations - kept, site, squares, kept)


def value_nbytes(node: fx.Node, tokens: int) -> int:
    """Bytes of a node's tensors for a text of so many tokens; integers take none."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    total = 0
    for part in parts:
        if isinstance(part, Tensor):
            count = 1
            for size in part.shape:
                expression = size.node.expr if isinstance(size, torch.SymInt) else size
                count *= (
                    int(expression.subs(dict.fromkeys(expression.free_symbols, tokens)))
                    if isinstance(size, torch.SymInt)
                    else int(expression)
                )
            total += count * part.dtype.itemsize
    return total


def refuse_what_cannot_fit(
    footprint: Footprint,
    context: PassContext,
    way_out: str = "use fewer or shorter calibration windows, or leave wide sites out with skip",
) -> None:
    """Raises HikuiError, with the numbers and a way out, where the memory or the disk is too small."""
    room = room_for(context)
    if room is not None and footprint.memory > room:
        raise HikuiError(f"It needs {footprint}, and {gigabytes(room)} of memory are there; {way_out}.")
    folder = context.scratch or Path(tempfile.gettempdir())
    folder = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if footprint.disk > free:
        raise HikuiError(f"It needs {footprint}, and {gigabytes(free)} are free at {folder}; {way_out}.")


def room_for(context: PassContext) -> int | None:
    """Bytes that a pass may take; None where nobody says."""
    return context.memory if context.memory is not None else available_memory()


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, by Linux and its control group; None where they do not say."""
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdecimal():
            found.append(int(limit) - int((root / "sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass
    return min(found, default=None)

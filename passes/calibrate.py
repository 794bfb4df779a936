"""Measures what each linear site reads, on real text, one block of the model at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.interpreter import run_blocks
from hikui.lowering.passes_base import Pass, PassContext, PassResult
from hikui.lowering.program import SITE, STATISTICS, Program
from hikui.passes.graph import float_sites, groups


class _Sums:
    """Running sums over the tokens that one activation has seen, in float64."""

    def __init__(self, width: int, *, gram: bool) -> None:
        self.tokens = 0
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.largest = torch.zeros(width, dtype=torch.float32)
        self.gram = torch.zeros(width, width, dtype=torch.float64) if gram else None

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        wide = rows.double()
        self.tokens += rows.shape[0]
        self.squares += wide.square().sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        if self.gram is not None:
            self.gram.addmm_(wide.t(), wide)

    def tensors(self) -> dict[str, Tensor]:
        out = {
            "mean_square": (self.squares / self.tokens).float(),
            "max_abs": self.largest,
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
        }
        if self.gram is not None:
            out["gram"] = self.gram / self.tokens
        return out


@dataclass(frozen=True)
class Calibrate(Pass):
    """Measures the mean square and the largest magnitude of every input column of every site.

    Tied sites share one set of statistics, kept in the store under `statistics/<group>/…`: `mean_square` float32 [K],
    `max_abs` float32 [K], `tokens` int64 [], and `gram` float64 [K, K].

    Attributes:
        gram: also measure E[x·xᵀ], which the whitened branch and the exact output error need; K² float64 a group.
    """

    name: ClassVar[str] = "calibrate"
    calibrates: ClassVar[bool] = True
    gram: bool = False

    def requires(self, program: Program) -> None:
        """Raises HikuiError where there is no unpacked site."""
        if not float_sites(program):
            raise HikuiError("There is no unpacked linear site to measure; run `canonicalise` first, and `rtn` later.")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Runs the calibration text through the program; the numbers do not depend on the order of the sites.

        Raises:
            HikuiError: no calibration text was given, or an activation is NaN or infinite.
        """
        if context.calibration is None:
            raise HikuiError(
                "It measures the model on real text and none was given; give some with --calibration TEXT_FILE."
            )
        work = program.clone()
        tied = groups(float_sites(work))
        first = {members[0]: name for name, members in tied.items()}
        sums: dict[str, _Sums] = {}

        def observe(chunk: int, node: fx.Node, args: tuple[object, ...], result: object) -> None:
            if node not in first:
                return
            x = args[0]
            assert isinstance(x, Tensor)
            if first[node] not in sums:
                sums[first[node]] = _Sums(x.shape[-1], gram=self.gram)
            sums[first[node]].add(x)

        def progress(_: str, done: int, total: int) -> None:
            context.progress("calibrate", done, total)

        run_blocks(work, context.calibration.chunks, observe, progress)
        news = [self._store(work, name, members, sums[name]) for name, members in tied.items()]
        if not any(news):
            return PassResult(program, False)
        tokens = sum(chunk.shape[1] for chunk in context.calibration.chunks)
        source = f" of {context.calibration.source}" if context.calibration.source else ""
        return PassResult(work, True, [f"{len(tied)} activations measured on {tokens} tokens{source}"])

    def _store(self, program: Program, name: str, members: list[fx.Node], sums: _Sums) -> bool:
        """Keeps the statistics of a group; returns whether they say anything new."""
        if not bool(sums.squares.isfinite().all()):
            raise HikuiError(
                f"Site {members[0].meta[SITE]} reads NaN or infinite activations on the calibration text; the model "
                "itself is broken there."
            )
        new = False
        keys = {}
        for kind, tensor in sums.tensors().items():
            key = keys[kind] = f"statistics/{name}/{kind}"
            if key not in program.store or not torch.equal(program.store.load(key), tensor):
                program.store.put(key, tensor)
                new = True
        for node in members:
            new |= node.meta.get(STATISTICS) != keys
            node.meta[STATISTICS] = dict(keys)
        return new

    def ensures(self, program: Program) -> None:
        """Every unpacked site has statistics."""
        for node in float_sites(program):
            if STATISTICS not in node.meta:
                raise VerificationError(f"Site {node.meta[SITE]} was not measured.")

"""What is known of the activations that a site reads."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, STATISTICS, Program
from hikui.passes.measure import linalg


@dataclass(eq=False)
class Evidence:
    """Statistics of an activation's K columns over all tokens that were seen; what was not asked for is None.

    Others may read the tensors too: none is to be changed.

    Attributes:
        mean_square: float32 [k], E[x²].
        max_abs: float32 [k], max|x|.
        mean_abs: float32 [k], E|x|.
        gram: float64 [k, k], E[x·xᵀ], or E[w·x·xᵀ] with the weights of tokens.
        sample: float32 [tokens, k], x itself of evenly spaced tokens.
    """

    mean_square: Tensor | None = None
    max_abs: Tensor | None = None
    mean_abs: Tensor | None = None
    gram: Tensor | None = None
    sample: Tensor | None = None

    def take_gram(self, order: Tensor | None = None) -> Tensor:
        """A Gram matrix that may be overwritten, its columns in another order (int64 [k]) where one is given."""
        assert self.gram is not None, "it was asked for, and not taken before"
        return self.gram.clone() if order is None else linalg.permuted(self.gram, order)

    def permuted(self, order: Tensor) -> "OwnEvidence":
        """The same with its columns in another order: int64 [k]."""
        vectors = {
            name: None if (held := getattr(self, name)) is None else held[order]
            for name in ("mean_square", "max_abs", "mean_abs")
        }
        sample = None if self.sample is None else self.sample[:, order]
        return OwnEvidence(**vectors, gram=None if self.gram is None else self.take_gram(order), sample=sample)


class OwnEvidence(Evidence):
    """Evidence that nobody else will read: whoever has it may use its Gram matrix up, which is gone then."""

    @staticmethod
    def stored(program: Program, node: fx.Node, wanted: Set[str]) -> "OwnEvidence":
        """What `calibrate` has measured of a site."""
        keys = node.meta[STATISTICS]
        return OwnEvidence(**{kind: _own(kind, program.store.load(keys[kind])) for kind in sorted(wanted)})

    def shared(self) -> Evidence:
        """The same for somebody who is not to use it up."""
        return Evidence(self.mean_square, self.max_abs, self.mean_abs, self.gram, self.sample)

    def take_gram(self, order: Tensor | None = None) -> Tensor:
        """The Gram matrix itself, which is given away."""
        gram, self.gram = self.gram, None
        assert gram is not None, "it was asked for, and not taken before"
        return gram if order is None else linalg.permuted(gram, order)


def _own(kind: str, tensor: Tensor) -> Tensor:
    # A Gram matrix is stored in float32 and worked on in float64, in place.
    return tensor.to(torch.float64, copy=True) if kind == "gram" else tensor


TOKEN_WEIGHT = "token_weight"
"""The statistic of how much each token of the calibration text counts: float32 [tokens of all texts], mean 1."""


def token_weights(program: Program, node: fx.Node, texts: Sequence[Tensor]) -> Tensor | None:
    """What `guide` has found for a site, or None where all tokens count alike.

    Raises:
        HikuiError: it was found on another text.
    """
    if (key := node.meta.get(STATISTICS, {}).get(TOKEN_WEIGHT)) is None:
        return None
    weights, tokens = program.store.load(key), sum(text.shape[1] for text in texts)
    if len(weights) != tokens:
        raise HikuiError(
            f"Site {node.meta[SITE]} has weights for {len(weights)} tokens, and the calibration text has {tokens}; run "
            "`guide` on the same text."
        )
    return weights


_BATCH = 1024
"""Tokens whose outer products are added up in float32 before the sum goes to the float64 matrices."""


SAMPLE = 512
"""Tokens that a sample has at most; there are at least half as many of a text that is long enough."""

_SPACED = 16
"""Every so many tokens one is taken into the sample, to begin with."""


def weights_of_sample(weights: Tensor) -> Tensor:
    """Those of the tokens that a `Sample` of all of them holds."""
    spacing = _SPACED
    while -(-len(weights) // spacing) > SAMPLE:
        spacing *= 2
    return weights[::spacing]


class Sample:
    """Tokens evenly spaced in all that were seen: when there are too many, every second one is given up.

    Which they are does not depend on how the text is cut.
    """

    def __init__(self) -> None:
        self._spacing, self._seen = _SPACED, 0
        self._held: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Sees further tokens: float32 [tokens, k]."""
        self._held += rows[-self._seen % self._spacing :: self._spacing].clone()
        self._seen += rows.shape[0]
        while len(self._held) > SAMPLE:
            self._held, self._spacing = self._held[::2], 2 * self._spacing

    def tokens(self) -> Tensor:
        """Those that are held: float32 [tokens, k]."""
        return torch.stack(self._held)


class Sums:
    """Running sums over the tokens of an activation, and over what became of it in the quantised model.

    Args:
        width: K.
        wanted: what `evidence` will be asked for.
        workers: share the tiles of the large matrices.
        weights: float32 [tokens], of all that will be seen, for outer products; None where they count alike.
        cross: also sum (x − x̂)·x̂ᵀ.
        beside: columns of what else is to be had from x̂, so that its products with x̂ are summed too.
    """

    def __init__(
        self,
        width: int,
        wanted: Set[str],
        workers: Workers,
        weights: Tensor | None = None,
        *,
        cross: bool = False,
        beside: int = 0,
    ) -> None:
        self.tokens = 0
        self._roots = None if weights is None else weights.sqrt().unsqueeze(-1)
        self._workers = workers
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._magnitudes = torch.zeros(width, dtype=torch.float64)
        self._largest = torch.zeros(width, dtype=torch.float32)
        self._wanted = set(wanted)
        self._gram = torch.zeros(width, width, dtype=torch.float64) if "gram" in wanted or cross else None
        self._cross = torch.zeros(width, width, dtype=torch.float64) if cross else None
        self._beside = torch.zeros(beside, width, dtype=torch.float64) if beside else None
        self._sample = Sample() if "sample" in wanted else None
        self._waiting: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    @property
    def finite(self) -> bool:
        """Whether everything that was seen is finite."""
        return bool(self._squares.isfinite().all())

    def add(self, x: Tensor, reference: Tensor | None = None, beside: Tensor | None = None) -> None:
        """Adds one text: x float32 [..., k], what x is in the float model, and [..., n] of what else is wanted."""
        rows = x.reshape(-1, x.shape[-1])
        seen = slice(self.tokens, self.tokens + rows.shape[0])
        self.tokens += rows.shape[0]
        magnitudes = rows.abs()
        self._squares += rows.double().square().sum(0)
        self._magnitudes += magnitudes.sum(0, dtype=torch.float64)
        self._largest = torch.maximum(self._largest, magnitudes.amax(0))
        if self._sample is not None:
            self._sample.add(rows)
        if self._gram is not None or self._cross is not None:
            difference = None
            if self._cross is not None:
                assert reference is not None, "the cross term compares with the float model"
                difference = reference.reshape(rows.shape) - rows
            if self._beside is not None:
                assert beside is not None, "it was said to be wanted"
                beside = beside.reshape(rows.shape[0], -1)
            if self._roots is not None:
                rows = rows * self._roots[seen]
                difference = None if difference is None else difference * self._roots[seen]
                beside = None if beside is None else beside * self._roots[seen]
            self._waiting.append((rows, difference, beside))
            if sum(waiting.shape[0] for waiting, *_ in self._waiting) >= _BATCH:
                self._multiply()

    def _multiply(self) -> None:
        """Adds the outer products of the texts that wait: few large products cost less than many small ones."""
        if not self._waiting:
            return
        rows = torch.cat([rows for rows, *_ in self._waiting])
        if self._gram is not None:
            linalg.add_gram(self._gram, rows, self._workers)
        if self._cross is not None:
            difference = torch.cat([difference for _, difference, _ in self._waiting if difference is not None])
            linalg.add_cross(self._cross, difference, rows, self._workers)
        if self._beside is not None:
            beside = torch.cat([beside for *_, beside in self._waiting if beside is not None])
            linalg.add_cross(self._beside, beside, rows, self._workers)
        self._waiting = []

    def evidence(self) -> OwnEvidence:
        """The means; the Gram matrix is handed over, so it can be had once."""
        self._multiply()
        every = {
            "mean_square": (self._squares / self.tokens).float(),
            "max_abs": self._largest,
            "mean_abs": (self._magnitudes / self.tokens).float(),
        }
        out = OwnEvidence(**{name: tensor for name, tensor in every.items() if name in self._wanted})
        if self._sample is not None:
            out.sample = self._sample.tokens()
        if self._gram is not None:
            linalg.mirror(self._gram)
            self._gram /= self.tokens
            out.gram, self._gram = self._gram, None
        return out

    def cross(self) -> Tensor:
        """E[(x − x̂)·x̂ᵀ], float64 [k, k]; it can be had once."""
        assert self._cross is not None, "it was asked for"
        self._multiply()
        out, self._cross = self._cross, None
        return out.div_(self.tokens)

    def beside(self) -> Tensor:
        """E[b·x̂ᵀ] of what else is wanted, b: float64 [n, k]; it can be had once."""
        assert self._beside is not None, "it was asked for"
        self._multiply()
        out, self._beside = self._beside, None
        return out.div_(self.tokens)

"""Any runner as a model of lm-eval (EleutherAI's lm-evaluation-harness): what its tasks ask of a language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows

from hikui.lowering.artefact.generate import Runner, Sampling, stream
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError
from hikui.lowering.evaluation.quality import Array, Progress, log_probabilities

MAX_GENERATED = 256
"""New tokens of a request that does not say how many."""


class HarnessModel(LM):  # type: ignore[misc]
    """A runner that answers lm-eval's requests.

    The special tokens that the tokenizer puts before a text (BOS, for most) stand before every request, those that it
    puts behind one are left out; where it puts none, the end-of-text token stands before an empty context only. What is
    longer than the context loses tokens on its left, special ones apart.

    Args:
        runner: the model.
        codec: its tokenizer.
        eos: tokens that end a text.
        progress: called with how many requests are done.

    Attributes:
        truncated: requests that lost tokens.
    """

    def __init__(self, runner: Runner, codec: TextCodec, *, eos: Sequence[int], progress: Progress) -> None:
        super().__init__()
        self._runner, self._codec, self._eos, self._progress = runner, codec, tuple(eos), progress
        self._held: list[int] = []
        """The tokens that the runner's cache holds."""
        self.truncated = 0

    @property
    def prefix(self) -> str:
        """What stands before a request, in words."""
        if self._codec.prefix:
            tokens = self._codec.prefix
            return f"token{'s' if len(tokens) > 1 else ''} {', '.join(map(str, tokens))} before every request"
        if self._eos:
            return f"no special tokens; the end-of-text token {self._eos[0]} before an empty context"
        return "no special tokens"

    # ── what lm-eval calls ──────────────────────────────────────────────────────────────────────────────────────────

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation after its context, and whether it is the greedy one.

        Raises:
            HikuiError: a continuation alone is longer than the model's context.
        """
        encoded = [self._encode(*request.args) for request in requests]
        # Those with one context follow each other, so that it is read once.
        order = sorted(range(len(encoded)), key=lambda index: (encoded[index][0], index))
        out: dict[int, tuple[float, bool]] = {}
        for done, index in enumerate(order):
            out[index] = self._score(*encoded[index])
            self._progress("request", done + 1, len(order))
        return [out[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability in nats of each whole text, every token once, in windows as lm-eval cuts them."""
        out = []
        for done, request in enumerate(requests):
            (text,) = request.args
            ids = self._codec.encode(text)
            if self._codec.prefix and self._codec.begins(ids):
                ids = ids[len(self._codec.prefix) :]
            *lead, start = self._start()
            total, context = 0.0, self._runner.context_length - len(lead)
            for window, targets in get_rolling_token_windows(ids, start, context, 1):
                before, lead = [*lead, *window], []
                ids_of_window = [*before, targets[-1]]
                total += self._score(ids_of_window, len(ids_of_window) - len(targets))[0]
            out.append(total)
            self._progress("request", done + 1, len(requests))
        return out

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that follows each context, up to a stopping string, the end of text, or so many tokens."""
        out = []
        for done, request in enumerate(requests):
            out.append(self._generate(*request.args))
            self._progress("request", done + 1, len(requests))
        return out

    # ── how they are answered ───────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> list[int]:
        """The tokens before a text that has nothing before it."""
        if self._codec.prefix:
            return list(self._codec.prefix)
        if self._eos:
            return [self._eos[0]]
        raise HikuiError(
            "The tokenizer puts no special token before a text and the model has no end-of-text token, so nothing "
            "predicts the first token of an empty context; leave such tasks out."
        )

    def _encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Token ids of a request, and the position of the first that is to be predicted."""
        # A tokenizer makes a space part of the word after it, so it goes to the continuation.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = self._codec.encode(bare + continuation), len(self._codec.encode(bare)) if bare else 0
        prefix = self._codec.before(whole) if self._codec.prefix else self._start() if before == 0 else []
        ids, first = [*prefix, *whole], len(prefix) + before
        excess = len(ids) - (self._runner.context_length + 1)
        if excess <= 0:
            return ids, first
        kept = len(self._codec.prefix)
        if first - excess < max(kept, 1):
            raise HikuiError(
                f"A continuation of {len(ids) - first} tokens does not fit the context of "
                f"{self._runner.context_length}; use a larger --context, or leave the task out."
            )
        self.truncated += 1
        return [*ids[:kept], *ids[kept + excess :]], first - excess

    def _score(self, ids: list[int], first: int) -> tuple[float, bool]:
        """Log-probability of `ids[first:]`, and whether each of them is the most likely token."""
        if first == len(ids):
            return 0.0, True
        rows = self._rows(ids, first)
        targets = np.asarray(ids[first:])
        total = float(rows[np.arange(targets.size), targets].sum())
        if not np.isfinite(total):
            raise HikuiError("The model gives logits that are not finite on a task; check its weights and recipe.")
        return total, bool((rows.argmax(axis=1) == targets).all())

    def _rows(self, ids: list[int], first: int) -> Array:
        """Log-probabilities [T, V] of the tokens from `first` on.

        A context that the cache holds from the request before is not read again. One that it holds in part is: sums
        change in the last bit with the number of rows, and a score is not to depend on which other tasks there are.
        """
        before = first - 1
        shared = before if self._held[:before] == ids[:before] else 0
        rows = log_probabilities(self._runner, ids, shared)
        self._held = ids[:-1]
        return rows[first - 1 - shared :]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        # Half of the context is the prompt's.
        count = min(int(options.get("max_gen_toks", MAX_GENERATED)), self._runner.context_length // 2)
        prompt = self._codec.encode(context)
        if self._codec.prefix and self._codec.begins(prompt):
            prompt = prompt[len(self._codec.prefix) :]
        prefix = self._start() if self._codec.prefix or not prompt else []
        excess = len(prefix) + len(prompt) + count - self._runner.context_length
        if excess > 0:
            self.truncated += 1
            prompt = prompt[excess:]
        prompt = prefix + prompt
        sampling = Sampling()
        if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
            sampling = Sampling(float(options.get("temperature", 1.0)), int(options.get("top_k", 0)))
        before = self._codec.decode(prompt)
        text, tokens = "", list[int]()
        for token in stream(self._runner, prompt, max_new_tokens=count, stop=self._eos, sampling=sampling):
            tokens.append(token)
            # Decoded together with the prompt, because a tokenizer may treat the start of a text in its own way.
            whole = self._codec.decode([*prompt, *tokens])
            text = whole.removeprefix(before) if whole.startswith(before) else self._codec.decode(tokens)
            if ends := [at for stop in stops if stop and (at := text.find(stop)) >= 0]:
                text = text[: min(ends)]
                break
        self._held = []
        return text

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from hikui.lowering.artefact.generate import Generation, Sampling, generate
from hikui.lowering.errors import HikuiError, UsageError


class Counting:
    """A model whose next token is the sum of all tokens so far modulo its vocabulary; it checks how it is called."""

    context_length = 12
    vocabulary = 50

    def __init__(self) -> None:
        self.seen: list[int] = []

    def reset(self) -> None:
        self.seen = []

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        assert past == len(self.seen)
        rows = np.zeros((tokens.size, self.vocabulary), np.float32)
        for row, token in enumerate(tokens):
            self.seen.append(int(token))
            rows[row, sum(self.seen) % self.vocabulary] = 3.0
            rows[row, (sum(self.seen) + 1) % self.vocabulary] = 2.0
        return rows

    def close(self) -> None:
        self.seen = []


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % Counting.vocabulary)
    return tokens[len(prompt) :]


def test_greedy_generation_is_the_models_own_and_repeats() -> None:
    runner = Counting()
    first = generate(runner, [1, 2, 3], max_new_tokens=5)
    assert first.tokens == expected([1, 2, 3], 5)
    assert generate(runner, [1, 2, 3], max_new_tokens=5).tokens == first.tokens
    assert first.first_token_seconds >= 0
    assert first.tokens_per_second is None or first.tokens_per_second > 0


def test_it_stops_at_a_stop_token_and_when_the_cache_is_full() -> None:
    whole = expected([1, 2, 3], 10)
    assert generate(Counting(), [1, 2, 3], max_new_tokens=10, stop=(whole[3],)).tokens == whole[:3]
    # The cache holds 12: the prompt, nine of the new tokens, and the tenth, which is never fed back.
    full = generate(Counting(), [1, 2, 3], max_new_tokens=50)
    assert (full.tokens, full.full) == (whole, True)
    assert not generate(Counting(), [1, 2, 3], max_new_tokens=10).full
    assert not generate(Counting(), [1, 2, 3], max_new_tokens=50, stop=(whole[9],)).full


def test_a_prompt_that_does_not_fit_is_refused_with_the_way_out() -> None:
    assert len(generate(Counting(), list(range(12)), max_new_tokens=3).tokens) == 1
    with pytest.raises(HikuiError, match="13 tokens, but the cache holds 12; shorten the prompt or .* --context"):
        generate(Counting(), list(range(13)), max_new_tokens=3)
    with pytest.raises(HikuiError, match="no tokens"):
        generate(Counting(), [], max_new_tokens=3)


def test_a_seed_fixes_the_draw_and_another_changes_it() -> None:
    def draw(seed: int) -> Generation:
        return generate(Counting(), [1, 2], max_new_tokens=8, sampling=Sampling(temperature=2.0, seed=seed))

    assert draw(3).tokens == draw(3).tokens
    assert len({tuple(draw(seed).tokens) for seed in range(8)}) > 1


def test_drawing_follows_the_softmax_and_top_k() -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    choose = Sampling(temperature=0.5, seed=1).chooser()
    counts = Counter(choose(logits) for _ in range(4000))
    weights = np.exp(2 * logits.astype(np.float64))
    for token, share in enumerate(weights / weights.sum()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)
    top = Sampling(temperature=5.0, top_k=2, seed=1).chooser()
    assert {top(logits) for _ in range(200)} == {2, 3}


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}])
def test_senseless_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        Sampling(**options)  # type: ignore[arg-type]

"""What is known of an activation: sums against float64, and who may use a Gram matrix up."""

from typing import TypeVar

import pytest
import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.ir.program import STATISTICS
from hikui.passes.graph import sites
from hikui.passes.measure import evidence as module
from hikui.passes.measure.evidence import Evidence, OwnEvidence, Sums
from tests.passes.helpers import calibration, canonical, lower, random

K = 7
EVERY = {"mean_square", "max_abs", "mean_abs", "gram"}


Known = TypeVar("Known", bound=Evidence)


def known(kind: type[Known]) -> Known:
    x = random(50, K)
    return kind(x.square().mean(0), x.abs().amax(0), x.abs().mean(0), x.double().t() @ x.double() / 50)


def changed(gram: Tensor) -> None:
    gram.fill_(torch.nan)


@pytest.mark.parametrize("order", [None, torch.tensor([3, 0, 6, 1, 5, 2, 4])])
def test_what_others_read_is_never_changed(order: Tensor | None) -> None:
    shared, before = known(Evidence), known(Evidence).gram
    assert before is not None
    want = before if order is None else before[order][:, order]
    for _ in range(2):
        taken = shared.take_gram(order)
        assert torch.equal(taken, want)
        changed(taken)
    assert shared.gram is not None and torch.equal(shared.gram, before)


def test_what_is_ones_own_is_given_away_once() -> None:
    own = known(OwnEvidence)
    gram = own.gram
    taken = own.take_gram()
    assert taken is gram and own.gram is None, "the matrix itself, without a copy"
    with pytest.raises(AssertionError, match="not taken before"):
        own.take_gram()
    ordered, order = known(OwnEvidence), torch.arange(K).flip(0)
    before = known(Evidence).gram
    assert before is not None and torch.equal(ordered.take_gram(order), before.flip(0).flip(1))
    assert ordered.gram is None
    with pytest.raises(AssertionError, match="it was asked for"):
        Evidence().take_gram()


def test_what_one_shares_one_can_still_give_away() -> None:
    own = known(OwnEvidence)
    shared, gram = own.shared(), own.gram
    assert type(shared) is Evidence and shared.gram is gram
    assert all(getattr(shared, name) is getattr(own, name) for name in EVERY)
    changed(shared.take_gram())
    assert torch.equal(own.take_gram(), known(Evidence).gram)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Evidence, OwnEvidence])
def test_permuted_evidence_is_ones_own_and_has_every_column_in_its_place(kind: type[Evidence]) -> None:
    held, order = known(kind), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    out, was = held.permuted(order), known(Evidence)
    assert isinstance(out, OwnEvidence)
    for name in ("mean_square", "max_abs", "mean_abs"):
        assert torch.equal(getattr(out, name), getattr(was, name)[order])
    assert was.gram is not None and torch.equal(out.gram, was.gram[order][:, order])  # type: ignore[arg-type]
    changed(out.take_gram())
    if kind is Evidence:
        assert held.gram is not None and torch.equal(held.gram, was.gram)
    else:
        assert held.gram is None, "used up, so that two of its size are never held"
    part = Evidence(max_abs=was.max_abs).permuted(order)
    assert part.mean_square is None and part.mean_abs is None and part.gram is None


@pytest.mark.parametrize("batch", [1, 4, 9, 1024])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_sums_are_the_means_over_all_tokens(
    batch: int, cross: bool, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", batch)
    texts = [random(1, length, K, seed=length) for length in (4, 1, 9)]
    references = [text + random(*text.shape, seed=99) for text in texts]
    with Workers(1) as workers:
        weights = random(14, seed=3).square() if weighed else None
        sums = Sums(K, EVERY, workers, weights, cross=cross, beside=3 * cross)
        for text, reference in zip(texts, references, strict=True):
            sums.add(text, reference if cross else None, 2 * reference[..., :3] if cross else None)
        found = sums.evidence()
    x, float_x = (torch.cat([part.reshape(-1, K) for part in parts]).double() for parts in (texts, references))
    assert sums.tokens == len(x) == 14 and sums.finite
    want = {"mean_square": x.square().mean(0), "max_abs": x.abs().amax(0), "mean_abs": x.abs().mean(0)}
    for name, due in want.items():
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), due, rtol=2**-23, atol=0)
    assert found.gram is not None and found.gram.dtype == torch.float64
    # Products of a batch are added up in float32: at most 14 of them.
    w = torch.ones(14, 1).double() if weights is None else weights.double().unsqueeze(-1)
    size = float((w * x.square()).sum(0).max()) / 14
    torch.testing.assert_close(found.gram, (w * x).t() @ x / 14, rtol=0, atol=16 * 2**-24 * size)
    assert torch.equal(found.gram, found.gram.t())
    if cross:
        difference = float_x - x
        bound = 18 * 2**-24 * float(difference.abs().t().mm(w * x.abs()).max()) / 14
        torch.testing.assert_close(sums.cross(), difference.t() @ (w * x) / 14, rtol=0, atol=bound)
        with pytest.raises(AssertionError, match="it was asked for"):
            sums.cross()
        beside = 2 * float_x[:, :3]
        bound = 18 * 2**-24 * float(beside.abs().t().mm(w * x.abs()).max()) / 14
        torch.testing.assert_close(sums.beside(), beside.t() @ (w * x) / 14, rtol=0, atol=bound)


@pytest.mark.parametrize("wanted", [set(), {"max_abs"}, {"gram"}, {"mean_abs", "mean_square"}])
def test_only_what_is_wanted_is_told(wanted: set[str]) -> None:
    with Workers(1) as workers:
        sums = Sums(K, wanted, workers)
        sums.add(random(3, K))
        found = sums.evidence()
        assert {name for name in EVERY if getattr(found, name) is not None} == wanted
        assert sums.evidence().gram is None, "it is handed over once"


@pytest.mark.parametrize("cut", [1, 7, 16, 1000, 20000])
@pytest.mark.parametrize(("count", "spacing"), [(1, 16), (17, 16), (16 * 512, 16), (16 * 512 + 1, 32), (20000, 64)])
def test_a_sample_is_evenly_spaced_however_the_text_is_cut(count: int, spacing: int, cut: int) -> None:
    x = torch.arange(float(count))[:, None].expand(count, 2)
    with Workers(1) as workers:
        sums = Sums(2, {"sample"}, workers)
        for part in x.split(cut):
            sums.add(part)
        sample = sums.evidence().sample
    assert sample is not None and len(sample) <= module.SAMPLE
    assert torch.equal(sample, x[::spacing])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_noticed(value: float) -> None:
    with Workers(1) as workers:
        sums = Sums(K, set(), workers)
        sums.add(random(3, K))
        assert sums.finite
        broken = random(3, K)
        broken[1, 4] = value
        sums.add(broken)
    assert not sums.finite


def test_stored_statistics_may_be_used_up() -> None:
    program = canonical("llama")
    program = lower(program, "calibrate{gram=true}", calibration(program))
    node = sites(program)[0]
    stored = {name: program.store.load(key) for name, key in node.meta[STATISTICS].items()}
    before = stored["gram"].clone()
    for _ in range(2):
        own = OwnEvidence.stored(program, node, {"gram", "max_abs"})
        assert own.mean_square is None and own.mean_abs is None
        assert own.max_abs is not None and torch.equal(own.max_abs, stored["max_abs"])
        gram = own.take_gram()
        assert gram.dtype == torch.float64 and torch.equal(gram, before.double())
        changed(gram)
    assert torch.equal(program.store.load(node.meta[STATISTICS]["gram"]), before)


@pytest.mark.parametrize("at_once", [True, False])
def test_small_values_are_not_lost_beside_large_ones(at_once: bool) -> None:
    """2²⁴ + 5·1 over six tokens: in float32 the ones would vanish one by one."""
    x = torch.tensor([2.0**24, 1, 1, 1, 1, 1])[:, None].expand(6, 2).clone()
    x[:, 1] = x[:, 1].sqrt()
    with Workers(1) as workers:
        sums = Sums(2, {"mean_abs", "mean_square"}, workers)
        for part in [x] if at_once else x.split(1):
            sums.add(part)
        found = sums.evidence()
    assert found.mean_abs is not None and found.mean_square is not None
    want = torch.tensor((2**24 + 5) / 6)
    assert float(found.mean_abs[0]) == float(found.mean_square[1]) == float(want)

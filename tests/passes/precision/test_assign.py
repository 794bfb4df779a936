"""assign and override: formats under a budget, against brute force."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from torch import fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format
from hikui.lowering.ir import sizes
from hikui.lowering.ir.program import FORMAT, GROUP, SENSITIVITY, SITE, Program
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Assign, Override
from hikui.passes.graph import matrix_shape, sites
from hikui.passes.precision.budget import Candidates, cheapest, solve, spend_at_random
from hikui.passes.precision.latency import Speeds
from tests.passes.helpers import assert_settled, calibration, canonical, check, lower


def choices_of(nbytes: list[list[int]], costs: list[list[float]]) -> list[Candidates]:
    return [
        Candidates((f"s{i}",), tuple(f"f{j}" for j in range(len(sizes_))), tuple(sizes_), tuple(cost), 100)
        for i, (sizes_, cost) in enumerate(zip(nbytes, costs, strict=True))
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 8),
    formats=st.integers(1, 3),
    size=st.sampled_from([1e-9, 1.0, 1e9]),
)
def test_solve_against_brute_force(seed: int, groups: int, formats: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    nbytes = generator.integers(1, 10_000, (groups, formats))
    costs = generator.random((groups, formats)) * size
    choices = choices_of(nbytes.tolist(), costs.tolist())
    low, high = nbytes.min(1).sum(), nbytes.max(1).sum()
    budget = int(generator.integers(low, high + 1))
    best = min(
        costs[range(groups), pick].sum()
        for pick in itertools.product(range(formats), repeat=groups)
        if nbytes[range(groups), pick].sum() <= budget
    )
    picks = solve(choices, budget)
    assert nbytes[range(groups), picks].sum() <= budget
    assert costs[range(groups), picks].sum() <= best + 1e-6 * costs.max()


def test_budget_is_met_to_the_byte() -> None:
    sizes_ = [[10**9, 2 * 10**9 + 1], [10**9, 2 * 10**9]]
    picks = solve(choices_of(sizes_, [[1.0, 0.0], [0.9, 0.0]]), 3 * 10**9)
    assert picks == [0, 1]


def test_one_byte_too_many_forbids_no_more_than_these_picks_together() -> None:
    """The solver's tolerance lets 3·10⁹ + 1 bytes through; all that may change is the first group's pick."""
    sizes_ = [[10**9, 2 * 10**9 + 1], [10**9], [0]]
    assert solve(choices_of(sizes_, [[1.0, 0.0], [0.0], [0.0]]), 3 * 10**9) == [0, 0, 0]
    assert solve(choices_of(sizes_, [[1.0, 0.0], [0.0], [0.0]]), 3 * 10**9 + 1) == [1, 0, 0]


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(HikuiError, match=r"^The solver found no assignment within the budget: .*infeasible"):
        solve(choices_of([[2, 3], [2, 4]], [[1.0, 0.0], [1.0, 0.0]]), 3)


@pytest.mark.parametrize("seed", [1, 8, 9])
def test_many_groups_against_dynamic_programming(seed: int) -> None:
    """Costs follow the bytes but for a thousandth: a solver that stops at its usual gap of 10⁻⁴ misses the best."""
    generator = np.random.default_rng(seed)
    nbytes = generator.integers(200, 400, (40, 1)) * np.array([[2, 3, 4, 8]]) // 2 + generator.integers(0, 20, (40, 4))
    costs = (3200 - nbytes) * (1 + 1e-3 * generator.random((40, 4)))
    low, high = nbytes.min(1).sum(), nbytes.max(1).sum()
    budget = int(low + 0.4 * (high - low))
    least = np.zeros(budget + 1)
    for sizes_, losses in zip(nbytes, costs, strict=True):
        after = np.full(budget + 1, np.inf)
        for size, loss_ in zip(sizes_, losses, strict=True):
            after[size:] = np.minimum(after[size:], least[: budget + 1 - size] + loss_)
        least = after
    picks = solve(choices_of(nbytes.tolist(), costs.tolist()), budget)
    assert nbytes[range(40), picks].sum() <= budget
    # Costs enter the solver in units of the largest loss, with its tolerance of 10⁻⁶ for each of them.
    assert costs[range(40), picks].sum() <= least[budget] + 40 * 1e-6 * float(np.ptp(costs, axis=1).max())


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    choices = []
    for _ in range(64):
        for weights in (3 * 4096**2, 4096**2, 2 * 11008 * 4096, 11008 * 4096):
            bits, cost = (4.25, 8.25, 4.5), generator.lognormal(-5, 0.7)
            costs = tuple(cost * 4.0**-b * generator.uniform(0.9, 1.1) for b in bits)
            choices.append(
                Candidates(("s",), tuple(map(str, bits)), tuple(int(weights * b / 8) for b in bits), costs, weights)
            )
    print("before")
    picks = solve(choices, int(7.123 * sum(choice.weights for choice in choices) / 8))
    print("after")
    assert len(picks) == 256
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    assert not err


def test_alike_groups_are_served_in_order() -> None:
    assert solve(choices_of([[1, 2]] * 6, [[5.0, 1.0]] * 6), 9) == [1, 1, 1, 0, 0, 0]


def test_cheapest_breaks_ties_by_cost() -> None:
    assert cheapest(choices_of([[4, 3, 3]], [[0.0, 2.0, 1.0]])) == [2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 12))
def test_random_spending_fits_and_is_used_up(seed: int, groups: int) -> None:
    generator = np.random.default_rng(seed)
    nbytes = np.sort(generator.integers(1, 1000, (groups, 3)), axis=1)
    choices = choices_of(nbytes.tolist(), nbytes.astype(float).tolist())
    budget = int(generator.integers(nbytes[:, 0].sum(), nbytes[:, 2].sum() + 1))
    picks = spend_at_random(choices, budget, np.random.default_rng(seed))
    left = budget - nbytes[range(groups), picks].sum()
    assert left >= 0
    # A group that was left at its smallest could not be raised even now: what is left only shrinks.
    for row, pick in zip(nbytes, picks, strict=True):
        if pick == 0 and row[1] > row[0]:
            assert row[1] - row[0] > left


@pytest.mark.parametrize(("budget", "picks"), [(1, [0]), (2, [0]), (3, [1])])
def test_random_spending_may_use_the_last_byte(budget: int, picks: list[int]) -> None:
    assert spend_at_random(choices_of([[1, 3]], [[1.0, 0.0]]), budget, np.random.default_rng(0)) == picks


def assigned(options: str, before: str = "") -> Program:
    program = canonical("llama")
    formats = "formats=int4-g32|int8-channel"
    pipeline = f"calibrate,sensitivity{{{formats}}},{before}assign{{{formats},{options}}}"
    return lower(program, pipeline, calibration(program))


def loss(program: Program) -> float:
    return sum(float(node.meta[SENSITIVITY][node.meta[FORMAT]]) for node in sites(program))


@pytest.mark.parametrize("mode", ["optimal", "random,seed=3"])
@pytest.mark.parametrize("target", [6.1, 7.3, 9.5])
def test_the_budget_and_the_bits_really_stored(mode: str, target: float) -> None:
    program = assigned(f"target_bpw={target},mode={mode}")
    assert target < 7 or any(len(formats) > 1 for formats in by_group(program).values())
    stored = sizes.measure(lower(program, "rtn,activation,fuse,dead_code"))
    assert stored.true_bpw <= target
    assert {site.name: site.format for site in stored.sites} == {n.meta[SITE]: n.meta[FORMAT] for n in sites(program)}


def by_group(program: Program) -> dict[str, set[str]]:
    """The formats that sites have which read one activation."""
    found: dict[str, set[str]] = {}
    for node in sites(program):
        found.setdefault(node.meta[GROUP], set()).add(node.meta[FORMAT])
    return found


@pytest.mark.parametrize("mode", ["optimal", "random,seed=3"])
@pytest.mark.parametrize("target", [2.6, 3.6])
def test_sites_that_share_an_order_of_columns_are_alike(mode: str, target: float) -> None:
    program = canonical("llama")
    formats = "formats=mixed-g32-c32|sign-g32|int4-g32"
    program = lower(
        program,
        f"calibrate,sensitivity{{{formats}}},assign{{{formats},target_bpw={target},mode={mode}}}",
        calibration(program),
    )
    assert all(len(held) == 1 for held in by_group(program).values())
    assert sizes.measure(lower(program, "rtn,activation,fuse,dead_code")).true_bpw <= target


@pytest.mark.parametrize("target", [6.3, 7.3])
def test_a_budget_for_blocks_alone(target: float) -> None:
    program = assigned(f"target_bpw={target},over=blocks")
    assert {node.meta[SITE] for node in sites(program) if FORMAT not in node.meta} == {"lm_head"}
    stored = sizes.measure(lower(program, "rtn{bits=8},activation,fuse,dead_code"))
    assert target - 1 < stored.block_bpw <= target
    with pytest.raises(HikuiError, match="There is no unpacked linear site in a block"):
        lower(lower(program, "rtn{sites=layers}"), "assign{mode=uniform,over=blocks}")


_TIMED = "formats=sign-g32|int3-g32|int4-g32|int8-g32"
_SPEEDS = "int8=4|int4=10|int3=5|sign=20"
"""Three bits are slower than four here: what takes fewer bytes need not take less time."""


def timed(target: float) -> Program:
    program = canonical("llama")
    return lower(
        program,
        f"calibrate,sensitivity{{{_TIMED}}},assign{{{_TIMED},target_latency={target},speeds={_quoted(_SPEEDS)}}}",
        calibration(program),
    )


def _quoted(text: str) -> str:
    return f'"{text}"'


def test_a_budget_of_milliseconds_against_every_choice() -> None:
    """On the first four sites of a model; the others have their format."""
    every = timed(1e9)
    speeds = Speeds.parse(_SPEEDS)
    nodes = sites(every)
    assert {node.meta[FORMAT] for node in nodes} == {"int8-g32"}
    chosen = nodes[:4]
    fixed = "|".join(node.meta[SITE] for node in nodes[4:])
    names = _TIMED.removeprefix("formats=").split("|")

    def times(name: str, node: fx.Node) -> int:
        return speeds.picoseconds(Format.parse(name), *matrix_shape(node))

    rest = sum(times("int4-g32", node) for node in nodes[4:])
    least = sum(times("sign-g32", node) for node in chosen)
    most = sum(times("int8-g32", node) for node in chosen)
    for share in (0.0, 0.2, 0.5, 0.8):
        budget = rest + least + math.ceil(share * (most - least))
        program = lower(
            canonical("llama"),
            f"calibrate,sensitivity{{{_TIMED}}},override{{sites=^({fixed})$,format=int4-g32}},"
            f"assign{{{_TIMED},target_latency={budget / 1e9!r},speeds={_quoted(_SPEEDS)}}}",
            calibration(canonical("llama")),
        )
        picked = {node.meta[SITE]: node for node in sites(program)}
        loss_of = sum(picked[n.meta[SITE]].meta[SENSITIVITY][picked[n.meta[SITE]].meta[FORMAT]] for n in chosen)
        best = min(
            sum(picked[n.meta[SITE]].meta[SENSITIVITY][name] for n, name in zip(chosen, pick, strict=True))
            for pick in itertools.product(names, repeat=4)
            if rest + sum(times(name, n) for n, name in zip(chosen, pick, strict=True)) <= budget
        )
        assert loss_of == pytest.approx(best, rel=1e-6)
        # int3 takes longer than int4 and loses more.
        assert all(picked[n.meta[SITE]].meta[FORMAT] != "int3-g32" for n in chosen)


def test_a_budget_of_milliseconds_that_cannot_be_met_names_the_shortest() -> None:
    with pytest.raises(HikuiError, match=r"A budget of 1e-05 ms cannot be met: .* take at least [0-9.]+ ms") as caught:
        timed(1e-5)
    shortest = float(str(caught.value).split("at least ")[1].split(" ms")[0])
    timed(shortest)


def test_speeds_that_are_missing_are_named() -> None:
    with pytest.raises(UsageError, match="assign cannot keep to 1 ms, for speeds says nothing of int8"):
        parse_pipeline('assign{formats=int4-g64|int8-g64,target_latency=1,speeds="int4=3"}', PASSES)
    with pytest.raises(UsageError, match="assign cannot keep to -1 ms; target_latency is above 0"):
        parse_pipeline("assign{target_latency=-1}", PASSES)
    with pytest.raises(UsageError, match="assign keeps to one budget"):
        parse_pipeline('assign{target_latency=1,target_size=1,speeds="int4=3|int8=1"}', PASSES)
    program = canonical("llama")
    with pytest.raises(HikuiError, match="An `override` asks for nf4, of which assign's speeds say nothing"):
        lower(
            program,
            f"calibrate,sensitivity{{{_TIMED}}},override{{sites=lm_head,format=nf4-g32}},"
            f"assign{{{_TIMED},target_latency=1,speeds={_quoted(_SPEEDS)}}}",
            calibration(program),
        )


@pytest.mark.parametrize("target", [2.6, 3.6, 4.6])
def test_candidates_of_every_kind(target: float) -> None:
    program = canonical("llama")
    formats = "formats=sign-g32|mixed-g32-c32|ternary-g32|int2-g32|int3-g32|nf4-g32|int4-g32"
    program = lower(
        program, f"calibrate,sensitivity{{{formats}}},assign{{{formats},target_bpw={target}}}", calibration(program)
    )
    assert len({node.meta[FORMAT] for node in sites(program)}) > 1
    stored = sizes.measure(lower(program, "rtn,activation,fuse,dead_code"))
    assert target - 0.5 < stored.true_bpw <= target


def test_more_budget_never_costs_more_and_chance_never_wins() -> None:
    losses = [loss(assigned(f"target_bpw={target}")) for target in (6.1, 6.6, 7.3, 8.0, 9.5, 12.0)]
    assert losses == sorted(losses, reverse=True)
    best = loss(assigned("target_bpw=7.3"))
    by_chance = [loss(assigned(f"target_bpw=7.3,mode=random,seed={seed}")) for seed in range(4)]
    assert min(by_chance) >= best
    assert len(set(by_chance)) > 1


def test_infeasible_budget_names_the_smallest() -> None:
    with pytest.raises(HikuiError, match=r"A budget of 3 bits .* smallest that can is ([0-9.]+);") as caught:
        assigned("target_bpw=3")
    smallest = float(str(caught.value).split("smallest that can is ")[1].split(";")[0])
    assigned(f"target_bpw={smallest}")
    with pytest.raises(HikuiError):
        assigned(f"target_bpw={smallest - 0.01}")


def test_override_wins_and_counts() -> None:
    program = assigned(
        "target_bpw=7.5", "override{sites=lm_head,format=int8-g32},override{sites=.,format=int4-channel},"
    )
    formats = {node.meta[SITE]: node.meta[FORMAT] for node in sites(program)}
    assert formats.pop("lm_head") == "int8-g32"
    assert set(formats.values()) == {"int4-channel"}
    assert_settled(Override("lm_head", "int8-g64"), program)
    with pytest.raises(HikuiError, match="cannot be met"):
        assigned("target_bpw=6.4", "override{sites=.,format=int8-g32},")


def test_override_of_one_tied_site_leaves_the_others_tied() -> None:
    program, formats = canonical("llama"), "formats=mixed-g32-c32|int8-channel"
    program = lower(
        program,
        f"calibrate,sensitivity{{{formats}}},override{{sites=layers.0.self_attn.k_proj,format=float16}},"
        f"assign{{{formats},target_bpw=7.5}}",
        calibration(program),
    )
    found = {node.meta[SITE]: node.meta[FORMAT] for node in sites(program)}
    assert found["model.layers.0.self_attn.k_proj"] == "float16"
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.self_attn.v_proj"] != "float16"


def test_override_that_finds_nothing() -> None:
    with pytest.raises(HikuiError, match=r"No site matches 'head\$x'; sites are called for example .*lm_head"):
        lower(canonical("llama"), "override{sites=head$x}")
    lower(canonical("llama"), "override{sites=head$x,required=false}")
    with pytest.raises(UsageError, match="Format 'int9' is not known"):
        parse_pipeline("override{format=int9}", PASSES)


def test_uniform_and_text() -> None:
    check(
        lower(canonical("qwen2"), "assign{mode=uniform,format=int8-g128}"),
        """
        // CHECK-COUNT-15: aten.linear({{.*}}format=int8-g128
        // CHECK-NOT: aten.linear
        """,
    )


@pytest.mark.parametrize("mode", ["optimal", "random", "uniform"])
def test_second_run_changes_nothing(mode: str) -> None:
    program = assigned(f"target_bpw=7.3,mode={mode}")
    assert_settled(Assign(7.3, "int4-g32|int8-channel", mode), program)  # type: ignore[arg-type]


def test_missing_sensitivity_is_named() -> None:
    with pytest.raises(HikuiError, match=r"q_proj has no sensitivity for int8-g32; run `sensitivity`"):
        lower(canonical("llama"), "sensitivity{metric=weight},assign{formats=int4-g64|int8-g32}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("over", ["all", "blocks", "packed head"])
@pytest.mark.parametrize("room", [1.02, 1.2])
def test_a_budget_for_everything_stored(family: str, over: str, room: float) -> None:
    """In bytes of the weights as they are lowered: heads tied or not, tables, positions and norms too."""
    program, formats = canonical(family), "formats=sign-g32|int4-g32|int8-channel"
    head = {
        "blocks": ",override{sites=lm_head,format=int8-channel}",
        "packed head": ",rtn{sites=lm_head,format=int8-channel}",
    }.get(over, "")
    over = over.replace("packed head", "blocks")
    measured = lower(program, f"calibrate,sensitivity{{{formats}}}{head}", calibration(program))
    rest = "rtn,pack{format=float32},embedding,activation,fuse,dead_code"
    smallest = sizes.measure(lower(measured, f"assign{{mode=uniform,format=sign-g32,over={over}}},{rest}")).total_bytes
    budget = smallest * room / 1e6
    chosen = lower(measured, f"assign{{{formats},target_size={budget!r},over={over}}},{rest}")
    taken = sizes.measure(chosen).total_bytes
    assert taken <= budget * 1e6
    # No site could be larger: what is left is less than the smallest step of any.
    steps = []
    for site in sizes.measure(chosen).sites:
        names = ["sign-g32", "int4-g32", "int8-channel"]
        if site.in_block and site.format != names[-1]:
            larger = Format.parse(names[names.index(site.format) + 1]).nbytes(site.out_features, site.in_features)
            steps.append(larger - site.nbytes)
    assert budget * 1e6 - taken < min(steps)
    with pytest.raises(HikuiError, match=r"A budget of .* MB cannot be met: .* take at least ([0-9.]+) MB"):
        lower(measured, f"assign{{{formats},target_size={smallest / 2e6!r},over={over}}}")


def test_a_size_needs_the_formats_of_all_other_sites() -> None:
    with pytest.raises(HikuiError, match="Site lm_head has no format yet, so what it will take is not known"):
        assigned("target_size=0.5,over=blocks")
    with pytest.raises(UsageError, match="assign cannot keep to -1 MB; target_size is above 0, or 0 for none"):
        Assign(target_size=-1.0)

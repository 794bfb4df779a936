"""factorise: two products with signs in the place of one with floats, and what other passes make of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from hikui.lowering.artefact.report import site_reports
from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format
from hikui.lowering.ir import sizes
from hikui.lowering.ir.factored import FactoredLinear, is_left_factor
from hikui.lowering.ir.float_matrix import float_matrix
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import FORMAT, SENSITIVITY, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.lowering.progress import no_progress
from hikui.passes import PASSES, Factorise, Override, Pack, Qat, Rtn, SubBranch, Trial
from hikui.passes.graph import aten, float_sites, hikui, matrix_shape
from tests.passes.helpers import (
    assert_same,
    assert_settled,
    calibration,
    calls,
    canonical,
    lower,
    program_of,
    random,
    run,
)

BLOCKS = "factorise{bits=3,iterations=20,skip=lm_head}"


def linear(weight: Tensor, bias: Tensor) -> Program:
    def body(x: Tensor, a__weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, a__weight, bias)

    return program_of(body, embedding=random(24, weight.shape[1]), a__weight=weight, bias=bias)


def factored(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if is_left_factor(node)]


def test_the_two_products_are_the_one_with_their_dense_matrix() -> None:
    weight, bias = random(40, 72, seed=1), random(40, seed=2)
    program = lower(linear(weight, bias), "canonicalise,factorise{bits=4,iterations=30}")
    (left,) = factored(program)
    both, store = FactoredLinear.of(left), program.store
    u, v = both.left.dense(store).double(), both.right.dense(store).double()
    scale = store.load(program.weight_of(both.columns)).double()
    dense = u @ v * scale
    torch.testing.assert_close(both.dense(store).double(), dense, rtol=1e-5, atol=1e-6)
    assert both.left.format == both.right.format == Format("sign")
    assert torch.equal(u.abs(), u.abs()[:, :1].expand_as(u)), "signs have a scale a row"
    x, tokens = random(24, 72), torch.arange(10)[None]
    want = F.linear(x[tokens[0]].double(), dense, bias.double())
    torch.testing.assert_close(run(program, tokens)[0][0].double(), want, rtol=1e-4, atol=1e-4)
    # A rank of 32 leaves as much of Gaussian weights as 1.4 bits must.
    assert float((dense - weight).norm() / weight.norm()) < 0.53


@pytest.mark.parametrize("bits", [1.5, 3.0, 4.0])
def test_the_bits_are_kept_and_counted(bits: float) -> None:
    program = canonical("llama")
    fmt = Format("factors", rate=bits)
    out = lower(program, f"factorise{{bits={bits:g},iterations=2,rounds=1,skip=lm_head}}")
    measured = {site.name: site for site in sizes.measure(out).sites}
    for node in float_sites(program):
        n, k = matrix_shape(node)
        site = measured[node.meta[SITE]]
        assert (site.out_features, site.in_features) == (n, k)
        if "lm_head" in site.name:
            continue
        assert site.format == f"factors-r{fmt.rank(n, k)}" and site.nbytes == fmt.nbytes(n, k)
        stored = {out.weight_of(node): node for node in FactoredLinear.of(named(out, site.name)).stored()}
        assert site.nbytes == sum(out.store.load(key).nbytes for key in stored)
        assert fmt.rank(n, k) == 32 or site.true_bits <= bits
    assert len(measured) == len(float_sites(program))
    assert sizes.measure(out).parameters == sizes.measure(program).parameters


def test_the_parameters_of_a_text_are_those_that_factors_stand_for() -> None:
    counts = []
    for step in ("factorise{iterations=2,rounds=0}", "rtn"):
        program = lower(canonical("llama"), f"{step},pack,dead_code")
        program.parameters = None
        counts.append(sizes.measure(program).parameters)
    assert counts[0] == counts[1]


def named(program: Program, site: str) -> fx.Node:
    return next(node for node in factored(program) if node.meta[SITE] == site)


def test_the_report_compares_what_the_factors_stand_for() -> None:
    program = canonical("llama")
    out = lower(program, f"{BLOCKS},pack,dead_code")
    reports = {site.name: site for site in site_reports(out, sizes.measure(out), program, no_progress)}
    node = factored(out)[0]
    weight = program.store.load(f"{node.meta[SITE]}.weight")
    error = float((FactoredLinear.of(node).dense(out.store) - weight).norm() / weight.norm())
    assert reports[node.meta[SITE]].weight_error == pytest.approx(error, rel=1e-2)
    assert not any(name.endswith(".right") for name in reports)


def test_as_floats_the_model_is_the_float_model() -> None:
    program = canonical("llama")
    out = lower(program, f"calibrate{{gram=true}},{BLOCKS}", calibration(program))
    texts = list(calibration(program).chunks)
    logits = []
    for each, as_float in ((program, False), (out, True), (out, False)):
        found: list[Tensor] = []

        def keep(_: int, args: object, result: object, found: list[Tensor] = found) -> None:
            assert isinstance(result, Tensor)
            found.append(result)

        with Stream(each, texts, as_float=as_float) as stream:
            stream.advance(None, {each.outputs()[0]: keep})
        logits.append(torch.cat(found, 1))
    exact, floats, rounded = logits
    assert float((floats - exact).abs().max()) < 1e-4 * float(exact.abs().max())
    assert float((rounded - exact).abs().max()) > 1e-2 * float(exact.abs().max())


def test_columns_of_zeros_leave_the_float_model_as_it_is() -> None:
    weight = random(40, 72, seed=1)
    weight[:, 5] = 0.0
    program = lower(linear(weight, torch.zeros(40)), "canonicalise,factorise{bits=4}")
    (left,) = factored(program)
    scale = program.store.load(program.weight_of(FactoredLinear.of(left).columns))
    assert bool((scale != 0).all())
    exact = float_matrix(left, program.store) * scale
    torch.testing.assert_close(exact, weight)
    assert float(FactoredLinear.of(left).dense(program.store)[:, 5].abs().max()) < 1e-3


def test_the_gram_matrix_helps_the_output() -> None:
    program = canonical("llama")
    data, want = calibration(program, 6, 40), run(program)[0]
    errors = []
    for before in ("", "calibrate,", "calibrate{gram=true},"):
        out = lower(program, f"{before}{BLOCKS}", data)
        errors.append(float((run(out)[0] - want).norm()))
    assert errors[2] < errors[1] and errors[2] < errors[0]


def test_sites_of_other_formats_are_left_and_others_leave_factors() -> None:
    program = canonical("llama")
    work = Override("q_proj", "factors-2").run(program, PassContext()).program
    work = Override("k_proj", "int8-g32").run(work, PassContext()).program
    assert all(not node.meta[SITE].endswith("q_proj") for node in Rtn().chosen(work))
    taken = {node.meta[SITE].rpartition(".")[2] for node in Factorise().chosen(work)}
    assert "q_proj" in taken and "v_proj" in taken and "k_proj" not in taken
    out = lower(work, "factorise{sites=q_proj,iterations=3},rtn")
    formats = {site.name.rpartition(".")[2]: site.format for site in sizes.measure(out).sites}
    (q, *_) = [node for node in float_sites(work) if node.meta[SITE].endswith("q_proj")]
    assert formats["q_proj"] == f"factors-r{Format.parse('factors-2').rank(*matrix_shape(q))}"
    assert formats["k_proj"] == "int8-g32" and formats["v_proj"].startswith("int4")
    with pytest.raises(HikuiError, match="is to become factors-2, and nothing has factorised it"):
        Pack().requires(work)


def test_assignment_weighs_factors_by_trial() -> None:
    program = canonical("llama")
    data = calibration(program)
    formats = "sign-channel|factors-r32|int8-channel"
    tried = Trial(formats, texts=1, skip="lm_head").run(program, PassContext(data)).program
    costs = [node.meta[SENSITIVITY] for node in float_sites(tried) if "lm_head" not in node.meta[SITE]]
    signs, factors, wide = (sum(cost[name] for cost in costs) for name in formats.split("|"))
    assert wide < factors < signs
    assigned = lower(tried, f"assign{{formats={formats},target_bpw=3,over=blocks}}")
    chosen = {node.meta[FORMAT] for node in float_sites(assigned) if FORMAT in node.meta}
    assert any(name.startswith("factors") for name in chosen)
    out = lower(assigned, "factorise{iterations=20,skip=lm_head},rtn{skip=lm_head}")
    assert sizes.measure(out).block_bpw <= 3.0


def test_training_turns_both_factors_and_all_scales() -> None:
    program = canonical("llama")
    data = calibration(program, 9, 24)
    start = lower(program, f"calibrate{{gram=true}},{BLOCKS}", data)
    result = Qat(lr=0.05, scale_lr=0.01, epochs=3).run(start, PassContext(data))
    assert result.modified, result.notes
    changed = {"left": 0, "right": 0, "scales": 0}
    for before, after in zip(factored(start), factored(result.program), strict=True):
        one, two = FactoredLinear.of(before), FactoredLinear.of(after)
        pairs = [("left", one.left.weight, two.left.weight), ("right", one.right.weight, two.right.weight)]
        pairs += [("scales", mine, theirs) for mine, theirs in zip(one.stored(), two.stored(), strict=True)]
        for name, mine, theirs in pairs:
            was = start.store.load(start.weight_of(mine))
            changed[name] += not torch.equal(was, result.program.store.load(result.program.weight_of(theirs)))
    assert min(changed.values()) > len(factored(start)) // 2, changed


def test_activations_are_rounded_twice() -> None:
    out = lower(canonical("llama"), f"{BLOCKS},rtn,activation,fuse,pack,dead_code")
    left = factored(out)
    assert left and all(node.target is hikui.linear_a8.default for node in left)
    for node in left:
        both = FactoredLinear.of(node)
        assert both.right.node.target is hikui.linear_a8.default and both.right.rows == both.rank
        assert both.scaled.target is aten.mul.Tensor
    floats = lower(canonical("llama"), f"{BLOCKS},rtn,pack,dead_code")
    assert_same(out, floats, 0.1)
    assert not calls(out, aten.linear.default)


def test_corrected_sites_make_up_for_those_before_them() -> None:
    program = canonical("llama")
    data = calibration(program, 12, 40)
    errors = []
    for steps in (BLOCKS.replace("}", ",inputs=quantised}"), f"qep{{alpha=1,skip=lm_head}},{BLOCKS}"):
        out = lower(program, steps, data)
        errors.append(sum(float((run(out, text)[0] - run(program, text)[0]).norm()) for text in data.chunks))
    assert errors[1] < 0.8 * errors[0]


def test_it_needs_text_where_it_measures_by_itself() -> None:
    assert Factorise(inputs="quantised").calibrates and not Factorise().calibrates
    with pytest.raises(HikuiError, match="follows real text"):
        Factorise(inputs="quantised").run(canonical("llama"), PassContext())


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = canonical("llama")
    (step,) = parse_pipeline(BLOCKS, PASSES)
    first = step.run(program, PassContext(resume=Resume(tmp_path))).program

    def refused(*_: object) -> None:
        raise AssertionError("what is finished is not made again")

    monkeypatch.setattr("hikui.passes.quantise.factorise.factorise", refused)
    again = step.run(program, PassContext(resume=Resume(tmp_path))).program
    assert all(torch.equal(first.store.load(key), again.store.load(key)) for key in first.store.keys())


def test_workers_do_not_matter() -> None:
    program = canonical("opt")
    (step,) = parse_pipeline(BLOCKS, PASSES)
    one, three = (step.run(program, PassContext(workers=count)).program for count in (1, 3))
    assert one.store.keys() == three.store.keys()
    assert all(torch.equal(one.store.load(key), three.store.load(key)) for key in one.store.keys())


def test_seeds_differ() -> None:
    program = canonical("llama")
    one, two = (lower(program, f"factorise{{iterations=3,seed={seed},sites=q_proj}}") for seed in (0, 1))
    keys = [key for key in one.store.keys() if key.endswith(".left")]
    assert keys and not any(torch.equal(one.store.load(key), two.store.load(key)) for key in keys)


def test_a_second_run_finds_nothing() -> None:
    program = lower(canonical("llama"), "factorise{iterations=2}")
    assert not float_sites(program)
    assert_settled(Factorise(), program)


def test_huge_and_tiny_matrices_fit_float16() -> None:
    for size in (1e-12, 1e12):
        program = lower(linear(size * random(40, 72, seed=1), torch.zeros(40)), "canonicalise,factorise{bits=4}")
        (left,) = factored(program)
        for packed in (FactoredLinear.of(left).left, FactoredLinear.of(left).right):
            assert packed.scale is not None
            scale = program.store.load(program.weight_of(packed.scale)).float()
            assert bool(scale.isfinite().all()) and 0.5 < float(scale.abs().max()) < 2
        dense = FactoredLinear.of(left).dense(program.store)
        assert float((dense / size - random(40, 72, seed=1)).norm()) < 0.5 * float(random(40, 72, seed=1).norm())


def test_latents_stand_on_the_side_of_their_signs() -> None:
    program = lower(canonical("llama"), BLOCKS)
    for node in factored(program):
        both = FactoredLinear.of(node)
        for packed in (both.left, both.right):
            assert torch.equal(packed.latent(program.store) >= 0, packed.dense(program.store) >= 0)


def test_bad_options_are_refused() -> None:
    for text in ("factorise{bits=0}", "factorise{bits=4.5}"):
        with pytest.raises(UsageError, match="factorise cannot take"):
            parse_pipeline(text, PASSES)
    with pytest.raises(UsageError, match="factorise cannot take 0 iterations"):
        Factorise(iterations=0)
    with pytest.raises(UsageError, match="factorise cannot take -1 rounds"):
        Factorise(rounds=-1)
    with pytest.raises(UsageError, match="rtn rounds one matrix, and factors-1.6 is of two"):
        Rtn(format="factors-1.6")
    for text in ("embedding{format=factors-1}", "rotate{ends=factors-1}", "assign{tables=factors-1}"):
        with pytest.raises(UsageError, match="columns are all alike|of one kind|all columns alike"):
            parse_pipeline(text, PASSES)
    with pytest.raises(UsageError, match="factors-2 is of two matrices"):
        parse_pipeline("sensitivity{formats=factors-2|int4-g64}", PASSES)


def test_a_branch_passes_factors_by() -> None:
    program = lower(canonical("llama"), "calibrate,factorise{iterations=2}", calibration(canonical("llama")))
    with pytest.raises(HikuiError, match="No site with integer weights is left"):
        SubBranch().requires(program)


def test_a_rank_above_the_most_names_the_most() -> None:
    program = Override("q_proj", "factors-r4096").run(canonical("llama"), PassContext()).program
    with pytest.raises(UsageError, match=r"takes more than 4 bits .*; its rank is \d+ at most"):
        Factorise().run(program, PassContext())


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = random(40, 72)
    weight[3, 4] = float("nan")
    program = lower(linear(weight, torch.zeros(40)), "canonicalise")
    with pytest.raises(HikuiError, match="Site a: 1 of 2880 values"):
        Factorise().run(program, PassContext())


def test_a_pipeline_with_a_rotation_and_equalised_columns_takes_them() -> None:
    program = canonical("llama")
    data = calibration(program)
    steps = f"rotate,calibrate{{gram=true}},awq,{BLOCKS},gptq{{bits=8,group=0}},distil,activation,fuse,pack,dead_code"
    out = Pipeline(parse_pipeline(steps, PASSES)).run(program, PassContext(data))
    assert bool(run(out)[0].isfinite().all())
    assert PackedLinear.of(factored(out)[0]).format == Format("sign")

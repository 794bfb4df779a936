"""override: which sites get the format, and what is refused."""

import pytest

from hikui.lowering.app.request import available_passes
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.program import FIXED, FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.recipe import parse
from hikui.passes import Override
from hikui.passes.graph import pattern, sites
from tests.passes.helpers import assert_settled, canonical, lower, program_of, random

Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


def formats(program: Program, key: str = FORMAT) -> dict[str, str]:
    return {node.meta[SITE]: node.meta[key] for node in sites(program) if key in node.meta}


def test_the_sites_that_match_get_the_format_and_no_others() -> None:
    program = canonical("llama")
    result = Override("q_proj$", "int8-g32").run(program, PassContext())
    assert result.modified
    assert formats(result.program) == formats(result.program, FIXED) == dict.fromkeys(Q, "int8-g32")
    assert result.notes == [f"{name}: int8-g32" for name in Q]
    assert formats(program) == {}, "the program before is as it was"
    assert_settled(Override("q_proj$", "int8-g32"), result.program)


def test_no_expression_is_every_site() -> None:
    out = Override().run(canonical("llama"), PassContext()).program
    assert formats(out) == {node.meta[SITE]: "int8-g64" for node in sites(out)}


def test_the_first_of_several_counts() -> None:
    out = lower(canonical("llama"), "override{sites=layers.1.*q_proj,format=float16},override{sites=q_proj}")
    assert formats(out) == {Q[0]: "int8-g64", Q[1]: "float16", Q[2]: "int8-g64"}
    assert_settled(Override("q_proj", "int4-g32"), out)


def test_it_stands_above_what_was_assigned_before() -> None:
    out = lower(canonical("llama"), "assign{mode=uniform,format=int4-g32},override{sites=lm_head,format=int8-g32}")
    assert formats(out).pop("lm_head") == "int8-g32"
    assert formats(out, FIXED) == {"lm_head": "int8-g32"}


def test_sites_that_are_packed_keep_what_they_are() -> None:
    packed = lower(canonical("llama"), "rtn{sites=q_proj}")
    out = Override("layers.0", "int8-g32").run(packed, PassContext()).program
    found = formats(out)
    assert found[Q[0]] == "int4-g64"
    assert found[Q[0].replace("q_proj", "k_proj")] == "int8-g32"
    # It is no error that every site that matches is packed, but there is nothing to do.
    assert_settled(Override("q_proj", "int8-g32"), packed)
    Override("q_proj", "int8-g32").requires(packed)


def test_a_format_is_written_in_its_one_way() -> None:
    out = Override("lm_head", " int8-g032 ").run(canonical("llama"), PassContext()).program
    assert formats(out) == formats(out, FIXED) == {"lm_head": "int8-g32"}


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="Option 'sites' is '\\(', which is not a regular expression"):
        Override("(")
    with pytest.raises(UsageError, match="Format 'int9' is not known"):
        Override(format="int9")
    program = canonical("llama")
    sentence = (
        r"^No site matches 'nowhere'; sites are called for example "
        r"model\.layers\.2\.mlp\.up_proj, model\.layers\.2\.mlp\.down_proj, lm_head\.$"
    )
    with pytest.raises(HikuiError, match=sentence):
        Override("nowhere").requires(program)
    Override("nowhere", required=False).requires(program)
    assert_settled(Override("nowhere", required=False), program)
    unnamed = program_of(lambda x: x * 2, embedding=random(24, 8))
    for required in (True, False):
        with pytest.raises(HikuiError, match="No linear site is named; run `canonicalise` first"):
            Override(required=required).requires(unnamed)


def test_an_expression_that_python_may_read_otherwise_one_day_is_taken_without_a_word() -> None:
    assert pattern("[[a]", "sites").pattern == "[[a]"
    overrides = "overrides: {'[[a]': int8-g64}\n"
    recipe = parse(f"schema: 1\nname: a\n{overrides}passes: [canonicalise]\n", "a.yaml", available_passes())
    assert list(recipe.overrides) == ["[[a]"]

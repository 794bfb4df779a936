"""The text reads back: what was printed comes again, and what was not is refused with its line."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import BLOCK, FORMAT, SENSITIVITY, ModelConfig, Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.ir.store import FileTensor, WeightStore
from hikui.lowering.ir.verifier import verify
from hikui.models.synthetic import FAMILIES
from hikui.passes import PASSES
from tests.lowering import handmade
from tests.passes.helpers import calibration, canonical, lower, program_of, random, run, traced

PIPELINES = {
    "calibrate,sensitivity,override{sites=.*head.*,format=int8-g32},assign{target_bpw=12},qep{alpha=0.3333}": FAMILIES,
    "guide,calibrate,smooth,override{sites=.*1.*,format=int8-g32},qep,gptq{bits=3,group=32},activation,fuse,pack": (
        "llama", "bloom",
    ),
    "calibrate{gram=true},awq,mixed{group=32},rtn,sub_branch,activation,kv_cache{bits=4,keys=channel},fuse": (
        "llama", "gpt2",
    ),
    "rotate,calibrate,hqq{format=ternary-g32},activation{static=true},kv_cache{keys=channel,values=channel},fuse": (
        "qwen2",
    ),
    "learned_clip{epochs=1},qat,embedding,activation{bits=4},dead_code": ("opt",),
    "factorise{bits=2,iterations=5,sites=proj},rtn{bits=2,group=32},qat,activation,fuse,dead_code": ("qwen2",),
    "trial{texts=1},mxfp4,distil,embedding{format=nf4-g32},kv_cache{bits=4},fuse{norm=false},dead_code": ("llama",),
}  # fmt: skip
"""What the passes leave, and the families in which it is tried."""


@cache
def text() -> str:
    return to_text(handmade.program())


def line_of(words: str) -> int:
    return next(number for number, line in enumerate(text().split("\n"), 1) if words in line)


def assert_reads_back(program: Program) -> None:
    printed = to_text(program)
    again = from_text(printed, program.store)
    verify(again)
    assert to_text(again) == printed
    assert again.config == program.config
    assert again.store.keys() == program.store.keys()
    (logits, caches), (want, want_caches) = run(again), run(program)
    assert torch.equal(logits, want)
    assert all(map(torch.equal, caches, want_caches))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back(family: str) -> None:
    assert_reads_back(traced(family))
    assert_reads_back(canonical(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_canonicalise_finds_the_same_in_a_program_read_back(family: str) -> None:
    program = traced(family)
    again = from_text(to_text(program), program.store)
    assert to_text(lower(again, "canonicalise")) == to_text(canonical(family))


@pytest.mark.parametrize(
    ("pipeline", "family"), [(pipeline, family) for pipeline, families in PIPELINES.items() for family in families]
)
def test_what_passes_leave_reads_back(pipeline: str, family: str) -> None:
    program = canonical(family)
    out = lower(program, pipeline, calibration(program))
    assert_reads_back(out)
    seeded = from_text(to_text(out))
    assert to_text(seeded) == to_text(out)
    assert bool(run(seeded)[0].isfinite().all())


def test_the_pipelines_name_every_pass_but_two() -> None:
    named = {step.partition("{")[0] for pipeline in PIPELINES for step in pipeline.replace("},", "}\n").split("\n")}
    named = {name for part in named for name in part.split(",")}
    # canonicalise runs before them all; adopt wants a folder of its own.
    assert {kind.name for kind in PASSES} - named == {"canonicalise", "adopt"}


def test_passes_give_the_same_on_a_program_read_back() -> None:
    program = lower(canonical("llama"), "calibrate,sensitivity", calibration(canonical("llama")))
    again = from_text(to_text(program), program.store)
    for pipeline in ("assign{target_bpw=12},rtn", "smooth,rtn,activation,kv_cache,fuse,dead_code"):
        one, two = lower(program, pipeline), lower(again, pipeline)
        assert to_text(one) == to_text(two)
        assert torch.equal(run(one)[0], run(two)[0])


def test_odd_names_and_numbers_read_back() -> None:
    program = program_of(
        lambda x, a: torch.nn.functional.linear(x.masked_fill(x > 1e30, float("-inf")), a),
        embedding=random(24, 32), a=random(24, 32),
    )  # fmt: skip
    program.config = ModelConfig(16, 24, (), 'An "odd" näme', 0, (1, 2))
    node = program.outputs()[0]
    node.meta |= {SENSITIVITY: {"int4-g64": 0.1 + 0.2, "sign-channel": float("inf")}, FORMAT: "int4-g64", BLOCK: 3}
    node.meta["hikui.site"] = 'a b\n"c"//{}'
    again = from_text(to_text(program), program.store)
    assert to_text(again) == to_text(program)
    assert again.config == program.config
    got = again.outputs()[0].meta
    assert all(got[key] == node.meta[key] for key in (SENSITIVITY, FORMAT, BLOCK, "hikui.site"))


def test_comments_empty_lines_and_other_line_ends_do_not_matter() -> None:
    lines = text().split("\n")
    odd = "\r\n".join(["// a program", "", lines[0], "   // its weights", *lines[1:], "// the end"])
    assert to_text(from_text(odd)) == text()


def test_a_question_mark_leaves_the_type_to_the_reader() -> None:
    written = text().replace(") : f32[1, T, 8]", ") : ?")
    assert written != text()
    assert to_text(from_text(written)) == text()


def test_caches_that_repeat_are_written_once() -> None:
    caches = (*[CacheShape(2, 4)] * 3, CacheShape(1, 8, "int8"), CacheShape(2, 4, "int4"))
    header = text().split("\n")[0].replace("[2x4]", "[2x4 *3, 1x8:int8, 2x4:int4]")
    with pytest.raises(UsageError, match=r"tokens, past and 14 caches are due"):
        from_text("\n".join([header, *text().split("\n")[1:]]))
    program = handmade.program()
    program.config = ModelConfig(16, 24, caches, "x", None, ())
    assert to_text(program).startswith("program x context=16 vocabulary=24 T=2..16 caches=[2x4 *3, 1x8:int8, 2x4:int4]")


def test_weights_come_from_the_seed_and_the_name() -> None:
    one, same, other = from_text(text(), seed=1), from_text(text(), seed=1), from_text(text(), seed=2)
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), same.store.load(key))
        assert not torch.equal(one.store.load(key), other.store.load(key))
    assert not torch.equal(one.store.load("k.weight"), one.store.load("v.weight"))
    tokens = torch.arange(9)[None]
    interpreter = Interpreter(one)
    logits, _ = interpreter.run(tokens, 0, interpreter.new_caches())
    assert bool(logits.isfinite().all()) and 0.1 < float(logits.std()) < 10


def test_weights_of_another_type_are_named() -> None:
    program = handmade.program()
    program.store.put("k.weight", torch.zeros(8, 17))
    with pytest.raises(
        HikuiError, match=r"^<text>:4: 'k.weight' is f32\[8, 16\] here, but f32\[8, 17\] in the weights"
    ):
        from_text(text(), program.store)
    program.store.drop(["k.weight"])
    with pytest.raises(
        HikuiError, match=r"^<text>:4: the weights given have no 'k.weight'\. Did you mean .*save-weights"
    ):
        from_text(text(), program.store)
    filled = from_text(text(), program.store, seed=0)
    assert torch.equal(filled.store.load("q.weight"), program.store.load("q.weight"))
    assert torch.equal(filled.store.load("k.weight"), from_text(text()).store.load("k.weight"))


def test_half_precision_of_a_checkpoint_is_widened(tmp_path: Path) -> None:
    program, file = handmade.program(), tmp_path / "w.bin"
    half = program.store.load("k.weight").bfloat16()
    file.write_bytes(half.view(torch.uint8).numpy().tobytes())
    store = program.store.fork()
    store.alias("k.weight", FileTensor(file, 0, torch.bfloat16, (8, 16)))
    assert torch.equal(from_text(text(), store).store.load("k.weight"), half.float())


REFUSED: dict[str, tuple[str, str, str]] = {
    "another beginning": ("program handmade", "module handmade", "begins with `program NAME"),
    "no context": (" context=16", "", "does not say its context"),
    "a field twice": (" context=16", " context=16 context=17", "'context' is given twice"),
    "an unknown field": (" context=16", " context=16 layers=2", "no field 'layers'"),
    "no range": ("T=2..16", "T=9..3", "T=9..3 is no range"),
    "a cache's format": ("caches=[2x4]", "caches=[2x4:int5]", "not stored as 'int5'"),
    "a cache too many": ("caches=[2x4]", "caches=[2x4 *2]", "tokens, past and 4 caches are due"),
    "a dtype": ('"k.weight" : f32', '"k.weight" : g32', "'g32' is no dtype"),
    "a weight's T": ('"k.weight" : f32[8', '"k.weight" : f32[T', "a size is due, not 'T,'"),
    "a weight's type": ('"k.weight" : f32[8, 16]', '"k.weight" : f32[8, 17]', "aten.linear does not take"),
    "a name twice": ("%view_1 =", "%view =", "%view is defined already, in line 14"),
    "an unknown node": ("(%linear_1, [", "(%linear_9, [", "%linear_9 is not defined before this line. Did you mean 'l"),
    "an unknown op": ("aten.embedding(", "aten.embeding(", "no op is called 'aten.embeding'. Did you mean 'aten.emb"),
    "an op of ours": ("hikui.causal_mask(", "hikui.casual_mask(", "Did you mean 'hikui.causal_mask'?"),
    "an unknown function": ("aten.embedding(", "getitems(", "no op is called 'getitems'. Did you mean 'getitem'?"),
    "another namespace": ("aten.embedding(", "prims.sin(", "'prims.sin' is of no namespace that a text may name"),
    "code": ("aten.embedding(", "os.system(", "'os.system' is of no namespace"),
    "an attribute": ("aten.embedding(", "aten.__class__(", "no op is called 'aten.__class__'"),
    "an op that writes": ("aten.add.Tensor(", "aten.add_.Tensor(", "changes its operands or reads files"),
    "a file": ("aten.add.Tensor(", "aten.from_file(", "changes its operands or reads files"),
    "arity": ("(%embedding, %reshape)", "(%embedding)", "aten.add.Tensor does not take these operands"),
    "too many": ("(%embedding, %reshape)", "(%embedding, %reshape, 1, 2, 3)", "does not take these operands"),
    "a keyword": ("(%past, %sym_size_int_1, 16)", "(%past, %sym_size_int_1, context=16)", "by position, so 'context='"),
    "position after keyword": ("(%embedding, %reshape)", "(%embedding, other=%reshape, 1)", "put it before"),
    "a keyword twice": ("(%embedding, %reshape)", "(%embedding, alpha=1, alpha=2)", "'alpha' is given twice"),
    "a word": ("(%view, 1, 2)", "(%view, one, 2)", "'one' is no argument; nodes begin with %"),
    "no comma": ("(%embedding, %reshape)", "(%embedding %reshape)", "',' is due or ')' after an argument"),
    "no bracket": ("[1, -1, 16])", "[1, -1, 16)", "',' is due or ']' after an item"),
    "lists without end": ("[1, -1, 16]", "[" * 5000, "more than 8 deep"),
    "a large number": ("[1, -1, 16]", f"[1, {'9' * 30}]", "too large a number"),
    "a number that is none": ("[1, -1, 16]", "[1, 5.5.5]", "an argument"),
    "a printed shape": ("(%embedding, %reshape) : f32[1, T, 16]", "(%embedding, %reshape) : f32[1, T, 17]",
                        "%add is written to be 'f32[1, T, 17]', but aten.add.Tensor gives f32[1, T, 16]"),
    "a printed dtype": ("(%embedding, %reshape) : f32[1", "(%embedding, %reshape) : f16[1", "written to be 'f16[1, T"),
    "no type": ("(%embedding, %reshape) : f32[1, T, 16]", "(%embedding, %reshape)", "':' is due before the type"),
    "trailing garbage": ("%tokens = input : i64[1, T]", "%tokens = input : i64[1, T] x", "should end before 'x'"),
    "tokens": ("%tokens = input : i64[1, T]", "%tokens = input : i32[1, T]", "input 1 is the tokens, i64[1, T], not"),
    "another symbol": ("%past = input : i64[1]", "%past = input : i64[N]", "a size is due, not 'N]'"),
    "an annotation": ("// block=0", "// blok=0", "no annotation is called 'blok'. Did you mean 'block'?"),
    "an annotation twice": ("// block=0", "// block=0 block=1", "'block' is given twice"),
    "an annotation's value": ("// block=0", "// block=first", "a number for block is due, not 'first'"),
    "a format": ("// block=0", "// block=0 format=int9-g7", "Format 'int9-g7' is not known"),
    "a correction": ("// block=0", "// block=0 correction=much", "alpha/damping"),
    "costs": ("// block=0", "// sensitivity={int4-g64: low}", "a number is due for int4-g64"),
    "a Python keyword": ("%view_1 =", "%while =", "a graph cannot have a node called %while"),
    "an output that is none": ("return %linear_3,", "return %linear_2,", "logits of shape"),
    "an output too few": (", %cache_update_1\n", "\n", "must return a tuple of 3"),
    "two programs": ("return %linear_3, %cache_update, %cache_update_1\n",
                     "return %linear_3, %cache_update, %cache_update_1\nprogram", "a text holds one program"),
}  # fmt: skip


ELSEWHERE = {
    "a weight's type": "%linear =",
    "an output too few": "return",
    "two programs": "return",
}
"""What the line holds in which a fault is found, where that is not the line of the change."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_program_is_refused_with_its_line(case: str) -> None:
    old, new, words = REFUSED[case]
    assert text().count(old) >= 1, "the case changes something"
    at = ELSEWHERE.get(case, old.split("\n")[0])
    with pytest.raises(UsageError) as caught:
        from_text(text().replace(old, new, 1), source="p.ir")
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.startswith(f"p.ir:{line_of(at) + (case == 'two programs')}: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("lines", range(0, 27, 3))
def test_a_text_cut_short_is_named(lines: int) -> None:
    with pytest.raises(UsageError, match=r"^p\.ir:\d+: (the text ends without a `return`|the text is empty)"):
        from_text("\n".join(text().split("\n")[:lines]), source="p.ir")


def test_a_weight_after_an_input_is_refused() -> None:
    lines = text().split("\n")
    lines[1], lines[6] = lines[6], lines[1]
    with pytest.raises(UsageError, match=r"^<text>:3: a 'weight' cannot stand after a 'input'; the order is stored"):
        from_text("\n".join(lines))


def test_one_weight_of_two_types_is_refused() -> None:
    lines = text().split("\n")
    lines.insert(1, '  stored "k.weight" : f32[8, 15]')
    with pytest.raises(UsageError, match=r"^<text>:5: 'k.weight' has another type in line 2"):
        from_text("\n".join(lines))


def test_reading_draws_no_weight() -> None:
    huge = text().replace("[24, 16]", "[24000000000, 16]")
    huge = huge.replace("vocabulary=24", "vocabulary=24000000000").replace("[1, T, 24]", "[1, T, 24000000000]")
    with pytest.raises(UsageError, match="the vocabulary cannot be 24000000000"):
        from_text(huge)
    large = text().replace("[24, 16]", "[1000000000, 16]")
    large = large.replace("vocabulary=24", "vocabulary=1000000000").replace("[1, T, 24]", "[1, T, 1000000000]")
    assert from_text(large).store.info("head.weight").shape == (1000000000, 16)


@cache
def pieces() -> tuple[str, ...]:
    """The words of a text that is short enough to be read many times, with one annotation of each kind."""
    noted = (
        "group=q+k site=q format=int4-g64 correction=0.5/0.01 sensitivity={int4-g64: 0.5, sign-g32: inf} rotated=[a]"
    )
    return tuple(re.findall(r"\s+|[%\w.]+|[^\s\w]", text().replace("// block=0", f"// block=0 {noted}")))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_text_raises_nothing_else(data: st.DataObject) -> None:
    tokens = list(pieces())
    position = st.integers(0, len(tokens) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        kind, at, other = data.draw(st.sampled_from("dwict")), data.draw(position), data.draw(position)
        at, other = min(at, len(tokens) - 1), min(other, len(tokens) - 1)
        if kind == "d":
            del tokens[at]
        elif kind == "w":
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif kind == "i":
            tokens.insert(at, tokens[other])
        elif kind == "c":
            tokens[at] = data.draw(st.text(max_size=4))
        else:
            del tokens[max(at, 1) :]
        if not tokens:
            break
    try:
        program = from_text("".join(tokens))
    except HikuiError:
        return
    assert to_text(from_text(to_text(program))) == to_text(program)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
@example("program")
@example("program x context=16 vocabulary=2\nreturn")
@example("\x00")
def test_any_text_raises_nothing_else(written: str) -> None:
    with pytest.raises(UsageError, match=r"^<text>:\d+: "):
        from_text(written)


def test_a_store_keeps_its_scratch_folder(tmp_path: Path) -> None:
    program = handmade.program()
    store = WeightStore({key: program.store.source(key) for key in program.store.keys()}, tmp_path)
    assert from_text(text(), store).store.scratch == tmp_path

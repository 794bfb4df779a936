import json
import time
from pathlib import Path

import pytest
import yaml

from hikui.lowering.app.request import available_passes
from hikui.lowering.errors import UsageError
from hikui.lowering.pipeline import recipe

PASSES = available_passes()
ROOT = Path(__file__).resolve().parents[3]

GOOD = """\
schema: 1
name: mine
calibration:
  samples: 4
overrides:
  lm_head: int8-g64
passes:
  - canonicalise
  - rtn: {bits: 4, group: 64}
"""


def parse(text: str) -> recipe.Recipe:
    return recipe.parse(text, "mine.yaml", PASSES)


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["float", "int8", "int4", "nf4", "int3", "int2", "mixed-5.5bit", "mixed-1.6bit", "int4-branch"]
)
def test_shipped_recipes_name_themselves_and_their_passes_exist(name: str) -> None:
    loaded = recipe.load(name, PASSES)
    assert loaded.name == name
    assert loaded.build(PASSES)[0].name == "canonicalise"


def test_overrides_become_passes_right_after_canonicalise() -> None:
    steps = [str(step) for step in parse(GOOD).build(PASSES)]
    assert steps == ["canonicalise", "override{sites=lm_head}", "rtn"]


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_a_resolved_recipe_reads_back_as_the_same_passes(name: str) -> None:
    loaded = recipe.load(name, PASSES)
    again = parse(loaded.resolved(PASSES))
    assert again.build(PASSES) == loaded.build(PASSES)
    assert again.resolved(PASSES) == loaded.resolved(PASSES)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name: mine", "nmae: mine", 2, ["unknown key 'nmae'", "Did you mean 'name'?"]),
        ("  samples: 4", "  sample: 4", 4, ["unknown key 'sample'", "Did you mean 'samples'?"]),
        ("  samples: 4", "  samples: 0", 4, ["calibration.samples", "greater than or equal to 1"]),
        ("  samples: 4", "  samples: many", 4, ["calibration.samples"]),
        ("  samples: 4", "  long: 4", 3, ["calibration", "beside those of `training`; give that too"]),
        ("  lm_head: int8-g64", "  lm_head: int9-g64", 6, ["int9-g64"]),
        ("  lm_head: int8-g64", "  '(lm_head': int8-g64", 6, ["'(lm_head'", "regular expression"]),
        ("  - canonicalise", "  - canonicalize", 8, ["'canonicalize'", "Did you mean 'canonicalise'?"]),
        ("{bits: 4, group: 64}", "{bits: 4, groop: 64}", 9, ["'groop'", "Did you mean 'group'?"]),
        ("{bits: 4, group: 64}", "{bits: four, group: 64}", 9, ["'bits'", "'four'"]),
        ("schema: 1", "schema: 2", 1, ["schema"]),
        ("  - canonicalise", "  - [canonicalise]", 8, ["one name with its options"]),
        ("  - canonicalise", "  - {canonicalise: {}, rtn: {}}", 8, ["one name with its options"]),
        ("name: mine", "name: mine\nname: yours", 3, ["'name' is given twice"]),
        ("name: mine", "name: [", 4, ["not YAML"]),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, words: list[str]) -> None:
    message = refusal(GOOD.replace(old, new))
    assert message.startswith(f"mine.yaml:{line}: ")
    for word in words:
        assert word in message


def test_missing_passes_and_other_documents_are_refused() -> None:
    assert "'passes' is missing" in refusal("schema: 1\nname: mine\n")
    assert "a recipe is a mapping" in refusal("- canonicalise\n")
    assert "at least 1 item" in refusal("schema: 1\nname: mine\npasses: []\n")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12))
PASS = "schema: 1\nname: mine\npasses:\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "with its aliases written out it holds more than 20000 values"),
        ("x: &a\n  <<: *a\n", "an alias stands inside of what it stands for"),
        ("schema: 1\nname: &a [*a]\n", "mine.yaml:2: an alias stands inside"),
        ("schema: !!int x\nname: mine\n", "invalid literal"),
        ("schema: !!float x\n", "could not convert"),
        ("schema: !mine 1\n", "the tag !mine is not read here"),
        ("name: !!binary aGk=\n", "the tag !!binary is not read here"),
        ("name: 2026-99-99\n", "the tag !!timestamp is not read here"),
        ("name: !!python/object/apply:os.system [ls]\n", "python/object/apply:os.system is not read"),
        ("? [a, b]\n: c\n", "mine.yaml:1: a key is a word"),
        ("? {a: b}\n: c\n", "a key is a word"),
        ("schema: " + "[" * 60000, "nests more than 40 deep"),
        ("schema: " + "{a: " * 15000, "nests more than 40 deep"),
        ("- " * 30000, "nests more than 40 deep"),
        ("schema: " + "9" * 5000 + "\n", "a value cannot be read"),
        ("schema: 1\n" * 7000, "the file has 70000 characters"),
        ("schema: 1\nname: \0\n", "not YAML"),
        (PASS + "  - rtn: {bits: " + "9" * 4000 + "}\n", "mine.yaml:4: "),
        (PASS + "  - gptq: {damping: .nan}\n", "gptq cannot take damping=nan"),
        (PASS + "  - gptq: {damping: .inf}\n", "gptq cannot take damping=inf"),
        (PASS + "  - assign: {target_bpw: .nan}\n", "assign cannot take target_bpw=nan"),
        (PASS + "  - assign: {target_bpw: -1}\n", "assign cannot keep to -1 bits per weight"),
        (PASS + "  - rotate: {seed: -1}\n", "rotate cannot take seed=-1"),
        (PASS + "  - rtn: {1: 2}\n", "mine.yaml:4"),
        ('name: "a\\uD800"\n', "mine.yaml:1: the value is not UTF-8 at its character 2"),
        (PASS + "  - rtn\ncalibration: {samples: .nan}\n", "calibration.samples"),
        (PASS + "  - rtn\ncalibration: {samples: 1.0e+400}\n", "calibration.samples"),
        (PASS + "  - rtn\ncalibration: {seed: -1}\n", "calibration.seed"),
    ],
)  # fmt: skip
def test_a_hostile_recipe_is_one_sentence_at_once(text: str, words: str) -> None:
    start = time.perf_counter()
    message = refusal(text)
    assert time.perf_counter() - start < 1
    assert message.startswith("mine.yaml:") and len(message) < 400
    assert words in message


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert recipe.load(path, PASSES) == recipe.parse(GOOD, "mine.yaml", PASSES)


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'int4-branch'"):
        recipe.load("int4-brunch", PASSES)


def test_an_option_can_be_set_only_where_its_pass_is() -> None:
    mixed = recipe.load("mixed-5.5bit", PASSES).with_options({"assign": {"target_bpw": 6.0}})
    assert "assign{target_bpw=6.0}" in map(str, mixed.build(PASSES))
    with pytest.raises(UsageError, match="int8 has no pass assign, so target_bpw=6.0 has no effect"):
        recipe.load("int8", PASSES).with_options({"assign": {"target_bpw": 6.0}})


def test_the_json_schema_in_docs_is_current() -> None:
    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(recipe.json_schema(PASSES))), "run `make schema`"


def test_the_json_schema_knows_every_pass_and_refuses_other_keys() -> None:
    schema = recipe.json_schema(PASSES)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) >= set(yaml.safe_load(GOOD))
    assert set(schema["required"]) == {"schema", "name", "passes"}
    by_name = [choice["anyOf"][1] if "anyOf" in choice else choice for choice in schema["$defs"]["Step"]["anyOf"]]
    assert {next(iter(choice["properties"])) for choice in by_name} == set(PASSES)

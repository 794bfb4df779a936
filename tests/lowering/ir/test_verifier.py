"""Each invariant of a program, broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from hikui.lowering.errors import VerificationError
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.verifier import verify
from tests.lowering import handmade


@pytest.fixture(scope="module")
def whole() -> Program:
    return handmade.program()


def _weight(program: Program, key: str) -> fx.Node:
    return next(node for node in program.weight_nodes() if program.weight_of(node) == key)


def _fake(program: Program, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with program.fake_mode:
        return torch.empty(shape, dtype=dtype)


def _use_before_definition(program: Program) -> None:
    first, *_, last = (node for node in program.graph.nodes if node.op == "call_function")
    last.append(first)


def _two_of_a_name(program: Program) -> None:
    program.outputs()[0].name = program.outputs()[1].name


def _call_without_value(program: Program) -> None:
    del program.outputs()[0].meta["val"]


def _placeholder_without_value(program: Program) -> None:
    del program.cache_nodes()[0].meta["val"]


def _attribute(program: Program) -> None:
    program.graph_module.register_buffer("held", torch.ones(1))
    with program.graph.inserting_before(program.output_node):
        program.graph.get_attr("held").meta["val"] = _fake(program, 1)


def _method(program: Program) -> None:
    with program.graph.inserting_before(program.output_node):
        program.graph.call_method("neg", (program.outputs()[0],)).meta["val"] = program.outputs()[0].meta["val"]


def _weight_after_an_input(program: Program) -> None:
    program.input_nodes()[0].append(_weight(program, "q.weight"))


def _missing_tensor(program: Program) -> None:
    program.store.drop(["q.weight"])


def _other_shape_in_store(program: Program) -> None:
    program.store.put("q.weight", torch.ones(16, 17))


def _other_dtype_in_store(program: Program) -> None:
    program.store.put("q.weight", program.store.load("q.weight").half())


def _other_shape_in_graph(program: Program) -> None:
    _weight(program, "k.weight").meta["val"] = _fake(program, 16, 8)


def _input_too_many(program: Program) -> None:
    with program.graph.inserting_after(program.input_nodes()[-1]):
        program.graph.placeholder("more").meta["val"] = _fake(program, 1)


def _config_without_caches(program: Program) -> None:
    program.config = replace(program.config, caches=())


def _cache_of_other_length(program: Program) -> None:
    program.input_nodes()[3].meta["val"] = _fake(program, 1, 2, 15, 4)


def _cache_of_other_dtype(program: Program) -> None:
    program.input_nodes()[2].meta["val"] = _fake(program, 1, 2, 16, 4, dtype=torch.float16)


def _config_of_other_heads(program: Program) -> None:
    program.config = replace(program.config, caches=(CacheShape(4, 4),))


def _no_tuple(program: Program) -> None:
    program.output_node.args = (program.outputs()[0],)


def _a_number_in_the_output(program: Program) -> None:
    program.output_node.args = ((*program.outputs()[:2], 3),)


def _output_too_few(program: Program) -> None:
    program.output_node.args = (tuple(program.outputs()[:2]),)


def _output_too_many(program: Program) -> None:
    program.output_node.args = ((*program.outputs(), program.outputs()[2]),)


def _new_cache_of_other_shape(program: Program) -> None:
    logits, keys, _ = program.outputs()
    program.output_node.args = ((logits, keys, logits),)


def _new_cache_of_other_dtype(program: Program) -> None:
    program.outputs()[1].meta["val"] = _fake(program, 1, 2, 16, 4, dtype=torch.int8)


def _logits_of_two_dimensions(program: Program) -> None:
    program.outputs()[0].meta["val"] = _fake(program, 5, handmade.VOCABULARY)


def _logits_of_another_vocabulary(program: Program) -> None:
    program.config = replace(program.config, vocabulary=handmade.VOCABULARY + 1)


def _logits_that_are_no_fake_tensor(program: Program) -> None:
    program.outputs()[0].meta["val"] = torch.zeros(1, 5, handmade.VOCABULARY)


LOGITS = "The first output is not logits of shape [1, T, 24]."
CASES: list[tuple[Callable[[Program], None], str]] = [
    (_use_before_definition, "The graph is malformed: "),
    (_two_of_a_name, "The graph is malformed: "),
    (_call_without_value, "Node linear_3 has no meta['val']."),
    (_placeholder_without_value, "Node key_cache has no meta['val']."),
    (_attribute, "Node held is a get_attr; a program holds placeholders and calls only."),
    (_method, "Node neg is a call_method; a program holds placeholders and calls only."),
    (_weight_after_an_input, "Weight placeholder wq comes after an input."),
    (_missing_tensor, "Placeholder wq names 'q.weight', which the store does not have."),
    (_other_shape_in_store,
     "Placeholder wq is torch.float32(16, 16), but 'q.weight' is torch.float32(16, 17)."),
    (_other_dtype_in_store,
     "Placeholder wq is torch.float32(16, 16), but 'q.weight' is torch.float16(16, 16)."),
    (_other_shape_in_graph,
     "Placeholder wk is torch.float32(16, 8), but 'k.weight' is torch.float32(8, 16)."),
    (_input_too_many, "The program has 5 inputs; tokens, past and 2 caches are due."),
    (_config_without_caches, "The program has 4 inputs; tokens, past and 0 caches are due."),
    (_cache_of_other_length,
     "Cache value_cache is torch.float32(1, 2, 15, 4), not float32(1, 2, 16, 4) (value_cache_0)."),
    (_cache_of_other_dtype,
     "Cache key_cache is torch.float16(1, 2, 16, 4), not float32(1, 2, 16, 4) (key_cache_0)."),
    (_config_of_other_heads,
     "Cache key_cache is torch.float32(1, 2, 16, 4), not float32(1, 4, 16, 4) (key_cache_0)."),
    (_no_tuple, "The graph's output is not a tuple of logits and caches."),
    (_a_number_in_the_output, "The graph's output is not a tuple of logits and caches."),
    (_output_too_few, "The program must return a tuple of 3: the logits and the caches."),
    (_output_too_many, "The program must return a tuple of 3: the logits and the caches."),
    (_new_cache_of_other_shape, "not float32(1, 2, 16, 4) (value_cache_0)."),
    (_new_cache_of_other_dtype,
     "Cache cache_update is torch.int8(1, 2, 16, 4), not float32(1, 2, 16, 4) (key_cache_0)."),
    (_logits_of_two_dimensions, LOGITS),
    (_logits_of_another_vocabulary, LOGITS.replace("24", "25")),
    (_logits_that_are_no_fake_tensor, LOGITS),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), CASES)
def test_a_broken_invariant_is_named(damage: Callable[[Program], None], sentence: str, whole: Program) -> None:
    program = whole.clone()
    verify(program)
    damage(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    assert str(caught.value).startswith(sentence) or (sentence.startswith("not ") and sentence in str(caught.value))


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_quantised_caches_have_codes_and_scales(fmt: str, whole: Program) -> None:
    """The two caches of the handmade program become four inputs, in the order that the configuration says."""
    program = whole.clone()
    program.config = replace(program.config, caches=(CacheShape(handmade.KV_HEADS, handmade.HEAD_SIZE, fmt),))
    with pytest.raises(VerificationError, match="has 4 inputs; tokens, past and 4 caches are due"):
        verify(program)
    code, width = (torch.int8, 4) if fmt == "int8" else (torch.uint8, 2)
    shapes = [((1, 2, 16, width), code)] * 2 + [((1, 2, 16), torch.float16)] * 2
    held = program.cache_nodes()
    with program.graph.inserting_after(held[-1]):
        value_scale = program.graph.placeholder("value_scale")
        key_scale = program.graph.placeholder("key_scale")
    nodes = [*held, key_scale, value_scale]
    for node, (shape, dtype) in zip(nodes, shapes, strict=True):
        node.meta["val"] = _fake(program, *shape, dtype=dtype)
    program.output_node.args = ((program.outputs()[0], *nodes),)
    verify(program)
    key_scale.meta["val"] = _fake(program, 1, 2, 16)
    with pytest.raises(VerificationError, match=r"Cache key_scale is torch.float32\(1, 2, 16\), not float16\(1, 2, 16"):
        verify(program)

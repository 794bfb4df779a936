"""Each family against the float model of transformers, and against the calling convention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import BLOCK, WEIGHT, Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.trace import trace
from hikui.models.synthetic import TINY_CONTEXT, TINY_VOCABULARY, tiny_checkpoint, tiny_model

from .conftest import Traced, float_logits, random_tokens, run_in_steps

TOLERANCE = 1e-5

CACHES = {
    "llama": (CacheShape(2, 8),) * 3,
    "qwen2": (CacheShape(2, 16),) * 2,
    "opt": (CacheShape(4, 12),) * 2,
    "bloom": (CacheShape(6, 8),) * 2,
    "gpt2": (CacheShape(4, 12),) * 2,
}
LINEAR_SITES = {"llama": 3 * 7 + 1, "qwen2": 2 * 7 + 1, "opt": 2 * 6 + 1, "bloom": 2 * 4 + 1, "gpt2": 2 * 4 + 1}


def linear_weights(program: Program) -> list[str]:
    """The store keys that matrix products read, in graph order."""
    at = {torch.ops.aten.linear.default: 1, torch.ops.aten.addmm.default: 2}
    return [program.weight_of(n.args[at[n.target]]) for n in program.graph.nodes if n.target in at]


def test_prefill_of_the_whole_context(traced: Traced) -> None:
    got = run_in_steps(traced.program, traced.tokens, [TINY_CONTEXT])
    assert (got - traced.logits).abs().max() <= TOLERANCE


def test_decode_of_32_steps_after_a_prefill(traced: Traced) -> None:
    got = run_in_steps(traced.program, traced.tokens, [17] + [1] * 32)
    assert (got - traced.logits[:, :49]).abs().max() <= TOLERANCE


def test_prefill_in_two_chunks(traced: Traced) -> None:
    got = run_in_steps(traced.program, traced.tokens, [23, 41])
    assert (got - traced.logits).abs().max() <= TOLERANCE


def test_single_tokens_from_an_empty_cache(traced: Traced) -> None:
    got = run_in_steps(traced.program, traced.tokens, [1, 1, 2, 1])
    assert (got - traced.logits[:, :5]).abs().max() <= TOLERANCE


def test_what_the_cache_held_beyond_past_is_not_read(traced: Traced) -> None:
    interpreter = Interpreter(traced.program)
    stale = [torch.full_like(cache, 1e4) for cache in interpreter.new_caches()]
    got, _ = interpreter.run(traced.tokens[:, :9], 0, stale)
    assert (got - traced.logits[:, :9]).abs().max() <= TOLERANCE


def test_calling_convention(traced: Traced) -> None:
    program = traced.program
    verify(program)
    assert program.config.caches == CACHES[traced.family]
    assert (program.config.vocabulary, program.config.context_length) == (TINY_VOCABULARY, TINY_CONTEXT)
    assert (program.config.bos_token_id, program.config.eos_token_ids) == (0, (1,))
    names = [f"{kind}_cache_{layer}" for layer in range(len(program.config.caches)) for kind in ("key", "value")]
    assert [node.name for node in program.input_nodes()] == ["tokens", "past", *names]
    assert {program.weight_of(node) for node in program.weight_nodes()} == set(program.store.keys())
    assert not dict(program.graph_module.named_parameters())
    assert not dict(program.graph_module.named_buffers())


def test_token_count_is_symbolic_from_one_to_the_context(traced: Traced) -> None:
    size = traced.program.input_nodes()[0].meta["val"].shape[1]
    assert isinstance(size, torch.SymInt)
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    assert (bounds.lower, bounds.upper) == (1, TINY_CONTEXT)


def test_linear_sites_read_named_parameters(traced: Traced) -> None:
    weights = linear_weights(traced.program)
    assert len(weights) == LINEAR_SITES[traced.family]
    parameters = dict(traced.model.named_parameters())
    assert all(torch.equal(traced.program.store.load(key), parameters[key]) for key in weights)


def test_attention_is_one_op_where_the_family_allows(traced: Traced) -> None:
    attention = torch.ops.aten.scaled_dot_product_attention.default
    found = sum(node.target is attention for node in traced.program.graph.nodes)
    assert found == (0 if traced.family == "bloom" else len(traced.program.config.caches))


def test_blocks_are_numbered_and_contiguous(traced: Traced) -> None:
    blocks = [node.meta.get(BLOCK) for node in traced.program.graph.nodes if node.op == "call_function"]
    inside = [block for block in blocks if block is not None]
    assert inside == sorted(inside)
    assert set(inside) == set(range(len(traced.program.config.caches)))
    for node in traced.program.graph.nodes:
        if node.target is torch.ops.hikui.cache_update.default:
            assert node.args[0].name.endswith(f"_{node.meta[BLOCK]}")


def test_nothing_idle_is_left(traced: Traced) -> None:
    idle = ("alias", "contiguous", "clone", "detach", "dropout", "_assert", "sym_constrain", "_to_copy")
    for node in traced.program.graph.nodes:
        assert node.op in ("placeholder", "call_function", "output")
        assert not str(node.target).removeprefix("aten.").startswith(idle), node.format_node()
        assert "stack_trace" not in node.meta, "it holds paths of this machine"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_tracing_twice_gives_the_same_text(family: str) -> None:
    assert to_text(trace(tiny_model(family))) == to_text(trace(tiny_model(family)))


def test_tracing_leaves_the_module_as_it_was(traced: Traced) -> None:
    assert traced.model.config._attn_implementation != "hikui"  # type: ignore[union-attr]
    assert all(type(p.data) is torch.Tensor for p in traced.model.parameters())
    assert torch.equal(float_logits(traced.model, traced.tokens), traced.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_gives_the_program_of_its_module(family: str, tmp_path: Path) -> None:
    program = trace(tiny_checkpoint(family, tmp_path))
    of_module = trace(tiny_model(family))
    assert to_text(program) == to_text(of_module)
    for key in of_module.store.keys():
        assert torch.equal(program.store.load(key), of_module.store.load(key)), key
    assert program.tokenizer == ModelTokenizer(tmp_path)


def test_half_precision_weights_are_widened() -> None:
    model = tiny_model("llama")
    program = trace(model.bfloat16())
    assert all(node.meta["val"].dtype == torch.float32 for node in program.weight_nodes())
    tokens = random_tokens(TINY_VOCABULARY, 12)
    got = run_in_steps(program, tokens, [12])
    assert (got - float_logits(model.float(), tokens)).abs().max() <= TOLERANCE


def test_a_tied_head_reads_the_embedding() -> None:
    program = trace(tiny_model("qwen2"))
    assert linear_weights(program)[-1] == "model.embed_tokens.weight"
    embedding = next(n for n in program.weight_nodes() if program.weight_of(n) == "model.embed_tokens.weight")
    assert {node.target for node in embedding.users} == {
        torch.ops.aten.embedding.default,
        torch.ops.aten.linear.default,
    }


def test_alibi_becomes_a_weight() -> None:
    program = trace(tiny_model("bloom"))
    bias = next(n for n in program.graph.nodes if n.target is torch.ops.aten.baddbmm.default).args[0]
    assert tuple(program.store.info(bias.meta[WEIGHT]).shape) == (6, 1, TINY_CONTEXT)


def test_constants_of_the_code_become_weights() -> None:
    class Scaled(torch.nn.Linear):
        shift: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            literal = torch.tensor([0.5, 2.0] * 24) * torch.arange(48)
            return super().forward(x * literal + self.shift)

    model = tiny_model("llama")
    projection: Any = model.get_submodule("model.layers.1.self_attn.o_proj")
    projection.__class__ = Scaled
    projection.shift = torch.linspace(-1, 1, 48)
    program = trace(model)
    assert torch.equal(program.store.load("model.layers.1.self_attn.o_proj.shift"), projection.shift)
    assert torch.equal(program.store.load("constant_0"), torch.tensor([0.5, 2.0] * 24) * torch.arange(48))
    tokens = random_tokens(TINY_VOCABULARY, 20)
    assert (run_in_steps(program, tokens, [15, 5]) - float_logits(model, tokens)).abs().max() <= TOLERANCE


def test_a_shorter_context() -> None:
    model = tiny_model("opt")
    program = trace(model, context=24)
    tokens = random_tokens(TINY_VOCABULARY, 24)
    got = run_in_steps(program, tokens, [24])
    assert program.config.context_length == 24
    assert (got - float_logits(model, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen3", {"head_dim": 24}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("bitnet", {}),
    ],
)
def test_families_that_nothing_here_names(family: str, options: dict[str, object]) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TINY_CONTEXT, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    tokens = random_tokens(TINY_VOCABULARY, 40)
    got = run_in_steps(trace(model), tokens, [30] + [1] * 10)
    assert (got - float_logits(model, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["stories260k-llama", "bitstories-3m-bitnet"])
def test_real_models(shared: Path, name: str) -> None:
    folder = shared / "assets" / "models" / name
    program = trace(folder)
    tokens = random_tokens(program.config.vocabulary, 64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = float_logits(model, tokens)
    got = run_in_steps(program, tokens, [32] + [1] * 32)
    # These logits reach 40, where the steps of float32 are 4e-6; the bound is relative to them.
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    assert (program.config.bos_token_id, program.config.eos_token_ids) == (1, (2,))
    assert program.tokenizer == ModelTokenizer(folder)

"""A trace that is not its model must not be lowered: what is compared, what is refused, and what is said of it."""

import copy
import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import hikui
from hikui.lowering.app.cli import run
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import MemoryTensor
from hikui.lowering.trace import Fidelity, fidelity, shortened, trace, trace_and_compare
from hikui.models.synthetic import TINY_CONTEXT, TINY_VOCABULARY, tiny_model, write_tokenizer

from ..checkpoint.quantised_folders import write_model
from .conftest import Traced, float_logits, random_tokens, run_in_steps

WINDOW = 16


def gpt_neo(*, layers: tuple[str, ...] = ("global", "local")) -> nn.Module:
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_layers=len(layers),
        attention_types=[[list(layers), 1]], num_heads=4, window_size=WINDOW, max_position_embeddings=TINY_CONTEXT,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return strong(AutoModelForCausalLM.from_config(config))


def strong(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is not nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval().requires_grad_(False)


class Lengthwise(nn.Linear):
    """Adds a number that depends on how many keys its model believes to have: the kind of GPT-Neo's fault."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * torch.arange(TINY_CONTEXT)[TINY_CONTEXT - x.shape[1] :].view(1, -1, 1)


def misleading(block: int) -> nn.Module:
    """A Llama that is right without a cache, where all tokens come at once, and traced to something else."""
    model = tiny_model("llama")
    projection: Any = model.get_submodule(f"model.layers.{block}.self_attn.o_proj")
    projection.__class__ = Lengthwise
    return model


@pytest.mark.parametrize("layers", [("global", "local"), ("local",), ("global", "global", "local")])
def test_local_attention_of_gpt_neo_beyond_its_window(layers: tuple[str, ...]) -> None:
    model = gpt_neo(layers=layers)
    program, found = trace_and_compare(model)
    tokens = random_tokens(TINY_VOCABULARY, TINY_CONTEXT)
    want = float_logits(model, tokens)
    for steps in ([TINY_CONTEXT], [7, 40, *[1] * 17]):
        got = run_in_steps(program, tokens, steps)
        assert (got - want).abs().max() <= 1e-5 * (want.max() - want.min())
    assert found.prompts == (4, WINDOW + 5, 37)


def test_every_family_is_its_model(traced: Traced) -> None:
    _, found = trace_and_compare(traced.model)
    blocks = len(traced.program.config.caches)
    assert found == Fidelity(prompts=(4, 37), blocks=blocks, of=blocks, largest_difference=1e-5)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("large", [False, True])
def test_a_trace_that_is_not_the_model_is_refused_with_its_first_block(
    block: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(fidelity, "_WHOLE_BYTES", 0)
    with pytest.raises(HikuiError) as caught:
        trace_and_compare(misleading(block))
    message = str(caught.value)
    assert message.startswith(
        "The traced program is not the model: for 4 tokens its logits differ from those of its own"
    )
    assert f"block {block} is the first that differs" in message
    assert "\n" not in message


@pytest.fixture
def _as_the_model_slices_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of GPT-Neo as it would be without the rule for tables that are sliced by the number of keys."""
    monkeypatch.setattr(import_module("hikui.lowering.trace.convert"), "_take_rows_at_positions", lambda graph: None)


@pytest.mark.usefixtures("_as_the_model_slices_it")
@pytest.mark.parametrize("backend", ["tvm", "onnxruntime"])
def test_a_wrong_trace_is_refused_before_any_pass(backend: str, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="The traced program is not the model: .* block 1 is the first that differs"):
        hikui.lower(gpt_neo(), tmp_path / "out", recipe="rtn-4bit", backend=backend)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_as_the_model_slices_it")
@pytest.mark.parametrize("verb", [("lower", "-o", "out"), ("explain",), ("eval", "--text", "text.txt")])
def test_every_command_that_shows_or_makes_numbers_refuses_it(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gpt_neo().save_pretrained("neo")  # type: ignore[operator]
    write_tokenizer(Path("neo"), TINY_VOCABULARY, TINY_CONTEXT)
    Path("text.txt").write_text("Once upon a time there was a fox.")
    capsys.readouterr()
    assert run([verb[0], "neo", *verb[1:]]) == HikuiError.exit_code
    assert "block 1 is the first that differs" in capsys.readouterr().err
    assert not Path("out").exists()
    logging.disable(logging.NOTSET)


def test_the_head_is_compared_too() -> None:
    model = tiny_model("llama")
    program, sources = trace(model), {name: MemoryTensor(p.detach()) for name, p in model.named_parameters()}
    program.store.put("lm_head.weight", program.store.load("lm_head.weight").roll(1, 0))
    own = copy.deepcopy(model)
    shortened.load_when_called(own, sources)
    with pytest.raises(HikuiError, match="every block that can be compared agrees"):
        fidelity._Comparison(program, own, large=True).run(random_tokens(TINY_VOCABULARY, 9))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_large_model_is_compared_on_its_first_blocks_and_its_head(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / family
    deep(family).save_pretrained(folder)  # type: ignore[operator]
    monkeypatch.setattr(fidelity, "_WHOLE_BYTES", 0)
    loaded: list[str] = []
    monkeypatch.setattr(shortened._Loading, "__call__", counting(loaded, shortened._Loading.__call__))
    _, found = trace_and_compare(folder)
    assert found == Fidelity(prompts=(4, 37), blocks=2, of=5, largest_difference=1e-5)
    assert loaded


def test_each_kind_of_block_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_WHOLE_BYTES", 0)
    _, found = trace_and_compare(gpt_neo(layers=("global", "global", "global", "local", "local")))
    assert (found.blocks, found.of) == (4, 5)


def test_what_comes_after_the_blocks_is_compared_in_a_large_model() -> None:
    model = deep("llama")
    program = trace(model)
    cut = shortened.shortened(program, 2)
    assert cut is not None
    names = {program.weight_of(node) for node in cut.weight_nodes()}
    assert {"model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    assert not any("layers.2" in name for name in names)


def deep(family: str) -> nn.Module:
    config = copy.deepcopy(tiny_model(family).config)
    config.num_hidden_layers = 5  # type: ignore[union-attr]
    return strong(AutoModelForCausalLM.from_config(config))


def counting(calls: list[str], real: Any) -> Any:
    def load(self: Any, module: nn.Module, arguments: object) -> None:
        calls.append(type(module).__name__)
        real(self, module, arguments)

    return load


def test_the_manifest_says_what_was_compared(tmp_path: Path) -> None:
    artefact = hikui.lower(tiny_model("llama"), tmp_path / "out", recipe="rtn-4bit", backend="onnxruntime")
    entry = json.loads((artefact.directory / "manifest.json").read_text())["provenance"]["trace"]
    assert entry == {"prompts": [4, 37], "blocks": 3, "of": 3, "largest_difference": 1e-5}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_that_is_quantised_already_is_held_to_its_dequantised_model(method: str, tmp_path: Path) -> None:
    write_model(tmp_path, method=method)
    assert trace_and_compare(tmp_path)[1].largest_difference == 1e-5


@pytest.mark.parametrize(
    ("config", "context", "lengths"),
    [
        ({"sliding_window": 16}, 64, (4, 21, 37)),
        ({"sliding_window": 64}, 64, (4, 37)),
        ({"sliding_window": None, "rope_parameters": {"original_max_position_embeddings": 50}}, 64, (4, 37, 55)),
        ({"attention_chunk_size": 62, "use_window": True}, 64, (4, 37, 64)),
        ({}, 20, (4, 20)),
        ({}, 2, (2,)),
    ],
)
def test_one_prompt_is_longer_than_every_window(config: dict[str, Any], context: int, lengths: tuple[int, ...]) -> None:
    model: Any = nn.Module()
    model.config = PretrainedConfig(**config)
    assert fidelity.prompt_lengths(model, context) == lengths


def test_windows_at_the_context_are_not_refused() -> None:
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=32, max_position_embeddings=64,
    )  # fmt: skip
    model = strong(AutoModelForCausalLM.from_config(config))
    assert trace_and_compare(model, context=32)[1].largest_difference == 1e-5


def test_comparing_leaves_the_module_as_it_was(traced: Traced) -> None:
    before = {name: value.clone() for name, value in traced.model.state_dict().items()}
    trace_and_compare(traced.model)
    assert all(torch.equal(before[name], value) for name, value in traced.model.state_dict().items())
    assert not any(module._forward_hooks for module in traced.model.modules())
    assert torch.equal(float_logits(traced.model, traced.tokens), traced.logits)


LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmo", {"clip_qkv": 0.1}),
        ("falcon", {}),
        ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
        ("llama", {"rope_parameters": DYNAMIC}),
    ],
)
def test_ops_that_write_and_angles_that_rest(family: str, options: dict[str, Any]) -> None:
    model = wide(family, **options)
    program, _ = trace_and_compare(model, context=32)
    tokens = random_tokens(TINY_VOCABULARY, 32)
    want = float_logits(model, tokens)
    got = run_in_steps(program, tokens, [20, 3, *[1] * 9])
    assert (got - want).abs().max() <= 1e-5 * (want.max() - want.min())


def test_angles_that_change_with_the_length_are_refused_beyond_it() -> None:
    model = wide("phi3", original_max_position_embeddings=32, rope_parameters=LONG)
    with pytest.raises(HikuiError, match=r"for 37 tokens .* \(up to 4 tokens they agree\), and block 0"):
        trace_and_compare(model)


def test_a_write_that_others_see_through_a_view_is_kept() -> None:
    class Viewing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).clone()
            half = y[..., :7]
            half.mul_(2)
            y[..., 4:7].add_(half[..., :3])
            y[..., 10:13].add_(half[..., 4:7])
            return y

    model = tiny_model("llama")
    projection: Any = model.get_submodule("model.layers.1.self_attn.o_proj")
    projection.__class__ = Viewing
    program, _ = trace_and_compare(model)
    tokens = random_tokens(TINY_VOCABULARY, 20)
    want = float_logits(model, tokens)
    assert (run_in_steps(program, tokens, [11, 1, 8]) - want).abs().max() <= 1e-5 * (want.max() - want.min())


def wide(family: str, **options: Any) -> nn.Module:
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TINY_CONTEXT, **options,
    )  # fmt: skip
    return strong(AutoModelForCausalLM.from_config(config))

"""Models that cannot be traced: one sentence with the module, the line and the reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaForCausalLM, MptConfig

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.trace import trace
from hikui.models.synthetic import TINY_CONTEXT, TINY_VOCABULARY, tiny_model


def small(family: str, **options: object) -> nn.Module:
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TINY_CONTEXT, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(HikuiError) as caught:
        trace(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def llama_with(forward: Any) -> nn.Module:
    """A Llama whose attention output goes through another function first."""
    model = tiny_model("llama")
    projection: Any = model.get_submodule("model.layers.1.self_attn.o_proj")

    class Spoilt(type(projection)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(forward(x))
            return result

    projection.__class__ = Spoilt
    return model


def test_a_module_that_is_no_model() -> None:
    message = refusal(nn.Sequential(nn.Linear(4, 4)))
    assert "Sequential is not a Hugging Face causal language model" in message


def test_an_encoder() -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert "it is an encoder" in refusal(BertForMaskedLM(config).eval())


def test_a_model_without_a_key_value_cache() -> None:
    assert "never writes to a key-value cache" in refusal(small("mamba", state_size=4))


def test_a_sliding_window_within_the_context() -> None:
    model = small("mistral", sliding_window=16)
    assert "position 16" in refusal(model)
    assert trace(model, context=16).config.context_length == 16


def test_a_branch_on_how_many_tokens_were_seen() -> None:
    message = refusal(AutoModelForCausalLM.from_config(MptConfig(d_model=48, n_heads=4, n_layers=1, max_seq_len=64)))
    assert "its code decides in module 'transformer.blocks.0.attn' (MptAttention, modeling_mpt.py:" in message
    assert "by a number that is known only when it runs" in message
    assert "u0" not in message


def test_sizes_that_do_not_fit_the_whole_cache() -> None:
    message = refusal(small("falcon", alibi=True, num_kv_heads=None))
    assert "its code joins tensors in module 'transformer' (FalconModel, modeling_falcon.py:" in message
    assert "whose sizes do not fit, [1, 4, 1, 2] and [1, 1, 2, 64]; it is called with a key-value cache" in message
    assert "torch.Size" not in message


def test_what_hikuis_cache_does_not_have() -> None:
    class Asking(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs), kwargs["past_key_values"].layers

    model: Any = tiny_model("llama")
    model.__class__ = Asking
    assert "for 'layers' of its key-value cache, which hikui's cache does not have" in refusal(model)


def test_a_mask_that_is_not_causal_from_the_start_gets_no_advice_on_the_context() -> None:
    assert "already at position 1, and hikui implements no other" in refusal(small("mistral", sliding_window=1))


def test_soft_capped_attention() -> None:
    assert "'softcap'" in refusal(small("gemma2", head_dim=12))


def test_keys_and_values_of_two_widths() -> None:
    assert "values of shape" in refusal(small("deepseek_v3"))


def test_a_branch_on_a_value() -> None:
    message = refusal(llama_with(lambda x: x if float(x.sum()) > 0 else -x))
    assert "model.layers.1.self_attn.o_proj" in message
    assert "test_refusals.py" in message


def test_a_branch_on_the_number_of_tokens() -> None:
    message = refusal(llama_with(lambda x: x * 2 if x.shape[1] == 1 else x))
    assert "branches on the number of tokens at test_refusals.py" in message
    assert "1 tokens" in message


def test_a_branch_on_many_tokens() -> None:
    message = refusal(llama_with(lambda x: x * 2 if x.shape[1] > 20 else x))
    assert "branches on the number of tokens at test_refusals.py" in message


def test_a_fixed_number_of_tokens() -> None:
    assert "test_refusals.py" in refusal(llama_with(lambda x: x + torch.ones(7, 1)))


def test_an_op_that_draws_random_numbers() -> None:
    assert "draws random numbers" in refusal(llama_with(lambda x: x + torch.rand_like(x)))


def test_state_outside_the_caches() -> None:
    class Counting(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.get_buffer("calls").add_(1)
            return super().forward(*args, **kwargs)

    model: Any = tiny_model("llama")
    model.register_buffer("calls", torch.zeros(1))
    model.__class__ = Counting
    assert "it changes 'calls' while it runs" in refusal(model)


def test_parameters_without_values() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    assert "'model.embed_tokens.weight' is on the meta device" in refusal(model)


@pytest.mark.parametrize(("context", "words"), [(65, "longer than the model's 64 positions"), (1, "too short")])
def test_a_context_that_the_model_does_not_admit(context: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trace(tiny_model("gpt2"), context=context)

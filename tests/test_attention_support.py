"""Which models have attention that can be captured, and the internals of transformers that this relies on."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.attention_doors import tapped_rows, through
from support.teachers import all_heads_kl
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    padded_batch,
    tiny_bert,
    tiny_gpt2,
    tiny_gpt_neo,
    tiny_llama,
    tiny_mamba,
    tiny_mistral,
    tiny_openai_gpt,
    tiny_qwen3,
    tiny_t5,
    with_lora,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap
from seekr_peft.attention import models as support
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection
from seekr_peft.sparse import SparseDistribution

dispatching = pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_mistral, tiny_gpt2, tiny_bert])


# --- why there is a tap ---


def test_output_attentions_under_sdpa_gives_no_weights() -> None:
    output = tiny_llama()(**padded_batch("none"), output_attentions=True)
    assert not output.attentions


def test_a_new_name_without_a_mask_function_would_lose_padding_and_causality(doors: None) -> None:
    """What the tap does not do: it switches the name only after the model has made its mask under the stock name."""
    masks = []

    def nosy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("nosy", nosy)
    tiny = through(tiny_llama(), "nosy")
    tiny(**padded_batch("left"))
    assert masks == [None] * N_LAYERS

    AttentionInterface.register("stub_sdpa", lambda *args, **kwargs: nosy(*args, **kwargs))
    AttentionMaskInterface.register("stub_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    masks.clear()
    tapped_rows(through(tiny_llama(), "stub_sdpa"), padded_batch("left"))
    assert [mask.shape for mask in masks] == [(5, 1, 19, 19)] * N_LAYERS


# --- which models ---


@dispatching
def test_a_models_attention_modules_are_found_by_layer(build: Callable[..., nn.Module]) -> None:
    model = build()
    modules = support.attention_modules(model)
    assert list(modules) == list(range(N_LAYERS))
    assert all("Attention" in type(module).__name__ for module in modules.values())
    assert support.head_shape(model) == (N_LAYERS, N_HEADS)


def test_a_peft_model_is_looked_through() -> None:
    model = tiny_llama()
    peft_model = with_lora(model)
    assert support.base_transformer(peft_model) is model
    assert support.attention_modules(peft_model) == support.attention_modules(model)


# torch's own compiler still uses TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_is_looked_through() -> None:
    model = tiny_llama()
    assert support.base_transformer(torch.compile(with_lora(model))) is model


def test_a_model_without_attention_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="MambaForCausalLM has no softmax attention module"):
        AttentionTap(tiny_mamba(), HeadSelection({0: [0]}))


def test_an_encoder_decoder_is_refused_by_name() -> None:
    message = r"T5ForConditionalGeneration has more than one .* layer index 0 \(the second is decoder\.block"
    with pytest.raises(CaptureError, match=message):
        AttentionTap(tiny_t5(), HeadSelection({0: [0]}))


def test_a_model_is_walked_once_until_its_layers_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = tiny_llama(), []
    walk = support._walk
    monkeypatch.setattr(support, "_walk", lambda root: walks.append(root) or walk(root))
    first = support.attention_modules(model)
    with AttentionTap(model, HeadSelection({0: [0]})):
        assert support.attention_modules(with_lora(model)) == first
    assert len(walks) == 1

    layers = model.model.layers
    layers[1].self_attn = copy.deepcopy(layers[1].self_attn)
    assert support.attention_modules(model)[1] is layers[1].self_attn is not first[1]
    layers.append(copy.deepcopy(layers[-1]))
    layers[-1].self_attn.layer_idx = len(layers) - 1
    assert support.attention_modules(model)[len(layers) - 1] is layers[-1].self_attn
    del layers[0]
    assert 0 not in support.attention_modules(model)
    model.model.layers = nn.ModuleList([*layers, copy.deepcopy(layers[-1])])
    model.model.layers[-1].self_attn.layer_idx = 9
    assert list(support.attention_modules(model)) == [*range(1, N_LAYERS + 1), 9]
    model.model.layers[-1].self_attn.layer_idx = 8
    assert list(support.attention_modules(model)) == [*range(1, N_LAYERS + 1), 8]


def test_a_layer_that_is_replaced_around_its_attention_is_asked_about_checkpointing() -> None:
    model = with_lora(tiny_llama()).train()
    assert not support.uses_reentrant_checkpointing(model)
    layers = support.base_transformer(model).model.layers
    layers[1] = copy.copy(layers[1])
    layers[1].gradient_checkpointing = True
    layers[1]._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint)
    assert support.uses_reentrant_checkpointing(model)


@pytest.mark.parametrize("bare", [False, True])
def test_what_was_looked_up_does_not_keep_a_model_alive(bare: bool) -> None:
    model = tiny_llama()
    model = model.model if bare else model
    # A way from a layer back to the model, as a hook's closure is.
    attention = next(iter(support.attention_modules(model).values()))
    attention.register_forward_hook(lambda module, args, output, model=model: None)
    gone = weakref.ref(model)
    del model, attention
    gc.collect()
    assert gone() is None


# --- checkpointing and dropout ---


@pytest.mark.parametrize(
    ("keywords", "reentrant"),
    [({"use_reentrant": True}, True), ({"use_reentrant": False}, False), ({"preserve_rng_state": False}, True)],
)
def test_reentrant_checkpointing_is_recognised(keywords: dict[str, bool], reentrant: bool) -> None:
    """Where nothing is said, torch's own default is reentrant."""
    model = with_lora(tiny_llama()).train()
    assert not support.uses_reentrant_checkpointing(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    assert support.uses_reentrant_checkpointing(model) is reentrant
    assert not support.uses_reentrant_checkpointing(model.eval())
    support.base_transformer(model.train()).activation_checkpointing_disable()
    assert not support.uses_reentrant_checkpointing(model)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_llama, "attention_dropout"),
        (tiny_gpt2, "attn_pdrop"),
        (tiny_gpt_neo, "attention_dropout"),
        (tiny_openai_gpt, "attn_pdrop"),
        (tiny_bert, "attention_probs_dropout_prob"),
    ],
)
def test_attention_dropout_is_recognised_in_training_only(build: Callable[..., nn.Module], name: str) -> None:
    for rate in (0.0, 0.2):
        attention = support.attention_modules(build("eager", **{name: rate}))[1]
        assert support.drops_attention(attention.train()) is (rate > 0)
        assert support.drops_attention(attention.eval()) is False


@pytest.mark.parametrize(("flag", "attribute", "expected"), [(None, False, False), (None, True, True)])
def test_a_modules_own_causality_is_used_where_the_call_is_silent(
    flag: bool | None, attribute: bool, expected: bool
) -> None:
    module = nn.Module()
    module.is_causal = attribute
    assert support.is_causal(module, flag) is expected
    assert support.is_causal(module, not attribute) is not expected
    assert support.is_causal(nn.Module(), None) is True


# --- the internals of transformers that all of this relies on ---


@dispatching
def test_transformers_attention_modules_carry_a_layer_index_and_the_shared_configuration(
    build: Callable[..., nn.Module],
) -> None:
    model = build()
    for layer, module in support.attention_modules(model).items():
        assert module.layer_idx == layer
        assert module.config is model.config


@dispatching
def test_transformers_modelling_files_look_functions_up_in_their_own_table(build: Callable[..., nn.Module]) -> None:
    module = support.attention_modules(build())[0]
    functions = support.attention_functions(module)
    assert functions is sys.modules[type(module).__module__].ALL_ATTENTION_FUNCTIONS
    assert callable(functions["sdpa"]) and "eager" not in functions


@dispatching
def test_transformers_reads_the_attention_name_at_call_time(doors: None, build: Callable[..., nn.Module]) -> None:
    """And a function that is registered after the model was built is found."""
    model, calls = build(), []

    def recorder(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        calls.append((module.layer_idx, query.shape[1:3], key.shape[2], value.dim()))
        return query.transpose(1, 2), None

    AttentionInterface.register("recorder", recorder)
    modules = support.attention_modules(model)
    assert {support.implementation(module) for module in modules.values()} == {"sdpa"}
    modules[0].config._attn_implementation = "recorder"
    model(**padded_batch("none"))
    assert calls == [(layer, (N_HEADS, 19), 19, 4) for layer in range(N_LAYERS)]


def test_transformers_checkpointed_layers_keep_their_function_and_flag() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        assert layer.gradient_checkpointing is True
        assert isinstance(layer._gradient_checkpointing_func, partial)
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_transformers_kernels_take_the_arguments_that_the_tap_reads() -> None:
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        function = support.attention_functions(support.attention_modules(tiny_llama())[0])[name]
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:5] == ["module", "query", "key", "value", "attention_mask"]
        assert "scaling" in parameters


def test_eager_rows_of_a_uniform_teacher_are_what_the_interface_gives() -> None:
    """The two kinds of call agree on every question that an observer may ask."""
    batch, heads = padded_batch("right"), HeadSelection({1: [0, 5]})
    teacher = SparseDistribution.from_dense(torch.ones(5, 2, 19, 19).tril() / torch.arange(1, 20)[:, None], 3)
    results = []
    for attention in ("eager", "sdpa"):
        model = tiny_llama(attention)
        observe = lambda layer, call: torch.cat([call.rows().sum((1, 2, 3)), all_heads_kl(call, teacher)[None]])  # noqa: E731
        with torch.no_grad(), AttentionTap(model, heads, observe=observe) as tap:
            model(**batch)
        results.append(tap.values[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)

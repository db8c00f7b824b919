"""Which models, adapters and settings AdapterStack refuses, and the traps of PEFT and bitsandbytes that it avoids."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import relative, two_adapters
from support.core_models import fresh_peft, logits_of, randomise, trained_stack
from support.tiny_models import tiny_llama, tiny_mixtral, with_lora
from torch import nn

from seekr_peft.errors import AdapterError
from seekr_peft.methods import get_method
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.low_rank_sum import Consolidation


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
    ],
)
def test_an_adapter_that_is_no_plain_sum_is_refused_by_its_key(lora: dict, key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh_peft(**{**lora, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match=f"adapter 'default' has {key}"):
        AdapterStack(model)


def test_an_adapter_on_the_embeddings_is_refused() -> None:
    with pytest.raises(AdapterError, match="embed_tokens, which is no linear layer"):
        AdapterStack(fresh_peft(target_modules=["embed_tokens", "q_proj"]))


# PEFT's own pattern of ranks for experts.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_an_adapter_on_experts_is_refused_and_one_on_the_attention_beside_them_adds_up() -> None:
    """On the experts the sum of two tasks was 46 % off: their factors lie in one A and one B."""
    with pytest.raises(AdapterError, match=r"on the experts or their router, .*layers\.0\.mlp\..*'o_proj'\]"):
        AdapterStack(with_lora(tiny_mixtral()))
    with pytest.raises(AdapterError, match=r"on the experts or their router, .*layers\.0\.mlp\.gate,"):
        AdapterStack(with_lora(tiny_mixtral(), target_modules=["gate", "q_proj"]))
    model = with_lora(tiny_mixtral(), target_modules=["q_proj", "v_proj", "o_proj"])
    stack = AdapterStack(model)
    for _ in range(2):
        stack.begin()
        for parameter in stack.parameters().values():
            parameter.data += 0.05 * torch.randn_like(parameter)
        before = logits_of(model)
        stack.finish()
        assert relative(logits_of(model), before) < 1e-5


def test_a_second_adapter_is_checked_as_well() -> None:
    model = fresh_peft(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="sit on different modules"):
        AdapterStack(model)
    model.delete_adapter("other")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="'other' has use_dora=True"):
        AdapterStack(model)


def test_a_model_without_lora_is_refused_with_what_it_is() -> None:
    from peft import IA3Config

    with pytest.raises(AdapterError, match="the model is a LlamaForCausalLM, not a PeftModel"):
        AdapterStack(tiny_llama())  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="the model is a str, not a PeftModel"):
        AdapterStack("some/model")  # type: ignore[arg-type]
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="is IA3Config; only LoRA adapters"):
        AdapterStack(model)


def compiled(model: nn.Module) -> Any:
    # Inductor, the default, takes seconds to be imported and warns of itself.
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("method", ["sequential", "replay", "seekr"])
@pytest.mark.parametrize("wrapper", [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))])
def test_a_wrapper_around_a_peft_model_is_refused_with_where_it_belongs(wrapper: Any, method: str) -> None:
    wrapped = wrapper(fresh_peft())
    message = (
        rf"^the model is a {type(wrapped).__name__} around a PeftModel; give the PeftModel itself, before "
        r"torch\.compile or .*TrainingArguments\(torch_compile=True\)"
    )
    with pytest.raises(AdapterError, match=message):
        get_method(method)(wrapped)


def test_by_default_eight_tasks_are_summed_exactly_and_a_ninth_is_not() -> None:
    stack = trained_stack(n_tasks=8, open_task=False, rank_limit="auto")
    assert stack.rank_limit == 8 * 4
    assert stack.last_consolidation == Consolidation(32, 0.0, 0.0)
    stack.begin()
    randomise(stack.parameters(), seed=99)
    consolidation = stack.finish()
    assert consolidation is not None and consolidation.rank == 32 and consolidation.discarded_energy > 0


def test_settings_out_of_range_are_refused_with_their_value() -> None:
    with pytest.raises(AdapterError, match="'stack' or 'continue', got 'pile'"):
        AdapterStack(fresh_peft(), mode="pile")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="at least 1, got 0"):
        AdapterStack(fresh_peft(), rank_limit=0)
    with pytest.raises(AdapterError, match="at least 1, got 'much'"):
        AdapterStack(fresh_peft(), rank_limit="much")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"one adapter, got \['default', 'second'\]"):
        AdapterStack(two_adapters(), mode="continue")

"""Which LoRA settings may be added up: each accepted one against the dense sum, each other one refused by its name."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraRuntimeConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from support.adapters import adapter_change, relative
from support.core_models import fresh_peft, logits_of, randomise
from support.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, with_lora

from seekr_peft.errors import AdapterError
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.plain_lora import ANY_VALUE, OFF, SOME_VALUES, why_refused

SOME_LAYERS = {"target_modules": ["q_proj", "v_proj"]}

ACCEPTED: dict[str, list[dict[str, Any]]] = {
    "alpha_pattern": [{"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 40}}],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}],
    "base_model_name_or_path": [{"base_model_name_or_path": "some/base"}],
    "bias": [{"bias": "none"}],
    "corda_config": [{"corda_config": {"corda_method": "ipm"}}],
    "eva_config": [{"eva_config": {"rho": 3.0}}],
    "exclude_modules": [{"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}],
    "fan_in_fan_out": [{"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}],
    "inference_mode": [{"inference_mode": True}],
    "init_lora_weights": [{"init_lora_weights": value} for value in (False, "gaussian", "Gaussian", "orthogonal")],
    "layers_pattern": [{**SOME_LAYERS, "layers_pattern": "layers", "layers_to_transform": [2]}],
    "layers_to_transform": [{**SOME_LAYERS, "layers_to_transform": value} for value in ([0, 2], 1)],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "lora_alpha": [{"lora_alpha": 3}],
    "lora_dropout": [{"lora_dropout": 0.4}],
    "lora_ga_config": [{"lora_ga_config": {"direction": "random"}}],
    "megatron_core": [{"megatron_core": "another.core"}],
    "peft_type": [{"peft_type": "LORA"}],
    "peft_version": [{"peft_version": "0.1"}],
    "qalora_group_size": [{"qalora_group_size": 4}],
    "r": [{"r": 2}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 7, "down_proj": 1}}],
    "revision": [{"revision": "main"}],
    "runtime_config": [{"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}],
    "target_modules": [{"target_modules": value} for value in (["o_proj", "lm_head"], r".*layers\.[02]\..*gate_proj")],
    "task_type": [{"task_type": value} for value in (None, "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")],
    "use_rslora": [{"use_rslora": True}],
}
"""For every setting that is accepted at another value than its default, such values."""


def model_for(lora: dict[str, Any]) -> Any:
    if "fan_in_fan_out" in lora:
        return with_lora(tiny_gpt2(), **lora)
    if lora.get("task_type", "CAUSAL_LM") == "SEQ_2_SEQ_LM":
        return get_peft_model(tiny_t5(), LoraConfig(r=4, target_modules=["q", "v", "wo"], **lora))
    return fresh_peft(**lora)


def outputs_of(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        model.eval()
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **extra)[0]


def test_every_setting_of_the_installed_peft_is_classified_once() -> None:
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    lists = [ANY_VALUE, frozenset(SOME_VALUES), OFF]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
    assert names == frozenset().union(*lists), "look at what is new or gone, and put it on the right list"


def test_every_accepted_setting_has_its_sum_tested() -> None:
    assert set(ACCEPTED) == ANY_VALUE | set(SOME_VALUES)


# PEFT's own word on settings without effect.
@pytest.mark.filterwarnings("ignore:.*specified but will be ignored")
@pytest.mark.filterwarnings("ignore:.*was renamed from 'some/base'")
@pytest.mark.parametrize("lora", [lora for cases in ACCEPTED.values() for lora in cases], ids=str)
def test_adapters_with_an_accepted_setting_add_up_to_the_dense_sum(lora: dict[str, Any]) -> None:
    model = model_for(lora)
    stack = AdapterStack(model)
    for task in range(2):
        stack.begin()
        randomise(stack.parameters(), task)
        names = [name for name in (stack.earlier, stack.current) if name]
        wanted, before = adapter_change(model, names), outputs_of(model)
        stack.finish()
        found = adapter_change(model, [stack.earlier])
        assert relative(outputs_of(model), before) < 1e-5
        assert wanted.keys() == found.keys()
        assert max(relative(found[path], wanted[path]) for path in wanted) < 1e-6
    with model.disable_adapter():
        assert relative(outputs_of(model), before) > 0.01


# What is refused ------------------------------------------------------------------------------------------------

REFUSED_VALUES: dict[str, Any] = {
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 1},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "megatron_config": {"tensor_model_parallel_size": 1},
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 2},
    "target_parameters": ["mlp.experts.down_proj"],
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"num_groups": 2},
}


@pytest.mark.parametrize("key", sorted(OFF))
def test_a_setting_that_is_not_plain_is_refused_by_its_name_and_value_and_passes_when_it_is_off(key: str) -> None:
    model = fresh_peft(target_modules=["q_proj"])
    config = model.peft_config["default"]
    for off in (None, False, [], {}):
        setattr(config, key, off)
        AdapterStack(model)
    model = fresh_peft(target_modules=["q_proj"])
    setattr(model.peft_config["default"], key, REFUSED_VALUES[key])
    with pytest.raises(AdapterError) as caught:
        AdapterStack(model)
    text = str(caught.value)
    assert text.startswith(f"adapter 'default' has {key}={REFUSED_VALUES[key]!r}, whose change cannot be added up")
    assert "leave" in text and text.count("\n") == 0 and text.endswith(".")


REAL = [
    ({"use_bdlora": BdLoraConfig(["q_proj"], ["o_proj"], nblocks=2)}, "use_bdlora", "BdLoraLinearVariant"),
    ({"use_dora": True}, "use_dora", "DoraLinearVariant"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens", "ALoraLinearVariant"),
    ({"kasa_config": KasaConfig()}, "kasa_config", "KasaLinearVariant"),
    ({"monteclora_config": MontecloraConfig(num_samples=2)}, "monteclora_config", "MontecloraLinearVariant"),
    ({"velora_config": VeloraConfig(num_groups=2)}, "velora_config", "VeloraLinearVariant"),
    ({"init_lora_weights": "mica"}, "init_lora_weights", "MiCALinearVariant"),
    ({"lora_bias": True}, "lora_bias", "lora_B with a bias"),
]


@pytest.mark.parametrize(("lora", "key", "kind"), REAL, ids=[key for _, key, _ in REAL])
def test_each_variant_of_lora_is_refused_by_its_setting_and_where_that_is_hidden_by_its_layers(
    lora: dict[str, Any], key: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh_peft(target_modules=["q_proj", "o_proj"], **lora)
    with pytest.raises(AdapterError, match=f"adapter 'default' has {key}="):
        AdapterStack(model)
    monkeypatch.setattr("seekr_peft.model.adapter_checks._check_settings", lambda *_: None)
    with pytest.raises(AdapterError, match=rf"'default' computes {kind} at .*q_proj, not a plain B A"):
        AdapterStack(model)


@dataclasses.dataclass
class LaterLoraConfig(LoraConfig):
    """As a later PEFT may have it."""

    use_something_new: str | None = None
    safe_sums: bool = True


def test_a_setting_of_a_later_peft_passes_at_its_default_and_is_refused_by_name_at_any_other_value() -> None:
    def stack_with(**settings: Any) -> AdapterStack:
        config = LaterLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
        return AdapterStack(get_peft_model(tiny_llama(), config))

    stack_with()
    with pytest.raises(AdapterError, match=r"has use_something_new='on', .* leave it at its default, None"):
        stack_with(use_something_new="on")
    for value in (False, 1, None):
        with pytest.raises(AdapterError, match=rf"has safe_sums={value!r}, .* leave it at its default, True"):
            stack_with(safe_sums=value)


def test_a_setting_beside_the_fields_is_refused_as_well() -> None:
    model = fresh_peft(target_modules=["q_proj"])
    model.peft_config["default"].rotate_factors = 3
    with pytest.raises(AdapterError, match="has rotate_factors=3"):
        AdapterStack(model)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_moves_the_base_is_refused_with_pefts_way_to_plain_lora(name: str) -> None:
    why = why_refused("init_lora_weights", name, True)
    assert why is not None
    for part in ("init_lora_weights=True", "path_initial_model_for_weight_conversion=INIT", "the base as it was"):
        assert part in why


def test_an_adapter_that_starts_from_the_singular_vectors_becomes_plain_the_way_the_refusal_says(
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh_peft(init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
        with pytest.raises(AdapterError, match="has init_lora_weights='pissa', which moves part of the base's own"):
            AdapterStack(model)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "init")
        parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        trained = logits_of(model)
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    stack = AdapterStack(plain)
    assert stack.adopted
    assert relative(logits_of(plain), trained) < 1e-4
    assert relative(logits_of(plain), logits_of(tiny_llama())) > 0.01


@pytest.mark.parametrize("name", ["mica", "eva"])
def test_an_initialisation_from_data_or_weights_is_refused_and_a_trained_one_is_plain_the_way_it_says(
    name: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh_peft(init_lora_weights=name, target_modules=["q_proj", "v_proj"])
        with pytest.raises(AdapterError, match=rf"has init_lora_weights='{name}', .*into its adapter_config.json"):
            AdapterStack(model)
        randomise({key: p for key, p in model.named_parameters() if "lora_" in key}, seed=0)
        trained = logits_of(model)
        model.save_pretrained(tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_text(config.read_text().replace(f'"init_lora_weights": "{name}"', '"init_lora_weights": true'))
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert AdapterStack(plain).adopted
    assert relative(logits_of(plain), trained) < 1e-5


def test_an_initialisation_that_quantises_the_base_is_refused_without_a_way_that_does_not_exist() -> None:
    why = why_refused("init_lora_weights", "loftq", True)
    assert why is not None and "PEFT cannot turn it into plain LoRA afterwards" in why and "=INIT" not in why


@pytest.mark.parametrize(
    ("task_type", "kind"),
    [
        ("SEQ_CLS", "sequence classification"),
        ("TOKEN_CLS", "token classification"),
        ("QUESTION_ANS", "span extraction"),
    ],
)
def test_a_task_with_a_head_is_refused_as_not_supported_yet_and_not_as_modules_to_save(
    task_type: str, kind: str
) -> None:
    from transformers import LlamaForQuestionAnswering, LlamaForSequenceClassification, LlamaForTokenClassification

    heads = {
        "SEQ_CLS": LlamaForSequenceClassification,
        "TOKEN_CLS": LlamaForTokenClassification,
        "QUESTION_ANS": LlamaForQuestionAnswering,
    }
    base = heads[task_type](tiny_llama().config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type=task_type))
    assert model.peft_config["default"].modules_to_save, "PEFT adds the head by itself"
    with pytest.raises(AdapterError) as caught:
        AdapterStack(model)
    text = str(caught.value)
    assert text.startswith(f"adapter 'default' has task_type='{task_type}', whose newly made head")
    assert f"{kind} with a head of its own is not supported yet: write the classes as text" in text
    assert "modules_to_save" not in text


# What is around the adapter -------------------------------------------------------------------------------------


def test_a_kind_of_lora_of_its_own_class_is_refused_by_it() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="is AdaLoraConfig; only LoRA adapters can be stacked"):
        AdapterStack(get_peft_model(tiny_llama(), config))


def test_a_model_of_mixed_adapters_is_refused_with_how_to_make_it() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(AdapterError, match=r"mixes kinds of adapters .* without mixed=True: get_peft_model"):
        AdapterStack(model)  # type: ignore[arg-type]


def test_adapters_on_other_than_linear_layers_are_refused_by_the_layers_kind() -> None:
    class Convolving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.convolution = torch.nn.Conv1d(3, 4, 1)
            self.linear = torch.nn.Linear(3, 4)

    for name, kind in (("attention", "MultiheadAttention"), ("convolution", "Conv1d")):
        model = get_peft_model(Convolving(), LoraConfig(r=2, target_modules=[name, "linear"]))
        with pytest.raises(AdapterError, match=f"{name}, which is no linear layer but {kind}"):
            AdapterStack(model)


def test_a_layer_class_of_the_users_own_is_refused() -> None:
    from peft.tuners.lora import Linear as LoraLinear

    class Doubled(LoraLinear):
        pass

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({torch.nn.Linear: Doubled})
    with pytest.raises(AdapterError, match=r"computes .*Doubled at .*q_proj, not a plain B A"):
        AdapterStack(get_peft_model(tiny_llama(), config))


def test_merged_and_switched_off_adapters_are_refused_with_the_call_that_undoes_it() -> None:
    model = with_lora(tiny_llama())
    before = logits_of(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"'default' is merged into the base weights .*model.unmerge_adapter\(\)"):
        AdapterStack(model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match=r"switched off .*model.base_model.enable_adapter_layers\(\)"):
        AdapterStack(model)
    model.base_model.enable_adapter_layers()
    AdapterStack(model)
    assert relative(logits_of(model), before) < 1e-5


def test_adapters_on_different_layers_are_refused_even_with_the_same_target_modules() -> None:
    model = fresh_peft(target_modules=["q_proj"], layers_to_transform=[0])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"sit on different modules .*which differ at .*layers\.1\..*q_proj"):
        AdapterStack(model)


def test_an_adapter_called_like_a_part_of_the_model_is_refused() -> None:
    """PEFT sorts weights by names between dots: saving another adapter would leave out the layers of that name."""
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="self_attn"
    )
    with pytest.raises(AdapterError, match=r"'self_attn' is called like a part of .*give the adapter another name"):
        AdapterStack(model)


def test_an_encoder_with_a_plain_adapter_is_summed_like_any_other() -> None:
    stack = AdapterStack(with_lora(tiny_bert(), task_type=None))
    before = outputs_of(stack.model)
    stack.begin()
    stack.finish()
    assert relative(outputs_of(stack.model), before) < 1e-5

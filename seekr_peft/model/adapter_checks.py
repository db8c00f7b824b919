"""What an adapter must be for ``AdapterStack``: a plain LoRA whose product can be added up exactly over the tasks."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import AdapterError
from .lora_layers import active_adapter, changed_config, layers_of, lora_layers, sorted_names
from .plain_lora import CONFIG_FILE, SEPARATE, why_refused

SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
"""What decides the shape and the scale of an adapter's change."""


def check_wrapping(model: Any) -> None:
    """AdapterError unless ``model`` is a PeftModel around a base without any adapter of its own."""
    wrap = "get_peft_model(base, LoraConfig(...))"
    if isinstance(model, PeftMixedModel):
        raise AdapterError(f"the model mixes kinds of adapters (PeftMixedModel); make it without mixed=True: {wrap}.")
    if not isinstance(model, PeftModel):
        if _holds_peft_model(model):
            raise AdapterError(
                f"the model is a {type(model).__name__} around a PeftModel; give the PeftModel itself, before "
                f"torch.compile or a wrapper for several devices (TrainingArguments(torch_compile=True) compiles it)."
            )
        raise AdapterError(f"the model is a {type(model).__name__}, not a PeftModel; wrap it first: {wrap}.")
    base = model.get_base_model()
    if isinstance(base, PeftModel):
        raise AdapterError(
            f"the model is a PeftModel around another PeftModel, whose adapter PEFT replaces or leaves out; give the "
            f"one that has the adapter to go on from, or a new one over the base alone: {wrap}."
        )
    check_no_hidden_adapter(base)


def _holds_peft_model(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, PeftModel) for module in model.modules())


def check_no_hidden_adapter(base: nn.Module) -> None:
    """AdapterError when transformers has put an adapter into ``base`` itself, as it does for a folder that holds one
    beside the weights: PEFT's next adapter would replace it or leave it out without a word."""
    # transformers' mark of it (5.23); there is no public one.
    if getattr(base, "_hf_peft_config_loaded", False):
        raise AdapterError(
            f"the base model {getattr(base, 'name_or_path', '') or type(base).__name__} was loaded with an adapter of "
            f"its own ({CONFIG_FILE} beside the weights, load_adapter() or add_adapter()), which a PeftModel around it "
            f"would replace or leave out; {SEPARATE}."
        )


def checked_template(model: PeftModel) -> LoraConfig:
    """The configuration of the active adapter; every adapter of the model must be one that can be added up."""
    check_summable(model)
    active = active_adapter(model)
    template: Any = model.peft_config[active]
    for name, config in model.peft_config.items():
        apart = layers_of(model, name) ^ layers_of(model, active)
        if apart or sorted_names(config.target_modules) != sorted_names(template.target_modules):
            where = f", which differ at {min(apart)}" if apart else ""
            raise AdapterError(
                f"adapters {active!r} and {name!r} sit on different modules ({template.target_modules!r} and "
                f"{config.target_modules!r}{where}), so they cannot become one; use one adapter, or equal "
                f"target_modules."
            )
    return changed_config(getattr(template, "_seekr_template", template), inference_mode=False)


def check_summable(model: PeftModel) -> None:
    """AdapterError for an adapter whose change is no plain B A of a linear layer."""
    for name, config in model.peft_config.items():
        _check_kind(name, config)
        for path, layer in lora_layers(model):
            _check_no_experts(name, path, layer)
        _check_settings(name, config)
        for path, layer in lora_layers(model):
            if name in (*layer.lora_A, *layer.lora_embedding_A):
                _check_layer(name, path, layer)


def _check_kind(name: str, config: Any) -> None:
    # AdaLoraConfig is a LoraConfig, too.
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise AdapterError(
            f"adapter {name!r} is {type(config).__name__}; only LoRA adapters can be stacked, use LoraConfig."
        )


def _check_no_experts(name: str, path: str, layer: Any) -> None:
    # PEFT wraps parameters of a router or of experts, whose factors lie in one A and one B and do not add up by
    # joining their ranks.
    if hasattr(layer, "num_experts"):
        raise AdapterError(
            f"adapter {name!r} sits on the experts or their router, {path}, which cannot be added up exactly; give "
            f"target_modules of linear layers, such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']."
        )


def _check_settings(name: str, config: LoraConfig) -> None:
    for key, (value, default) in _settings(config).items():
        why = why_refused(key, value, default)
        if why:
            raise AdapterError(f"adapter {name!r} has {key}={getattr(value, 'value', value)!r}, {why}")


def _settings(config: LoraConfig) -> dict[str, tuple[Any, Any]]:
    """Value and default of every setting; one that PEFT has put beside the fields counts as None by default."""
    settings = {
        field.name: (
            getattr(config, field.name),
            field.default if field.default_factory is MISSING else field.default_factory(),
        )
        for field in fields(config)
    }
    beside = {key: (value, None) for key, value in vars(config).items() if key not in settings and key[0] != "_"}
    return {**settings, **beside}


def _check_layer(name: str, path: str, layer: Any) -> None:
    base = layer.get_base_layer()
    kind = type(base).__name__
    if name not in layer.lora_A or not (isinstance(base, (nn.Linear, Conv1D)) or "Linear" in kind):
        raise AdapterError(
            f"adapter {name!r} sits on {path}, which is no linear layer but {kind}; use target_modules='all-linear'."
        )
    if name in path.split("."):
        raise AdapterError(
            f"adapter {name!r} is called like a part of {path}, so PEFT cannot tell their weights apart when it saves "
            f"them; give the adapter another name."
        )
    special = _special_parts(name, layer)
    if special:
        raise AdapterError(
            f"adapter {name!r} computes {special} at {path}, not a plain B A that can be added up exactly over the "
            f"tasks; use a LoraConfig without it."
        )
    if layer.merged:
        raise AdapterError(
            f"adapter {layer.merged_adapters[0]!r} is merged into the base weights at {path}, so that no other can "
            f"act; call model.unmerge_adapter() first."
        )
    if layer.disable_adapters:
        raise AdapterError(
            f"the adapters are switched off at {path}, so nothing would be learnt; call "
            f"model.base_model.enable_adapter_layers() first."
        )


_PLAIN_PARTS = {"base_layer", "lora_A", "lora_B", "lora_dropout"}


def _special_parts(name: str, layer: Any) -> str:
    """What a layer computes for an adapter beside B A, in PEFT's words; "" for nothing.

    PEFT keeps each kind's parameters in containers by adapter name, and its computation in ``lora_variant``.
    """
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:
        return type(variant).__name__
    if not type(layer).__module__.startswith("peft.tuners.lora"):
        return type(layer).__qualname__
    for key, child in layer.named_children():
        if key not in _PLAIN_PARTS and isinstance(child, (nn.ModuleDict, nn.ParameterDict)) and name in child:
            return key
    for side in ("lora_A", "lora_B"):
        factor = getattr(layer, side)[name]
        if type(factor) is not nn.Linear or factor.bias is not None:
            return f"{side} with a bias" if type(factor) is nn.Linear else type(factor).__name__
    return ""


def is_trained(model: nn.Module, name: str) -> bool:
    return any(bool(layer.lora_B[name].weight.any()) for _, layer in lora_layers(model) if name in layer.lora_B)


def check_active(model: PeftModel, trained: list[str]) -> None:
    """AdapterError for an adapter of ``trained`` that the model computes without: in a sum it would act."""
    for name in trained:
        for path, layer in lora_layers(model):
            if name in layer.lora_B and name not in layer.active_adapters:
                active = list(dict.fromkeys([*model.base_model.active_adapters, name]))
                raise AdapterError(
                    f"adapter {name!r} is trained, but not active at {path}, so summing it up with the others would "
                    f"change what the model computes; call model.delete_adapter({name!r}), or "
                    f"model.base_model.set_adapter({active!r}) for it to count as an earlier one."
                )

"""The LoRA layers of a model, and its adapters' names and settings as PEFT keeps them. Changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def changed_config(config: LoraConfig, **settings: Any) -> LoraConfig:
    """A copy with other settings; not made anew, since PEFT then warns again of what it warned of before."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def active_adapter(model: PeftModel) -> str:
    """The adapter whose configuration the model's forward reads."""
    return model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]


def layers_of(model: nn.Module, name: str) -> set[str]:
    return {path for path, layer in lora_layers(model) if name in (*layer.lora_A, *layer.lora_embedding_A)}


def free_name(name: str, taken: Any) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def sorted_names(setting: Any) -> Any:
    """A setting in which the order of a list of names does not count."""
    return sorted(setting) if isinstance(setting, (list, set)) else setting

"""The quantisation that a recipe asks for, against the one that a base is stored in, and the dtype it computes in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..errors import ConfigError
from ..model.kind import (
    stored_quantization,
)
from .schema import ModelSection


def compute_dtype(model: ModelSection) -> torch.dtype:
    """The dtype that the layers compute in."""
    if model.bnb_4bit_compute_dtype:
        return getattr(torch, model.bnb_4bit_compute_dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_quantized(base: Any) -> bool:
    """Whether the base was loaded with quantised weights, by the recipe or because its files hold them so."""
    return bool(getattr(base, "is_quantized", False))


def check_trainable(base: Any, name: str) -> None:
    # As transformers' Trainer asks; PEFT does not.
    if not base.hf_quantizer.is_trainable:
        kind = type(base.hf_quantizer.quantization_config).__name__
        raise ConfigError(
            f"model.name_or_path: {name} is stored in a quantisation through which nothing can be trained ({kind}); "
            f"use the checkpoint that it was made of, or one that is stored in nf4."
        )


def stored_name(config: Any) -> str | None:
    """The stored quantisation as a recipe calls it, or by its method where a recipe has no name for it."""
    stored = stored_quantization(config)
    if stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type", "fp4"))
    if stored.get("load_in_8bit"):
        return "int8"
    return str(stored.get("quant_method")) if stored else None


def check_quantization(model: ModelSection, config: Any) -> None:
    """ConfigError when the files hold another quantisation than the recipe's, which transformers would load."""
    stored = stored_name(config)
    if stored not in (None, model.quantization) and model.quantization != "none":
        same = f"{stored} or none" if stored in ("nf4", "int8") else "none"
        raise ConfigError(
            f"model.quantization: {model.quantization} cannot be made of {model.name_or_path}, whose weights are "
            f"stored in {stored}; set model.quantization: {same}, which loads them as they are, or use the checkpoint "
            f"that it was made of."
        )


def quantization_options(model: ModelSection, config: Any) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise, or nothing: None stands for no quantisation even where the
    files hold one."""
    if not stored_quantization(config):
        return {} if model.quantization == "none" else {"quantization_config": bitsandbytes_config(model)}
    if model.quantization == "nf4":
        # How the weights are packed is a matter of the files, what they are multiplied in one of the recipe.
        config = copy.deepcopy(config)
        dtype = str(compute_dtype(model)).removeprefix("torch.")
        config.quantization_config = {**stored_quantization(config), "bnb_4bit_compute_dtype": dtype}
        return {"config": config}
    return {}


def bitsandbytes_config(model: ModelSection) -> BitsAndBytesConfig:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(model),
    )

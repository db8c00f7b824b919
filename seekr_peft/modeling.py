"""Load a recipe's base model, tokenizer and LoRA adapter.

May import ``adapters``, ``recipe``, ``tasks`` and ``errors``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .adapters import check_no_hidden_adapter
from .errors import ConfigError
from .recipe import DEMO, ModelSection, Recipe
from .tasks import prepare_tokenizer

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The training argument that switches checkpointing on, under its new and its old name."""


def load_model(recipe: Recipe) -> tuple[PeftModel, Any]:
    """The quantised base with one fresh LoRA adapter, and its tokenizer (with a pad token)."""
    name = resolve_name(recipe.model)
    common = {"trust_remote_code": recipe.model.trust_remote_code}
    try:
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(name, **common))
        base = AutoModelForCausalLM.from_pretrained(
            name,
            quantization_config=_quantization(recipe.model),
            dtype=compute_dtype(recipe.model),
            attn_implementation=recipe.model.attn_implementation,
            device_map={"": 0} if torch.cuda.is_available() else None,
            **common,
        )
    except (OSError, ValueError, ImportError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"model.name_or_path: {name} cannot be loaded: {detail}") from error
    check_no_hidden_adapter(base)
    base.config.use_cache = False
    if recipe.model.quantization != "none":
        # PEFT's own default is reentrant checkpointing, under which a captured attention has no gradient.
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=any(recipe.training.get(name) for name in CHECKPOINTING),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return add_adapter(base, recipe), tokenizer


def add_adapter(base: Any, recipe: Recipe) -> PeftModel:
    """``base`` with the recipe's LoRA adapter.

    Raises:
        ConfigError: PEFT takes a setting, such as target_modules that the model does not have, for wrong.
    """
    try:
        return get_peft_model(base, LoraConfig(**recipe.adapter.lora()))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # What LoraConfig does not check itself fails in many ways.
        raise ConfigError(f"adapter: {type(error).__name__}: {' '.join(str(error).split())}") from error


def base_fingerprint(model: PeftModel) -> str:
    """SHA-256 over name, shape, dtype and up to 64 evenly spaced values of every base parameter: the same base, the
    same text. Reads a few kB of a model of any size; takes no account of the adapters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)][:64].cpu()
        # PEFT renames what it wraps, and which layers it wraps is no matter of the base.
        plain = name.replace(".base_layer.", ".")
        digest.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve_name(model: ModelSection) -> str:
    """The folder or hub name that ``from_pretrained`` takes."""
    if model.name_or_path == DEMO:
        from .demo import BASE_PATH

        return str(BASE_PATH)
    return str(Path(model.name_or_path).expanduser()) if model.name_or_path.startswith("~") else model.name_or_path


def compute_dtype(model: ModelSection) -> torch.dtype:
    """The dtype that the layers compute in."""
    if model.bnb_4bit_compute_dtype:
        return getattr(torch, model.bnb_4bit_compute_dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _quantization(model: ModelSection) -> BitsAndBytesConfig | None:
    if model.quantization == "none":
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(model),
    )

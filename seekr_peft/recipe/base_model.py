"""Load a recipe's base model, tokenizer and LoRA adapter, and refuse those that are not whole."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError, SeekrError, cut
from ..model.adapter_checks import check_no_hidden_adapter
from ..model.facts import ModelFacts
from ..tasks import check_chat_template, prepare_tokenizer
from .base_config import attention_implementation, one_line, panics_are_errors, read_config, resolve_name
from .base_weights import LoadingReport, check_downloaded, check_made_up, check_tokens, check_whole
from .quantization import compute_dtype, is_quantized, quantization_options
from .schema import ModelSection, Recipe

logger = logging.getLogger("seekr_peft")


CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The training argument that switches checkpointing on, under its new and its old name."""


def load_model(recipe: Recipe) -> tuple[PeftModel, Any]:
    """The quantised base with one fresh LoRA adapter, and its tokenizer (with a pad token).

    Raises:
        ConfigError: The base is no causal language model of text, its weights are not whole (missing, of another shape,
            NaN), or its tokenizer has tokens that it has no embeddings for.
    """
    config = read_config(recipe.model)
    tokenizer, base = _load(recipe.model, config, recipe.tasks.chat_template)
    check_no_hidden_adapter(base)
    check_tokens(tokenizer, ModelFacts.of(base).embedding_rows, recipe.model.name_or_path)
    base.config.use_cache = False
    if is_quantized(base):
        # PEFT's own default is reentrant checkpointing, under which a captured attention has no gradient.
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=any(recipe.training.get(name) for name in CHECKPOINTING),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return add_adapter(base, recipe), tokenizer


def _load(model: ModelSection, config: Any, chat: bool) -> tuple[Any, Any]:
    name = resolve_name(model)
    common = {"trust_remote_code": model.trust_remote_code}
    report = LoadingReport()
    try:
        with panics_are_errors():
            tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(name, **common))
            # Some damage (a model_max_length that is a list) only shows in use.
            tokenizer.decode(tokenizer("a b")["input_ids"])
        if chat:
            check_chat_template(tokenizer)
        with report.instead_of_shown(), panics_are_errors():
            base, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=compute_dtype(model),
                attn_implementation=attention_implementation(model.attn_implementation, config),
                device_map={"": 0} if torch.cuda.is_available() else None,
                output_loading_info=True,
                # False would leave safetensors aside where both are there.
                use_safetensors=model.use_safetensors or None,
                # They are told below, by name.
                ignore_mismatched_sizes=True,
                **quantization_options(model, config),
                **common,
            )
        check_whole(base, loaded, name, model.name_or_path)
    except (MemoryError, torch.OutOfMemoryError, SeekrError):
        raise
    except Exception as error:
        # A broken file, a package that is missing, a setting that the family does not have.
        check_made_up(error, report, config, model)
        check_downloaded(error, name, model)
        raise ConfigError(f"model.name_or_path: {model.name_or_path} cannot be loaded: {one_line(error)}") from error
    return tokenizer, base


def add_adapter(base: Any, recipe: Recipe) -> PeftModel:
    """``base`` with the recipe's LoRA adapter.

    Raises:
        ConfigError: PEFT takes a setting, such as target_modules that the model does not have, for wrong.
    """
    _check_layers(base, recipe.adapter.lora().get("layers_to_transform"))
    try:
        return get_peft_model(base, LoraConfig(**recipe.adapter.lora()))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # What LoraConfig does not check itself fails in many ways.
        raise ConfigError(f"adapter: {type(error).__name__}: {cut(' '.join(str(error).split()), 500)}") from error


def _check_layers(base: Any, wanted: int | list[int] | None) -> None:
    """ConfigError for a layer that the model does not have, of which PEFT says nothing where others fit."""
    if wanted is None:
        return
    n_layers = base.config.get_text_config().num_hidden_layers
    beyond = [layer for layer in ([wanted] if isinstance(wanted, int) else wanted) if layer >= n_layers]
    if beyond:
        raise ConfigError(
            f"adapter.layers_to_transform names layer {beyond[0]}, but the model has {n_layers}, counted from 0; leave "
            f"it out."
        )

"""What kind of model a configuration or a loaded model is, and whether continual training means something for it.

Training needs a causal language model that reads text: a label is compared with what the model says one place before
it, having seen nothing later. Everything else is refused here, a checkpoint by its own configuration before its weights
are loaded, a loaded model by its class too.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto import modeling_auto

from ..attention.models import is_encoder
from ..errors import AdapterError, ConfigError, shown
from .bitsandbytes_cpu import scales
from .facts import ModelFacts

_ASKED_WHETHER_DECODER = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
"""Families that look in both directions unless ``is_decoder`` is set."""

_LABELS_IN_PLACE = {
    *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    *("trocr", "xlm", "flaubert", "xlnet", "cpmant"),
}
"""Families, decoders of encoder-decoders above all, whose loss compares a label with the logits at its own place."""

_HEAD = re.compile(r"For(?P<task>[A-Z]\w*)$")
_LANGUAGE_HEADS = {"CausalLM", "ConditionalGeneration"}
_LOADED_AS_DECODER = {"MaskedLM", "PreTraining"}
"""Heads whose weights AutoModelForCausalLM takes for the next token's, where ``is_decoder`` is set."""

_OTHER_SENSES = re.compile("vision|image|video|audio|speech")

BOTH_DIRECTIONS = (
    "looks in both directions, so a label's place is not the one before its token and another loss would be trained; "
    "use a causal language model"
)


def check_checkpoint(config: Any, name: str, remote_code: bool = False) -> None:
    """Refuse the checkpoint ``name`` by its configuration; with ``remote_code`` its own code may be run.

    Raises:
        ConfigError: It is no causal language model of text, would be loaded as another class than its own, or pads
            with a token that it has no embedding for.
    """
    text = _text_config(config)
    if not isinstance(text, transformers.PreTrainedConfig):
        # A family without parts takes one for a plain value.
        raise ConfigError(
            f"model.name_or_path: the configuration of {name} cannot be read: it has {shown(text)} in the place of the "
            f"part about text, which a model of the family {config.model_type} does not have; correct its config.json."
        )
    architectures = list(getattr(config, "architectures", None) or [])
    own_code = remote_code and _brings_code(config)
    what = f"{name} ({', '.join((f'model_type {config.model_type}', *architectures))})"
    model_class, config = causal_class(config)
    reason = _reason_against(config, architectures[:1], _LANGUAGE_HEADS | _LOADED_AS_DECODER)
    if reason is None and _perceives(config, model_class):
        reason = "sees or hears, but a recipe's tasks are text; use a model that reads text only"
    reason = reason or _without_language_head(config, model_class)
    if reason is None and model_class is not None and not own_code:
        reason = _of_another_class(architectures[:1], model_class, remote_code)
    if reason:
        raise ConfigError(f"model.name_or_path: {what} {reason}.")
    text = _text_config(config)
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
        raise ConfigError(f"model.name_or_path: {what} {_beyond_padding(padding, rows)}")


def check_model(model: nn.Module) -> None:
    """Refuse a loaded model, a PeftModel around it too. One that sees or hears may train on text alone: samples that
    hold more are refused where they come (``inputs``).

    Raises:
        AdapterError: It is no causal language model of text, a weight holds NaN or infinity, or it pads with a token
            that it has no embedding for.
    """
    facts = ModelFacts.of(model)
    root: Any = facts.root
    name, config = type(root).__name__, root.config
    reason = _reason_against(config, [name], _LANGUAGE_HEADS)
    if reason is None and is_encoder(model):
        reason = BOTH_DIRECTIONS
    if reason is None and root.get_output_embeddings() is None:
        reason = "has no language-model head; load it with AutoModelForCausalLM"
    if reason:
        raise AdapterError(f"{name} (model_type {config.model_type}) {reason}.")
    check_weights(model, name)
    padding, rows = facts.pad_token_id, facts.embedding_rows
    if padding >= rows:
        raise AdapterError(f"{name} {_beyond_padding(padding, rows)}")


def causal_class(config: Any) -> tuple[type[nn.Module] | None, Any]:
    """What ``AutoModelForCausalLM`` makes of ``config``: the class, and the configuration that it is given (a model
    that reads text only gets that part of a composite one); None where it is not transformers' own."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None, config
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    text_class = (config.sub_configs or {}).get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) == text_class:
        return model_class, config.get_text_config()
    return model_class, config


def stored_quantization(config: Any) -> dict[str, Any]:
    """How the weights in the checkpoint's files are quantised, in transformers' keys; empty when they are not."""
    stored = getattr(config, "quantization_config", None) or getattr(_text_config(config), "quantization_config", None)
    return stored if isinstance(stored, dict) else stored.to_dict() if stored else {}


def check_weights(model: nn.Module, name: str, error: type[Exception] = AdapterError) -> None:
    """Raise ``error`` about the first parameter of the model called ``name`` that holds NaN or infinity.

    Reads every weight once, with no copy: 0.04 s for a GB on one core, nothing to speak of on a GPU.
    """
    for path, parameter in model.named_parameters():
        if not all(map(is_finite, (parameter, *scales(parameter)))):
            plain = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
            raise error(non_finite(name, plain))


def non_finite(name: str, tensor: str) -> str:
    """The sentence on a broken weight."""
    return (
        f"{name}: the weight {tensor} holds NaN or infinite values, with which every loss is NaN; download or save the "
        f"model again, or undo what made it diverge."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; whole numbers and tensors without memory always are finite."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    # torch has no minimum of 8-bit floating-point numbers.
    values = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
    # One pass without a boolean for every value; a NaN is both minimum and maximum.
    return all(bool(bound.isfinite()) for bound in values.aminmax())


def _beyond_padding(padding: int, rows: int) -> str:
    return (
        f"pads with token id {padding}, but has {rows} embeddings (0..{rows - 1}); set pad_token_id of its "
        f"configuration to an id it has, or call model.resize_token_embeddings(len(tokenizer)) and save it."
    )


def _reason_against(config: Any, architectures: list[str], heads: set[str]) -> str | None:
    """Why no continual training with this model means anything, as the rest of a sentence; None when it does."""
    text = _text_config(config)
    if getattr(config, "is_encoder_decoder", False):
        return (
            "is an encoder-decoder, of which training as a causal language model would drop the encoder; use a decoder"
        )
    if _looks_both_ways(text):
        return f"{BOTH_DIRECTIONS} (a decoder of this family has is_decoder: true in its configuration)"
    if text.model_type in _LABELS_IN_PLACE:
        return "has a loss that compares a label with the logits at its own place; use a causal language model"
    for head in filter(None, map(_HEAD.search, architectures)):
        if head["task"] not in heads:
            return f"has a head for {head['task']}, not for the next token; use the model that it was made of"
    return None


def _without_language_head(config: Any, model_class: type[nn.Module] | None) -> str | None:
    if model_class is None and not _brings_code(config):
        return "is of a family that has no causal language model; use a causal language model"
    return None


def _brings_code(config: Any) -> bool:
    """Whether the checkpoint has a causal language model of its own beside its weights."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _of_another_class(architectures: list[str], model_class: type[nn.Module], remote_code: bool) -> str | None:
    """Why ``model_class``, which transformers takes by the family alone, is not what was saved; None where it is.

    A class that transformers has is left to its heads and its missing weights: a body without a head is common."""
    known = {model_class.__name__.lower(), *map(str.lower, dir(transformers))}
    for architecture in architectures:
        # The first checkpoints of a family may spell it otherwise: LLaMAForCausalLM.
        if architecture.lower() not in known:
            trust = "" if remote_code else "set model.trust_remote_code if it brings code that you trust, or "
            return (
                f"is a model of the class {architecture}, which transformers does not have, and would be loaded as "
                f"{model_class.__name__}; {trust}use a checkpoint of a class that transformers has"
            )
    return None


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:
        # It has several.
        return config


def _perceives(config: Any, model_class: type[nn.Module] | None) -> bool:
    """Whether there is more than a reader of text; a family's class for text alone has one configuration."""
    parts = list(getattr(config, "sub_configs", None) or {})
    modalities = getattr(model_class, "input_modalities", "text")
    other = set([modalities] if isinstance(modalities, str) else modalities) - {"text"}
    return any(_OTHER_SENSES.search(part) for part in parts) or bool(other and "text_config" in parts)


def _looks_both_ways(text: Any) -> bool:
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return text.model_type in _ASKED_WHETHER_DECODER and not getattr(text, "is_decoder", False)


def base_fingerprint(model: PeftModel, sampled: bool = False) -> str:
    """ "sha256:" and the digest over name, shape, dtype and every value of the base parameters.

    Takes no account of the adapters, nor of where the model is. Costs half a second a GB on a CPU core.

    Args:
        sampled: Only of 64 evenly spaced values of each parameter, and without "sha256:", as earlier versions wrote.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        # PEFT renames what it wraps, and which layers it wraps is no matter of the base.
        plain = name.replace(".base_layer.", ".")
        digest.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        flat = parameter.detach().flatten()
        values = [flat[:: max(1, flat.numel() // 64)][:64] if sampled else flat]
        if not sampled and getattr(parameter, "quant_state", None) is not None:
            values += scales(parameter)
        for tensor in values:
            digest.update(tensor.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest() if sampled else f"sha256:{digest.hexdigest()}"

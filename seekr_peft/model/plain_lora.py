"""Which settings of PEFT's ``LoraConfig`` leave a plain, scaled B A, and what to do about the others.

Every setting is refused at a value other than its default unless it is listed here: those of later PEFT versions are
refused until somebody has looked at them. Verified with PEFT 0.21.2; a test compares the lists with the installed
``LoraConfig``, and each listed setting with the sum of two adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "adapter_model.safetensors"
_LONGEST_NAME = 200
CONFIG_FILE = "adapter_config.json"
SEPARATE = (
    f"move {CONFIG_FILE} and {WEIGHTS_FILE} into a folder of their own; to go on from that adapter, merge it into the "
    f"base (PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)), or pass "
    f"PeftModel.from_pretrained(base, folder) as the model, where it counts as an earlier task's"
)
"""What to do about an adapter that lies in the base model's folder."""

ANY_VALUE = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "use_rslora",
    }
)
"""They choose the layers, the rank and the scale, which the sum reads from the layers themselves, or have no effect
without one of the settings that are refused (those of an initialisation, ``megatron_core``, ``qalora_group_size``,
``runtime_config``)."""

SOME_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
}

OFF = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    }
)
"""Known, and plain only when they are off: None, False or empty."""

_NOT_PLAIN = "whose change cannot be added up over the tasks"
_HEADS = {"SEQ_CLS": "sequence classification", "TOKEN_CLS": "token classification", "QUESTION_ANS": "span extraction"}
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
_PLAIN_ONCE_TRAINED = ("eva", "mica")


def why_refused(key: str, value: Any, default: Any = None) -> str | None:
    """Why an adapter with setting ``key`` at ``value`` is refused and what to do, as the end of a sentence; None if
    it is not. ``default`` is the installed PEFT's."""
    value = getattr(value, "value", value)
    if _is_plain(key, value, default):
        return None
    if key == "init_lora_weights":
        return _about_initialisation(str(value).lower())
    if key == "task_type":
        return _about_task_type(str(value))
    return f"{_NOT_PLAIN}; {_way(key, default)}."


def _is_plain(key: str, value: Any, default: Any) -> bool:
    if key in ANY_VALUE:
        return True
    if key in SOME_VALUES:
        # PEFT takes the names of initialisations in any case.
        lower = value.lower() if key == "init_lora_weights" and isinstance(value, str) else value
        return lower in SOME_VALUES[key]
    if key in OFF:
        return not value
    return bool(value == default and type(value) is type(default))


def _way(key: str, default: Any) -> str:
    if key not in OFF and key not in SOME_VALUES:
        return f"this version of seekr_peft does not know {key}: leave it at its default, {default!r}"
    if key == "modules_to_save":
        return (
            "leave modules_to_save out: whole layers cannot be trained task after task; a linear one, such as "
            "lm_head, can be adapted by naming it in target_modules"
        )
    if key in ("target_parameters", "layer_replication", "trainable_token_indices"):
        return f"leave {key} out and name linear layers in target_modules, such as 'all-linear'"
    if key == "bias":
        return "use bias='none', which adapts the weights alone"
    return "leave it out"


def _about_initialisation(name: str) -> str:
    plain = "use init_lora_weights=True"
    if name.startswith(_CONVERTIBLE):
        return (
            f"which moves part of the base's own weights into the adapter, {_NOT_PLAIN}; {plain}, or turn a trained "
            f"adapter into plain LoRA with PEFT: before its training set "
            f"model.peft_config[NAME].init_lora_weights = True and save_pretrained(INIT), after it "
            f"save_pretrained(OUT, path_initial_model_for_weight_conversion=INIT), and load OUT over the base as it "
            f"was."
        )
    if name in _PLAIN_ONCE_TRAINED:
        return (
            f"which would have to be computed anew for each task's adapter; {plain}, or go on from one that is "
            f'trained: write "init_lora_weights": true into its adapter_config.json and load it again.'
        )
    if name == "loftq":
        return (
            f"which replaces the base's weights by others, {_NOT_PLAIN}, and PEFT cannot turn it into plain LoRA "
            f"afterwards; {plain} over a base that is quantised as it is loaded."
        )
    return f"{_NOT_PLAIN}; {plain}."


def _about_task_type(name: str) -> str:
    text = "write the classes as text and train a causal language model with task_type='CAUSAL_LM'"
    if name in _HEADS:
        return (
            f"whose newly made head PEFT trains as a whole; {_HEADS[name]} with a head of its own is not supported "
            f"yet: {text}."
        )
    return f"which is none of {', '.join(map(str, SOME_VALUES['task_type'][1:]))}; use task_type='CAUSAL_LM'."


def adapter_in_base(folder: Path) -> str | None:
    """Why the model folder ``folder`` cannot be a base and what to do, as a sentence without its name; None where it
    holds no adapter. transformers would load the adapter too, and PEFT's next one take its place."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    if (folder / "config.json").is_file():
        return (
            f"holds an adapter beside the model ({CONFIG_FILE}), whose place the run's own adapter would take; "
            f"{SEPARATE}."
        )
    return f"is an adapter without its model; give the base model it was trained on{_named_base(folder)}."


def _named_base(folder: Path) -> str:
    try:
        name = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f", {name[:_LONGEST_NAME]}" if isinstance(name, str) and name else ""

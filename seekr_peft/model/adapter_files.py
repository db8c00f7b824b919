"""An adapter's files, as PEFT writes and reads them: the same bytes for the same adapter, and nothing missing."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError

from ..errors import AdapterError
from .adapter_checks import SETTINGS
from .lora_layers import sorted_names
from .plain_lora import CONFIG_FILE, WEIGHTS_FILE


def sort_names(path: Path) -> None:
    """PEFT writes sets in the order that a process happens to have, so that equal adapters differed in their bytes."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), list):
            settings[key].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def saved_rank(directory: Path) -> int:
    try:
        return int(LoraConfig.from_pretrained(str(directory)).r)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{directory} cannot be read ({error}); start the run again without --resume.") from error


def load_adapter(model: PeftModel, name: str, directory: Path) -> None:
    """Read an adapter that ``_save`` wrote into adapter ``name`` of the same settings."""
    # load_peft_weights would fall back to torch's own format, which can run code; that one is never read.
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not (directory / file).is_file():
            raise AdapterError(
                f"{directory / file} is missing; the run directory is incomplete, so start it again without --resume."
            )
    advice = "use the base model and LoRA settings it was trained with"
    try:
        saved = LoraConfig.from_pretrained(str(directory))
        weights = load_peft_weights(str(directory), device="cpu")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"{directory} cannot be read ({error}); start the run again without --resume.") from error
    for key in SETTINGS:
        found, wanted = getattr(saved, key), getattr(model.peft_config[name], key)
        if sorted_names(found) != sorted_names(wanted):
            raise AdapterError(f"{directory} was trained with {key}={found!r}, the model has {wanted!r}; {advice}.")
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise AdapterError(f"{directory} does not fit the model ({error}); {advice}.") from error
    if result.unexpected_keys:
        raise AdapterError(f"{directory} does not fit the model: it has {result.unexpected_keys[0]!r}; {advice}.")

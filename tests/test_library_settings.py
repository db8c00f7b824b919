"""What is read from the source files against the classes themselves: it notices when the libraries change."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from seekr_peft.library_settings import (
    accelerator_settings,
    compile_backends,
    lora_settings,
    report_integrations,
    training_choices,
    training_settings,
)


def fields_of(kind: Any) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", ["training", "lora"])
def test_every_field_and_every_plain_default_is_the_librarys(kind: str) -> None:
    if kind == "training":
        from transformers import TrainingArguments

        read, real = training_settings(), fields_of(TrainingArguments)
    else:
        from peft import LoraConfig

        read, real = lora_settings(), fields_of(LoraConfig)
    assert set(read) == set(real)
    plain = {name: field.default for name, field in real.items() if type(field.default) in (int, float, bool, str)}
    found = {name: read[name].default for name in plain if read[name].default is not None}
    assert len(found) > 0.8 * len(plain)
    assert found == {name: plain[name] for name in found}
    numbers = {name for name, default in plain.items() if type(default) in (int, float, bool)}
    assert numbers <= set(found), "numbers and truth values are what the recipe's checks look at"


def enumeration_of(hint: Any) -> type[enum.Enum] | None:
    found = [kind for kind in (hint, *get_args(hint)) for kind in (kind, *get_args(kind)) if isinstance(kind, type)]
    return next((kind for kind in found if issubclass(kind, enum.Enum)), None)


def test_the_choices_are_those_of_the_enumerations() -> None:
    from transformers import TrainingArguments

    kinds = {name: enumeration_of(hint) for name, hint in get_type_hints(TrainingArguments).items()}
    real = {name: [member.value for member in kind] for name, kind in kinds.items() if kind is not None}
    assert {"lr_scheduler_type", "optim", "logging_strategy", "save_strategy", "debug"} <= set(real)
    assert training_choices() == real


def test_the_lists_of_other_modules_are_theirs() -> None:
    from accelerate.utils import DynamoBackend
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_pt_utils import AcceleratorConfig

    assert compile_backends() == [member.value.lower() for member in DynamoBackend]
    assert report_integrations() == list(INTEGRATION_TO_CALLBACK)
    assert set(accelerator_settings()) == set(fields_of(AcceleratorConfig))


def test_a_recipe_is_checked_without_loading_torch(tmp_path: Any) -> None:
    code = (
        "import sys; from seekr_peft.recipe import load_recipe; "
        "load_recipe({'model': {'name_or_path': 'demo'}, 'tasks': {'format': 'demo'}, 'training': {'optim': 'sgd'}}); "
        "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What is read from the source files against the classes themselves: it notices when the libraries change."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from typing import Any

import pytest

from seekr_peft.library_settings import lora_settings, training_choices, training_settings


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


def test_the_choices_are_those_of_the_enumerations() -> None:
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    kinds: dict[str, type[enum.Enum]] = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "logging_strategy": IntervalStrategy,
    }
    assert training_choices() == {name: [member.value for member in kind] for name, kind in kinds.items()}


def test_a_recipe_is_checked_without_loading_torch(tmp_path: Any) -> None:
    code = (
        "import sys; from seekr_peft.recipe import load_recipe; "
        "load_recipe({'model': {'name_or_path': 'demo'}, 'tasks': {'format': 'demo'}, 'training': {'optim': 'sgd'}}); "
        "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

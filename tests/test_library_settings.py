"""What is read from the source files against the classes themselves: it notices when the libraries change."""

from __future__ import annotations

import ast
import dataclasses
import enum
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from seekr_peft.model.plain_lora import OFF, SOME_VALUES
from seekr_peft.recipe import setting_rules as rules
from seekr_peft.recipe.annotations import LISTS
from seekr_peft.recipe.library_fields import (
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


# Their rules --------------------------------------------------------------------------------------------------------


def is_switch(annotation: str) -> bool:
    return annotation in ("bool", "bool | None")


def test_every_setting_of_the_installed_training_arguments_has_a_rule() -> None:
    from transformers import TrainingArguments

    ruled = {
        *rules.SET_BY_THE_RUN,
        *rules.SEVERAL_PROCESSES,
        *rules.FREE,
        *rules.TRAINING_BOUNDS,
        *rules.NARROWER,
        *rules.NESTED,
        *training_choices(),
        *LISTS,
    }
    without = {
        name
        for name in fields_of(TrainingArguments)
        if name not in ruled and not is_switch(training_settings()[name].annotation)
    }
    assert without - {"liger_kernel_config"} == set(), "add their bounds, or what to use instead, to setting_rules.py"
    assert training_settings()["liger_kernel_config"].annotation == "dict[str, bool] | None"


def test_every_setting_of_the_installed_lora_config_has_a_rule() -> None:
    from peft import LoraConfig

    ruled = {
        *rules.WRITTEN_BY_PEFT,
        *rules.WITHOUT_EFFECT,
        *rules.FREE,
        *rules.LORA_BOUNDS,
        *OFF,
        *SOME_VALUES,
        "inference_mode",
    }
    without = {
        name for name in fields_of(LoraConfig) if name not in ruled and not is_switch(lora_settings()[name].annotation)
    }
    assert without == set(), "add their bounds, or what to use instead, to setting_rules.py"


def test_every_number_has_bounds() -> None:
    numbers = ("int", "float", "int | None", "float | None")
    elsewhere = {*rules.SET_BY_THE_RUN, *rules.SEVERAL_PROCESSES}
    for fields, bounds in ((training_settings(), rules.TRAINING_BOUNDS), (lora_settings(), rules.LORA_BOUNDS)):
        without = {name for name, field in fields.items() if field.annotation in numbers} - bounds.keys() - elsewhere
        assert without == set()


def test_no_rule_is_about_a_setting_that_is_gone() -> None:
    known = training_settings().keys() | lora_settings().keys()
    tables: tuple[Any, ...] = (
        rules.SET_BY_THE_RUN, rules.SEVERAL_PROCESSES, rules.WRITTEN_BY_PEFT, rules.WITHOUT_EFFECT, rules.FREE,
        rules.TRAINING_BOUNDS, rules.LORA_BOUNDS, rules.NARROWER, rules.NESTED,
    )  # fmt: skip
    # warmup_ratio is one of transformers 4.
    assert {name.partition(".")[0] for table in tables for name in table} - known == {"warmup_ratio"}


def test_the_choices_that_are_written_down_are_the_librarys() -> None:
    from transformers import TrainingArguments

    levels = fields_of(TrainingArguments)["log_level"].metadata["choices"]
    for name in ("log_level", "log_level_replica"):
        assert sorted(ast.literal_eval(rules.NARROWER[name].removeprefix("Literal"))) == sorted(levels)

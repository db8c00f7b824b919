"""A recipe without a mistake, and what another one is refused with."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from seekr_peft.errors import ConfigError
from seekr_peft.recipe import load_recipe

GOOD: dict[str, Any] = {"model": {"name_or_path": "demo"}, "tasks": {"format": "demo"}}


def recipe(**sections: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), **sections}


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, overrides)
    return caught.value.problems

"""From a file, a mapping or what a run has stored to a checked ``Recipe``, and back to its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from .. import validation
from ..errors import ConfigError
from ..files.paths import given_path, path_problem
from .checks import CHECKS, CHECKS_OF_VALUES, Check, paths_in, run_checks
from .file import plain_mapping, read_mapping
from .schema import AdapterSection, Recipe

if TYPE_CHECKING:
    from ..evaluation.general import GeneralTest

_TOLD = 50
"""Mistakes that are told; the rest is counted."""


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe without loading a model or data.

    Args:
        source: A YAML file, a mapping, or a Recipe. A file with ``extends: OTHER.yaml`` (beside it) takes over all
            that it does not say itself.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: ``problems`` holds every mistake, one sentence each.
    """
    if isinstance(source, Recipe):
        source = source.to_dict()
    elif isinstance(source, (str, Path)):
        source = given_path(source, "recipe", ConfigError)
    problems: list[str] = []
    mapping = plain_mapping(source, overrides, problems)
    _fill_in_homes(mapping)
    return _checked(mapping, CHECKS, problems)


def _fill_in_homes(mapping: dict[str, Any]) -> None:
    for values, key, _ in paths_in(mapping):
        if key != "name_or_path" and not path_problem(values[key]):
            values[key] = str(Path(values[key]).expanduser()) if values[key].startswith("~") else values[key]


def task_order(recipe: Recipe) -> list[str]:
    """The names of the recipe's tasks, in order of training; reads file names only."""
    if recipe.tasks.order:
        return recipe.tasks.order
    from ..tasks import task_names

    return list(task_names(recipe.tasks.format, Path(str(recipe.tasks.path))))


def general_tests(recipe: Recipe) -> list[GeneralTest]:
    """The recipe's tests of general ability; reads file names only."""
    if not recipe.evaluation.general:
        return []
    from ..evaluation.general import find_general_tests

    return find_general_tests(recipe.evaluation.general, recipe.evaluation.general_path, recipe.tasks.path)[0]


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def stored_recipe(path: Path) -> Recipe:
    """The recipe in a file of ``recipe_text``; ConfigError when it is none. The folders it names may be gone by now."""
    try:
        return _checked(read_mapping(path), CHECKS_OF_VALUES, [])
    except ConfigError as error:
        raise ConfigError(f"{path} is no recipe: {error.problems[0]}") from error


def _checked(mapping: dict[str, Any], checks: Sequence[Check], problems: list[str]) -> Recipe:
    recipe = _validated(mapping, problems)
    problems += run_checks(checks, mapping, recipe is not None)
    if problems or recipe is None:
        rest = len(problems) - _TOLD
        # A task's or a folder's name may hold the end of a line.
        problems = [problem.replace("\n", "\\n") for problem in problems]
        raise ConfigError(problems[:_TOLD] + ([f"... and {rest} more mistakes."] if rest > 0 else []))
    return _resolved(recipe)


def _validated(mapping: dict[str, Any], problems: list[str]) -> Recipe | None:
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        problems += validation.problems(error, Recipe)
        return None


def _resolved(recipe: Recipe) -> Recipe:
    """With every default of the method and the adapter written out, so that the stored recipe says all of it."""
    adapter = AdapterSection(mode=recipe.adapter.mode, rank_limit=recipe.adapter.rank_limit, **recipe.adapter.lora())
    return recipe.model_copy(update={"method": recipe.method_with_defaults(), "adapter": adapter})

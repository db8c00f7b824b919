"""That the runs of one order and seed differ in nothing but what their variants say. May import
``plan``, ``run`` and what lies below them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..costs import COSTS_FILE
from ..errors import RunError
from ..run import ENVIRONMENT_FILE, TASKS_FILE
from .plan import Variant

SAME = (
    "base model (its weights' fingerprint)",
    "training and test data (their fingerprints)",
    "optimiser steps of the sequence",
    "replay samples of each task, among variants of one replay ratio",
    "every key of the recipe but those that a variant names",
)
"""What ``check_comparable`` and the recipes of the runs make sure of."""

_SECTIONS = {"base model": ("model.",), "data": ("tasks.",), "optimiser steps": ("training.", "tasks.")}


def check_comparable(directories: Mapping[Variant, Path]) -> None:
    """RunError unless the finished runs of one order and seed had the same base, data, steps and replay budget.

    A variant that itself names another model, other tasks or another training is left out of that check. The recipes
    need no look: a run directory is only taken for a variant if its recipe is that variant's.
    """
    facts = {variant: _facts(directory) for variant, directory in directories.items()}
    for what, sections in _SECTIONS.items():
        fixed = {
            variant: fact[what]
            for variant, fact in facts.items()
            if not any(key.startswith(sections) for key in variant.settings)
        }
        _refuse_difference(what, fixed)
    by_ratio: dict[Any, dict[Variant, Any]] = {}
    for variant, fact in facts.items():
        if fact["replay samples"]:
            by_ratio.setdefault(fact["replay ratio"], {})[variant] = fact["replay samples"]
    for counts in by_ratio.values():
        _refuse_difference("replay samples", counts)


def _facts(directory: Path) -> dict[str, Any]:
    tasks, environment = _read(directory / TASKS_FILE), _read(directory / ENVIRONMENT_FILE)
    memories = [_read(path) for path in sorted(directory.glob("tasks/*/memory.json"))]
    return {
        "base model": environment.get("base"),
        "data": {task["name"]: task.get("fingerprint") for task in tasks},
        "optimiser steps": sum(cost["n_steps"] for cost in _read(directory / COSTS_FILE)["tasks"]),
        "replay samples": {memory["task"]: memory["n_samples"] for memory in memories},
        "replay ratio": _read(directory / "method.json")["config"]["replay_ratio"],
    }


def _refuse_difference(what: str, values: dict[Variant, Any]) -> None:
    for variant, value in values.items():
        other, first = next(iter(values.items()))
        if value != first:
            raise RunError(
                f"{variant.label} had other {what} than {other.label} ({value} and {first}), so they cannot be "
                f"compared; delete the older of the two runs and give the command again."
            )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete the run's folder to run it again.") from error

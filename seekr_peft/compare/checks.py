"""That runs differ in nothing but what their variants say."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files.manifest import StoredFiles
from ..run.directory import ENVIRONMENT_FILE, TASKS_FILE
from ..run.task_costs import read_costs
from .plan import Variant

_SAME = {
    "base model": "base model (its weights' fingerprint)",
    "data": "training and test data of each seed (their fingerprints)",
    "optimiser steps": "optimiser steps of the sequence",
    "replay samples": "replay samples of each task, among variants of one replay ratio",
}
_EXEMPT = {
    "base model": ("model.",),
    "data": ("tasks.",),
    "optimiser steps": ("training.", "tasks."),
    "replay samples": ("tasks.", "method.replay_ratio"),
}
"""Sections of the recipe that make a variant differ in that on purpose."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a comparison."""

    variant: Variant
    order: int
    seed: int
    directory: Path


def what_is_the_same(variants: Sequence[Variant]) -> list[str]:
    """What ``check_comparable`` and the recipes of the runs make sure of, in words."""
    return [
        *(text + _but_for(what, variants) for what, text in _SAME.items()),
        "every key of the recipe but those that a variant names",
    ]


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """RunError unless the runs had the same base, the same data of each seed, and the same steps and replay budget.

    A variant that itself names another model, other tasks or another training is left out of that check. The recipes
    need no look: a run directory is only taken for a variant if its recipe is that variant's.
    """
    facts = {run: _facts(run.directory) for run in runs}
    groups: dict[str, Callable[[FinishedRun], Hashable]] = {
        "base model": lambda run: None,
        "data": lambda run: run.seed,
        "optimiser steps": lambda run: (run.order, run.seed),
        "replay samples": lambda run: (run.order, run.seed),
    }
    for what, group in groups.items():
        first: dict[Hashable, FinishedRun] = {}
        for run, fact in facts.items():
            if _names(what, run.variant) or not fact[what]:
                continue
            other = first.setdefault(group(run), run)
            if fact[what] != facts[other][what]:
                raise RunError(
                    f"{run.directory} and {other.directory} had other {what} ({fact[what]} and {facts[other][what]}), "
                    f"so they cannot be compared; delete the one that is out of date and give the command again."
                )


def _but_for(what: str, variants: Sequence[Variant]) -> str:
    named = [variant.label for variant in variants if _names(what, variant)]
    return f", but for {', '.join(named)}" if named else ""


def _names(what: str, variant: Variant) -> bool:
    return any(key.startswith(_EXEMPT[what]) for key in variant.settings)


def _facts(directory: Path) -> dict[str, Any]:
    headers = sorted(directory.glob("tasks/*/memory.json"))
    StoredFiles(directory).check(directory / TASKS_FILE, directory / ENVIRONMENT_FILE, *headers)
    tasks, environment = _read(directory / TASKS_FILE), _read(directory / ENVIRONMENT_FILE)
    memories = [_read(path) for path in headers]
    return {
        "base model": environment.get("base"),
        "data": {task["name"]: task.get("fingerprint") for task in tasks},
        "optimiser steps": sum(cost.n_steps for cost in read_costs(directory)),
        # None where the method keeps no samples.
        "replay samples": {memory["task"]: memory["n_samples"] for memory in memories},
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete the run's folder to run it again.") from error

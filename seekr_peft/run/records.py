"""What a run writes about itself: where it ran, what its tasks and its base are, what they cost, how far it has come.

A run that goes on reads the same back first, and is refused where its base or its data are others by now.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..files.manifest import StoredFiles, read_manifest
from ..methods import ContinualMethod
from ..model.kind import base_fingerprint
from ..recipe import Recipe
from ..tasks import Task
from .directory import ENVIRONMENT_FILE, METRICS_FILE, STATE_FILE, TASKS_FILE, RunDirectory, recipe_fingerprint
from .stages import Stage
from .task_costs import COSTS_FILE, TaskCost, kept_bytes, read_costs
from .task_data import read_task_facts, task_facts

_PACKAGES = ("seekr-peft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


class RunRecords:
    """The records of one run in ``directory``.

    ``base`` is the fingerprint of the base model, ``fingerprints`` those of the tasks' data by name, ``costs`` those of
    the trained stages, in order.
    """

    def __init__(self, recipe: Recipe, directory: RunDirectory) -> None:
        self.recipe = recipe
        self.directory = directory
        self._started = time.monotonic()
        environment = directory.read_object(ENVIRONMENT_FILE)
        self._seconds_before: float | None = environment.get("seconds")
        self.base: str | None = environment.get("base")
        self.fingerprints: dict[str, str] = {}
        self.costs: list[TaskCost] = []

    # Where, and what of -----------------------------------------------------------------------------------------

    def write_environment(self, seconds: float | None = None) -> None:
        """Versions and machine; ``seconds`` are those of all sessions up to the last finished task, by default those
        of the sessions before this one."""
        seconds = self._seconds_before if seconds is None else seconds
        rounded = None if seconds is None else round(seconds, 1)
        self.directory.ledger.write_json(ENVIRONMENT_FILE, {**_environment(), "base": self.base, "seconds": rounded})

    def check_base_and_data(self, model: Any, base: str, trained: int) -> None:
        """RunError when a resumed run would go on with another base or other samples than it began with."""
        before = self._fingerprints_before() if trained else {}
        changed = [
            f"the data of task {name}" for name, found in self.fingerprints.items() if before.get(name, found) != found
        ]
        # Earlier versions looked at a part of the base.
        if trained and self.base is not None and self.base not in (base, base_fingerprint(model, sampled=True)):
            changed.insert(0, f"the base model {self.recipe.model.name_or_path}")
        if changed:
            raise RunError(
                f"{self.directory.path} cannot go on: {' and '.join(changed)} changed since it began; bring the old "
                f"state back, or start again in another output_dir."
            )
        self.base = base

    def _fingerprints_before(self) -> dict[str, str]:
        """Those of the tasks' data when the run began: of all, or, where that file was lost, of the trained ones."""
        path = self.directory.path / TASKS_FILE
        if path.is_file():
            return {fact["name"]: fact["fingerprint"] for fact in read_task_facts(path)}
        folders = [folder for folder, _ in StoredFiles(self.directory.path).task_folders()]
        found: dict[str, str] = {}
        for folder in folders:
            found |= read_manifest(folder)["made_from"].get("data", {})
        return found

    def made_from(self, names: list[str]) -> dict[str, Any]:
        """What a training of the tasks ``names`` is made from beside the base and the earlier ones."""
        data = {name: self.fingerprints[name] for name in names}
        return {"recipe": recipe_fingerprint(self.recipe), "data": data}

    def write_task_facts(self, tasks: list[Task]) -> None:
        """``tasks.json``."""
        facts = [task_facts(task, self.fingerprints[task.name]) for task in tasks]
        self.directory.ledger.write_json(TASKS_FILE, facts)

    # What it cost -----------------------------------------------------------------------------------------------

    def read_costs(self, stages: Sequence[Stage], method: ContinualMethod) -> None:
        """Those of the trained stages; of one that a kill left unwritten the seconds and the peak are lost."""
        written = (self.directory.path / COSTS_FILE).is_file()
        advice = "delete that file, which loses the seconds and peaks of the finished tasks and nothing else"
        self.costs = read_costs(self.directory.path, advice)[: len(stages)] if written else []
        for index in range(len(self.costs), len(stages)):
            name = stages[index].name
            steps = _last_steps(self.directory.path / METRICS_FILE).get(index, 0)
            self.costs.append(TaskCost(name, steps, kept_bytes=kept_bytes(method.task_directory(index, name))))

    def write_costs(self) -> None:
        """``costs.json``."""
        self.directory.ledger.write_json(COSTS_FILE, {"tasks": [cost.to_json() for cost in self.costs]})

    # How far it has come ----------------------------------------------------------------------------------------

    def write_progress(self, names: list[str], finished: int) -> None:
        """That the first ``finished`` of the tasks ``names`` are evaluated: what that cost, then the state."""
        self.write_costs()
        self.write_environment((self._seconds_before or 0) + time.monotonic() - self._started)
        self.write_state(names, finished)

    def write_state(self, names: list[str], finished: int) -> None:
        """``state.json``; once all tasks count as finished it promises the final adapter, too."""
        self.directory.ledger.write_json(
            STATE_FILE,
            {
                "finished_tasks": finished,
                "tasks": names,
                "last_finished": names[finished - 1],
                "status": "finished" if finished == len(names) else "running",
            },
        )


def _last_steps(path: Path) -> dict[int, int]:
    """Optimiser steps of each stage by its index, from metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record["task_index"]: record["step"] for record in map(json.loads, lines)}


def _environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "system": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }
    return {"versions": versions, "machine": machine, "command": " ".join(sys.argv)}

"""The tasks that a recipe names: read, checked before a model is loaded, and what ``tasks.json`` says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError, RunError
from ..recipe import Recipe
from ..tasks import Task, read_tasks


def load_tasks(recipe: Recipe) -> list[Task]:
    """The recipe's tasks in order of training."""
    section = recipe.tasks
    tasks = read_tasks(section.format, section.path, section.order, section.max_train, section.max_test, recipe.seed)
    return [task.as_chat() for task in tasks] if section.chat_template else tasks


def check_epochs(epochs: list[float] | None, tasks: list[Task]) -> None:
    """ConfigError unless there is a number of epochs for each task, or for none."""
    if epochs is not None and len(epochs) != len(tasks):
        raise ConfigError(f"tasks.epochs has {len(epochs)} numbers for {len(tasks)} tasks; give one for each.")


def check_length(task: Task, arguments: TrainingArguments) -> None:
    """ConfigError for a training set that does not make one batch."""
    size = arguments.train_batch_size
    if arguments.dataloader_drop_last and len(task.train) < size:
        raise ConfigError(
            f"training.dataloader_drop_last leaves out every sample of task {task.name}: its {len(task.train)} samples "
            f"do not fill a batch of {size}; leave it out, or take a smaller per_device_train_batch_size."
        )


def constant_answer_score(task: Task) -> float:
    """What always giving the most frequent test answer would score under the task's own metric: the majority class."""
    answers = list(task.test_set()["answer"])
    most_frequent = Counter(answers).most_common(1)[0][0]
    return task.score([most_frequent] * len(answers))[0]


def task_facts(task: Task, fingerprint: str) -> dict[str, Any]:
    """What ``tasks.json`` holds of one task."""
    return {
        "name": task.name,
        "metric": task.metric_name,
        "n_train": len(task.train),
        "n_test": len(task.test_set()),
        "majority_class": constant_answer_score(task),
        "fingerprint": fingerprint,
    }


def read_task_facts(path: Path) -> list[dict[str, Any]]:
    """What ``tasks.json`` holds of all tasks; RunError where it is broken."""
    advice = "start the run again in another output_dir"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not all({"name", "fingerprint", "majority_class"} <= set(fact) for fact in facts):
            raise ValueError("a task lacks its name, fingerprint or majority_class")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is broken ({error}); {advice}.") from error
    return list(facts)

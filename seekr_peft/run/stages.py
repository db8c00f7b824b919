"""What is trained in a run, one training after another: a task each, or all tasks at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments

from ..tasks import Task
from ..tasks.inputs import CARRIED, check_sample

ALL_TASKS = "all_tasks"
"""Name of the only stage of a joint method."""


@dataclass(frozen=True)
class Stage:
    """One training of a run: the tasks ``trained`` in it, and those ``seen`` by its end, which are evaluated then."""

    name: str
    trained: list[Task]
    seen: list[Task]


def plan_stages(tasks: list[Task], joint: bool) -> list[Stage]:
    """One task after another; or, for a method that is ``joint``, all of them at once."""
    if joint:
        return [Stage(ALL_TASKS, tasks, tasks)]
    return [Stage(task.name, [task], tasks[: index + 1]) for index, task in enumerate(tasks)]


def joined(datasets: Sequence[Dataset], arguments: Sequence[TrainingArguments]) -> tuple[Dataset, TrainingArguments]:
    """One training set and its arguments that give each of several tasks the share of steps it has in the sequence.

    The steps are those of all tasks together. A task's share of the samples is its size times its epochs, or the same
    for all where ``max_steps`` is given: whole copies of its set, plus a seeded part of it.
    """
    steps = [count_steps(len(dataset), own) for dataset, own in zip(datasets, arguments, strict=True)]
    if arguments[0].max_steps > 0:
        wanted = [max(map(len, datasets))] * len(datasets)
    else:
        fewest = min(own.num_train_epochs for own in arguments)
        wanted = [
            round(len(dataset) * own.num_train_epochs / fewest)
            for dataset, own in zip(datasets, arguments, strict=True)
        ]
    for dataset in datasets:
        check_sample(dataset[0], "sample 0 of a task")
    parts = [
        dataset.select_columns(list(CARRIED)).select(_rows(len(dataset), count, place))
        for place, (dataset, count) in enumerate(zip(datasets, wanted, strict=True))
    ]
    return concatenate_datasets(parts), replace(arguments[0], max_steps=sum(steps))


def count_steps(n_samples: int, arguments: TrainingArguments) -> int:
    """Optimiser steps that a Trainer takes for ``n_samples`` (the rule of transformers' own ``Trainer``)."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    size = arguments.train_batch_size
    batches = n_samples // size if arguments.dataloader_drop_last else math.ceil(n_samples / size)
    updates = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * updates)


def _rows(size: int, count: int, seed: int) -> list[int]:
    copies, rest = divmod(count, size)
    drawn: Any = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:rest].tolist()
    return [*list(range(size)) * copies, *sorted(drawn)]

"""The recipe's ``training`` section as the ``TrainingArguments`` of each training of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError, cut
from ..recipe import Recipe
from ..tasks import Task
from .stages import joined

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_CHECKPOINTING_OPTIONS = {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}


class TrainingSettings:
    """The settings of the trainings of ``recipe``, which write below ``folder``."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder

    def seed(self, index: int) -> int:
        """Each task has its own, so a resumed run draws the same numbers as one that was never stopped."""
        return self._recipe.seed + index

    def of_task(self, index: int) -> TrainingArguments:
        """Those of the ``index``-th task (from 0); ConfigError where transformers takes a setting for wrong."""
        settings = self._given(index)
        try:
            return TrainingArguments(
                output_dir=str(self._folder),
                seed=self.seed(index),
                use_cpu=not torch.cuda.is_available(),
                **settings,
            )
        except Exception as error:
            # Settings that exclude each other, values out of range, packages that are not installed.
            raise ConfigError(f"training: {in_one_line(error)}") from error

    def of_stage(self, tasks: list[Task], index: int) -> tuple[Any, TrainingArguments]:
        """The samples of the ``index``-th training, of the tokenised ``tasks``, and its arguments."""
        if len(tasks) == 1:
            return tasks[0].train, self.of_task(index)
        return joined([task.train for task in tasks], [self.of_task(place) for place in range(len(tasks))])

    def precision(self) -> Any:
        """The mixed precision of the training, in which a model is also measured, before the first training too."""
        arguments = self.of_task(0)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        return torch.autocast(kind, half, enabled=arguments.bf16 or (arguments.fp16 and kind == "cuda"))

    def _given(self, index: int) -> dict[str, Any]:
        """What the recipe says, over what a run needs where it says nothing."""
        settings: dict[str, Any] = {
            "save_strategy": "no",
            "save_total_limit": 2,
            "logging_steps": 10,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            **self._recipe.training,
        }
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        for old, new in _RENAMED.items():
            # transformers warns about the old name where it has the new one.
            if new in known and old in settings:
                value = settings.pop(old)
                settings.setdefault(new, value)
        for name in _CHECKPOINTING_OPTIONS & settings.keys():
            settings[name] = _checkpointing_options(name, settings[name])
        if self._recipe.tasks.epochs is not None:
            settings["num_train_epochs"] = self._recipe.tasks.epochs[index]
        return settings


def in_one_line(error: Exception) -> str:
    """A library's own words, without line breaks and not too long."""
    return cut(" ".join(str(error).split()) or type(error).__name__, 500)


def _checkpointing_options(name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """``given``, without reentrant checkpointing where it says nothing of it."""
    if given and given.get("offload") and not torch.cuda.is_available():
        raise ConfigError(f"training.{name}: offload needs a GPU, whose memory it makes room in; leave it out.")
    return {"use_reentrant": False, **(given or {})}

"""What a person sees while a run goes on: a bar per task with the loss terms apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..errors import printable
from ..loss_names import logged_terms, short_label

_LOGGED = ("learning_rate", "grad_norm", "epoch")
"""What is kept of a Trainer's log beside the terms of the loss."""


class RunProgress:
    """Progress bars on ``console``; a plain file or pipe gets one line per task instead."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def start(self, description: str, total: int | None) -> TaskID:
        """Open a bar."""
        return self._bars.add_task(printable(description), total=total, terms="")

    def update(self, bar: TaskID, completed: int, terms: str | None = None) -> None:
        """Move a bar; ``terms`` replaces the text behind it."""
        if terms is None:
            self._bars.update(bar, completed=completed)
        else:
            self._bars.update(bar, completed=completed, terms=terms)

    def finish(self, bar: TaskID) -> None:
        """Close a bar."""
        self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class StepReporter(TrainerCallback):
    """Reports the steps of one task's training to a ``RunProgress`` and to ``metrics.jsonl``.

    ``n_steps`` and ``last`` (the latest logged values) are kept for the caller.
    """

    def __init__(self, progress: RunProgress, metrics: Path, task: str, task_index: int, label: str) -> None:
        self._progress = progress
        self._metrics = metrics
        self._task = task
        self._task_index = task_index
        self._label = label
        self._bar: TaskID | None = None
        self.n_steps = 0
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = self._progress.start(self._label, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.n_steps = state.global_step
        if state.global_step >= state.max_steps:
            # The last steps are logged too when the task's length is no multiple of logging_steps.
            control.should_log = True
        if self._bar is not None:
            self._progress.update(self._bar, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        values = {name: float(logs[name]) for name in (*logged_terms(logs), *_LOGGED) if name in logs}
        # A log without a replay step in it keeps the terms of the one before.
        self.last = {**self.last, **values}
        record = {"task": self._task, "task_index": self._task_index, "step": state.global_step, **values}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._bar is not None:
            self._progress.update(self._bar, state.global_step, describe_terms(self.last))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._progress.finish(self._bar)


def describe_terms(values: dict[str, float]) -> str:
    """The loss terms that are there, apart: ``new 0.123  replay 0.045 ...``."""
    return "  ".join(f"{short_label(name)} {values[name]:.3f}" for name in logged_terms(values))

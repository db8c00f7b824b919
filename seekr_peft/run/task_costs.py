"""What a task costs: seconds, the memory of a step, the bytes kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import RunError
from ..model.peak_memory import PeakMemory

COSTS_FILE = "costs.json"


@dataclass
class TaskCost:
    """The cost of one task under one method.

    ``step_seconds``: mean over its optimiser steps, replay included. ``train_seconds``: the Trainer's own time, with
    its start-up. ``other_seconds``: all else that belongs to training the task (drawing and scoring replay samples,
    storing, adding up the adapters). ``evaluate_seconds``: the answers after it. ``step_peak_bytes``: peak allocation
    of one optimiser step, with a replay batch where there are any, above what lives between steps (``PeakMemory``);
    0 where a task has one step only. ``kept_bytes``: what the task left on disk for the method, but for its adapter.
    """

    name: str
    n_steps: int = 0
    step_seconds: float = 0.0
    train_seconds: float = 0.0
    other_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    step_peak_bytes: int = 0
    kept_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, seconds to the millisecond."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def read_costs(run_directory: Path, advice: str = "delete the run's folder to run it again") -> list[TaskCost]:
    """The costs of a run's tasks; RunError, which ends with ``advice``, when the file is missing, damaged or of another
    version."""
    path = run_directory / COSTS_FILE
    names = {field.name for field in fields(TaskCost)}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        if not records or any(set(record) != names for record in records):
            raise ValueError(f"it must list tasks, each with {', '.join(sorted(names))}")
        if any(type(value) not in (int, float) for record in records for key, value in record.items() if key != "name"):
            raise ValueError("all but a task's name must be numbers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}); {advice}.") from error
    return [TaskCost(**record) for record in records]


class StepMeter(TrainerCallback):
    """Times the optimiser steps, and measures the peak memory of one of them, whose time does not count: the first one
    after step 0 for which ``replay_due``, else step 1."""

    def __init__(self, replay_due: Callable[[int], bool], device: str) -> None:
        self._replay_due = replay_due
        self._device = device
        self._step: int | None = None
        self._open: PeakMemory | None = None
        self.peak = 0
        self._started = self._total = 0.0
        self._n_timed = 0

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step; 0 when none was timed."""
        return self._total / self._n_timed if self._n_timed else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is None:
            # Step 0 also makes the optimiser's state.
            self._step = next((step for step in range(1, state.max_steps) if self._replay_due(step)), 1)
        if state.global_step == self._step:
            self._open = PeakMemory(self._device)
            self._open.__enter__()
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._open is None:
            if self._device == "cuda":
                torch.cuda.synchronize()
            self._total += time.monotonic() - self._started
            self._n_timed += 1
        self.close()

    def close(self) -> None:
        """Stop measuring, also after a step that failed."""
        if self._open is not None:
            meter, self._open = self._open, None
            meter.__exit__(None, None, None)
            self.peak = meter.peak


@contextmanager
def seconds_into(cost: TaskCost, field: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to a field of ``cost``."""
    start = time.monotonic()
    try:
        yield
    finally:
        setattr(cost, field, getattr(cost, field) + time.monotonic() - start)


def kept_bytes(task_directory: Path) -> int:
    """Bytes that a finished task's directory keeps for later tasks to be trained with: all but its adapter, and what is
    written about it."""
    beside = {task_directory / name for name in ("adapter", "manifest.json", "importance.safetensors")}
    files = (path for path in task_directory.rglob("*") if path.is_file() and not beside & {path, *path.parents})
    return sum(path.stat().st_size for path in files)

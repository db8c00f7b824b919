"""One training of a run: from its tasks to a finished task of the method, with its steps, its costs and its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from ..errors import ConfigError, SeekrError
from ..files.atomic import remove_folder
from ..methods import ContinualMethod
from ..tasks import Task
from ..training.checkpoint import latest_checkpoint
from ..training.stopping import StopRequest
from ..training.trainer import ContinualTrainer
from .directory import CHECKPOINTS, METRICS_FILE, RunDirectory
from .progress import RunProgress, StepReporter, describe_terms
from .records import RunRecords
from .stages import Stage
from .task_costs import StepMeter, TaskCost, kept_bytes, seconds_into
from .training_settings import TrainingSettings, in_one_line


class StageTraining:
    """Trains one stage of a run after another with ``method``."""

    def __init__(
        self,
        method: ContinualMethod,
        settings: TrainingSettings,
        directory: RunDirectory,
        records: RunRecords,
        progress: RunProgress,
        stop: StopRequest,
    ) -> None:
        self._method = method
        self._settings = settings
        self._directory = directory
        self._records = records
        self._progress = progress
        self._stop = stop
        self._checkpoint: Path | None = None
        """Where the next training goes on."""

    def go_on(self, stages: Sequence[Stage], trained: int) -> None:
        """Find where the next training, after ``trained`` of them, was stopped; what its metrics say beyond that is
        dropped, and the costs before it are read."""
        if trained < len(stages):
            self._checkpoint = self._latest_checkpoint(stages[trained])
        self._directory.cut_metrics(trained, 0 if self._checkpoint is None else _step_of(self._checkpoint))
        self._records.read_costs(stages[:trained], self._method)

    def _latest_checkpoint(self, stage: Stage) -> Path | None:
        folder = self._directory.checkpoints(len(self._method.task_names), stage.name)
        made_from = self._records.made_from([task.name for task in stage.trained])
        found = latest_checkpoint(folder, {**self._method.task_made_from(), **made_from, "task": stage.name})
        if found is not None:
            self._progress.say(f"going on with task {stage.name} after step {_step_of(found)}")
        return found

    def train(self, name: str, tasks: list[Task], index: int, label: str) -> None:
        """Train the tokenised ``tasks`` as the ``index``-th task ``name`` of the method (from 0); ``label`` is what a
        person reads of it."""
        set_seed(self._settings.seed(index))
        reporter = StepReporter(self._progress, self._directory.path / METRICS_FILE, name, index, label)
        cost = self._train(name, tasks, index, reporter)
        cost.kept_bytes = kept_bytes(self._method.task_directory(index, name))
        self._records.costs.append(cost)
        self._directory.ledger.note_growing(METRICS_FILE)
        self._records.write_costs()
        remove_folder(self._directory.path / CHECKPOINTS)
        n_cut = sum(task.cut or 0 for task in tasks)
        cut = f", {n_cut} prompts shortened" if n_cut else ""
        terms = describe_terms(reporter.last)
        self._progress.say(f"trained {label}: {reporter.n_steps} steps, {terms}{cut}{_teacher_text(self._method)}")

    def _train(self, name: str, tasks: list[Task], index: int, reporter: StepReporter) -> TaskCost:
        """The method's task with a trainer in it; returns what it cost."""
        method, cost = self._method, TaskCost(name)
        meter = StepMeter(method.replay_due, "cuda" if torch.cuda.is_available() else "cpu")
        dataset, arguments = self._settings.of_stage(tasks, index)
        arguments.output_dir = str(self._directory.checkpoints(index, name))
        method.made_from = self._records.made_from([task.name for task in tasks])
        with seconds_into(cost, "other_seconds"), method.task(name, replay_from=dataset):
            trainer = _trainer(method, arguments, dataset, [reporter, meter, _StopCallback(self._stop)])
            checkpoint, self._checkpoint = self._checkpoint, None
            try:
                with seconds_into(cost, "train_seconds"):
                    self._run(trainer, checkpoint)
            finally:
                meter.close()
        cost.other_seconds -= cost.train_seconds
        cost.n_steps, cost.step_seconds, cost.step_peak_bytes = reporter.n_steps, meter.step_seconds, meter.peak
        return cost

    def _run(self, trainer: Any, checkpoint: Path | None) -> None:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            self._stop.check()
        except Exception as error:
            # A signal to the whole group of processes ends the workers that load samples, too.
            self._stop.check()
            if not _is_of_a_setting(error):
                raise
            raise ConfigError(f"training: {in_one_line(error)}") from error


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _StopCallback(TrainerCallback):
    """Ends a training at its next step, with a checkpoint, once a signal has come."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.number is not None:
            control.should_save = control.should_training_stop = True


def _trainer(
    method: ContinualMethod, arguments: TrainingArguments, dataset: Any, callbacks: Sequence[TrainerCallback]
) -> Any:
    """A trainer with its optimizer, since some settings are only checked when that is made."""
    try:
        trainer: Any = ContinualTrainer(
            model=method.model, method=method, args=arguments, train_dataset=dataset, callbacks=list(callbacks)
        )
        trainer.create_optimizer()
    except (SeekrError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"training: {in_one_line(error)}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _is_of_a_setting(error: Exception) -> bool:
    """Whether a training failed for a setting that needs a package, or a compiler, that only a training asks for."""
    return isinstance(error, ImportError) or type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _teacher_text(method: ContinualMethod) -> str:
    memory = getattr(method, "memory", None)
    if memory is None or not memory.tasks:
        return ""
    task = memory.tasks[-1]
    text = f"; kept {len(task)} samples, {task.bytes / 1000:.1f} kB"
    if task.quality is not None:
        text += f"; teacher {task.quality.loss:.2f} nats a token, entropy {task.quality.answer_entropy:.2f}"
    return text

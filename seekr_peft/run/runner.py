"""A task sequence as one resumable run directory: ``run_recipe``.

A task is *trained* once ``method.json`` lists it (adapter and memory are on disk by then) and *finished* once
``state.json`` counts it (evaluated as well). Both files are replaced atomically, so a kill at any moment loses at most
what was done since the last checkpoint inside the task in progress (``training.save_strategy``), or that task.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.logging import RichHandler
from transformers import set_seed

from ..errors import RunError
from ..evaluation import FORMULAS, AccuracyMatrix
from ..evaluation.generation import prompt_room, warn_of_unreachable
from ..files.manifest import Ledger
from ..methods import ContinualMethod, get_method
from ..model.devices import check_one_device
from ..model.facts import ModelFacts
from ..recipe import Recipe, load_recipe
from ..recipe.base_model import load_model
from ..report import read_run, write_report
from ..tasks import Task
from ..terminal import TerminalConsole
from ..training.stopping import RunStopped, StopRequest, listening
from .directory import CHECKPOINTS, RECIPE_FILE, STATE_FILE, TASKS_FILE, RunDirectory, telling_what_failed
from .measuring import LoadedModel, Measuring
from .progress import RunProgress
from .records import RunRecords
from .stage_training import StageTraining
from .stages import Stage, plan_stages
from .task_costs import seconds_into
from .task_data import check_epochs, check_length, load_tasks, read_task_facts
from .training_settings import TrainingSettings

logger = logging.getLogger("seekr_peft")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind: its ``directory``, the ``matrix`` of scores, and the path of the ``report`` page, if
    one was asked for."""

    directory: Path
    matrix: AccuracyMatrix
    report: Path | None


def run_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    resume: bool | Literal["auto"] = False,
    console: Console | None = None,
    report: bool = True,
) -> RunResult:
    """Train the recipe's tasks one after another, evaluate after each, and write the run directory.

    Args:
        source: A recipe file, mapping or ``Recipe``.
        overrides: ``section.key=value`` strings.
        resume: Go on from the last checkpoint or finished task of the run directory; "auto": if there is one.
        console: Where to report; a console on stderr by default.
        report: Whether to write the page; ``seekr-peft report`` can do so later.

    Raises:
        ConfigError: The recipe has mistakes (all are listed); nothing was loaded. Or several processes were started, or
            several GPUs are visible.
        DivergenceError: A task's loss or gradient became no finite number; the tasks before it are kept.
        RunError: The run directory is in use, not empty, of another recipe, or there is nothing to resume; or the disk
            is full; or a file of it is not what was written.
        RunStopped: SIGINT or SIGTERM came; a training has ended at its next step with a checkpoint.
    """
    check_one_device()
    with listening() as stop:
        recipe = load_recipe(source, overrides)
        if resume:
            recipe = _in_its_own_folder(recipe, source, overrides)
        directory = RunDirectory(Path(recipe.output_dir))
        if resume != "auto":
            directory.check(recipe, resume)
        directory.make()
        with (
            _saying_how_to_go_on(directory.path),
            telling_what_failed(directory.path),
            directory.locked(),
            RunProgress(console or TerminalConsole(stderr=True)) as progress,
            _logging_to(progress.console),
        ):
            if resume == "auto":
                resume = directory.has_begun(recipe)
            directory.check(recipe, resume)
            directory.open(recipe, resume)
            matrix = _Run(recipe, directory, progress, stop).execute()
            directory.ledger.settle()
            page = write_report(directory.path) if report else None
            _summarise(directory.path, matrix, page, progress)
    return RunResult(directory.path, matrix, page)


class _Run:
    """The state of one call of ``run_recipe``."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, progress: RunProgress, stop: StopRequest) -> None:
        self.recipe = recipe
        self.directory = directory
        self.progress = progress
        self.stop = stop
        self.records = RunRecords(recipe, directory)
        self.settings = TrainingSettings(recipe, directory.path / CHECKPOINTS)

    def execute(self) -> AccuracyMatrix:
        """Train what is not trained yet and evaluate what is not evaluated yet; returns the scores."""
        if self.directory.is_finished():
            self.progress.say(f"all tasks of {self.directory.path} are finished")
            return AccuracyMatrix.load(self.directory.path)
        self.records.write_environment()
        tasks = self._read_tasks()
        names = [task.name for task in tasks]
        loaded = self._load(tasks)
        method, trained = self._method(loaded.model, tasks)
        # Before hours of training, not after the first task.
        prompt_room(loaded.model, self.recipe.tasks.max_length, self.recipe.evaluation.max_new_tokens)
        stages = plan_stages(tasks, method.joint)
        training = StageTraining(method, self.settings, self.directory, self.records, self.progress, self.stop)
        measuring = Measuring(self.recipe, loaded, self.settings.precision, self.directory, self.progress)
        finished = self._restore(method, stages, trained)
        training.go_on(stages, trained)
        matrix = AccuracyMatrix.load(self.directory.path) if finished else AccuracyMatrix(names)
        self.records.write_task_facts(tasks)
        if not trained:
            measuring.general_ability(after="")
        for index, stage in enumerate(stages):
            if index >= trained:
                self._train(training, loaded, stage, index, f"{index + 1}/{len(stages)} {stage.name}")
            if len(stage.seen) > finished:
                self._measure(measuring, stage, index, matrix)
                if index + 1 == len(stages):
                    # Before the state says "finished", which promises the adapter.
                    method.export("adapter")
                self.records.write_progress(names, len(stage.seen))
        if not self.directory.is_finished():
            # Everything was trained and evaluated, but the adapter was lost.
            method.export("adapter")
            self.records.write_state(names, len(names))
        return matrix

    def _read_tasks(self) -> list[Task]:
        """The tasks, and what can be wrong with a training of them before a model is loaded."""
        tasks = load_tasks(self.recipe)
        check_epochs(self.recipe.tasks.epochs, tasks)
        for place, task in enumerate(tasks):
            check_length(task, self.settings.of_task(place))
        if self.recipe.training.get("fp16") and not torch.cuda.is_available():
            logger.warning(
                "training.fp16 has no effect without a GPU: the model trains in float32; bf16 would have one."
            )
        return tasks

    def _load(self, tasks: list[Task]) -> LoadedModel:
        """The model, which must be able to read all the tasks before the first is trained."""
        set_seed(self.recipe.seed)
        model, tokenizer = load_model(self.recipe)
        for task in tasks:
            task.check_texts(tokenizer)
            warn_of_unreachable(task, tokenizer, self.recipe.evaluation.max_new_tokens)
        longest = self.recipe.tasks.max_length
        positions = ModelFacts.of(model).positions
        return LoadedModel(model, tokenizer, min(longest, positions or longest))

    def _method(self, model: Any, tasks: list[Task]) -> tuple[ContinualMethod, int]:
        """The method, with none of its tasks restored yet, and how many trainings are complete on disk."""
        self.records.fingerprints = {task.name: task.fingerprint() for task in tasks}
        trained = self.directory.n_trainings()
        method = get_method(self.recipe.method_name)(
            model,
            self.recipe.method_config(),
            directory=self.directory.path,
            adapter_mode=self.recipe.adapter.mode,
            rank_limit=self.recipe.adapter.rank_limit,
        )
        self.records.check_base_and_data(model, method.base_fingerprint(), trained)
        self.records.write_environment()
        return method, trained

    def _restore(self, method: ContinualMethod, stages: list[Stage], trained: int) -> int:
        """Bring the method to where it was after ``trained`` trainings; returns how many tasks were evaluated."""
        finished = self.directory.n_evaluated_tasks()
        evaluated = sum(len(stage.seen) <= finished for stage in stages)
        if trained > evaluated + 1:
            raise RunError(
                f"{self.directory.path} has {trained} trained tasks of which {evaluated} are evaluated, so "
                f"{STATE_FILE} is missing or old; restore it, or start again in another output_dir."
            )
        if trained:
            method.restore([stage.name for stage in stages[:trained]])
            self.progress.say(f"resuming after task {stages[trained - 1].name} ({trained} of {len(stages)} trained)")
        self.directory.drop_checkpoints(trained)
        return finished

    def _train(self, training: StageTraining, loaded: LoadedModel, stage: Stage, index: int, label: str) -> None:
        tokenized = [task.tokenized(loaded.tokenizer, loaded.max_length) for task in stage.trained]
        with self.stop.at_the_next_step():
            training.train(stage.name, tokenized, index, label)

    def _measure(self, measuring: Measuring, stage: Stage, index: int, matrix: AccuracyMatrix) -> None:
        with seconds_into(self.records.costs[index], "evaluate_seconds"):
            measuring.evaluate(stage.seen, matrix)
            measuring.general_ability(after=stage.seen[-1].name)


def _summarise(directory: Path, matrix: AccuracyMatrix, report: Path | None, progress: RunProgress) -> None:
    progress.console.print(matrix.to_rich_table())
    facts = read_task_facts(directory / TASKS_FILE)
    constant = "  ".join(f"{fact['name']} {100 * fact['majority_class']:.1f}" for fact in facts)
    progress.say(f"always the most frequent answer: {constant}")
    progress.say(f"OP {100 * matrix.op():.2f}   {FORMULAS['op']}")
    bwt = matrix.to_dict()["bwt"]
    if bwt is not None:
        progress.say(f"BWT {100 * bwt:+.2f}   {FORMULAS['bwt']}")
    for curve in read_run(directory).general:
        progress.say(f"general ability: {curve.words()}")
    page = f"   report: {report}" if report else ""
    progress.say(f"adapter: {directory / 'adapter'}{page}")


def _in_its_own_folder(recipe: Recipe, source: Any, overrides: Sequence[str]) -> Recipe:
    """``recipe`` of the run that the file ``source`` lies in, which may have been moved since it was written."""
    if not isinstance(source, str | Path) or Path(source).name != RECIPE_FILE:
        return recipe
    folder = Path(source).parent
    said = any(override.partition("=")[0].strip() == "output_dir" for override in overrides)
    return recipe if said or not Ledger(folder).is_own() else recipe.model_copy(update={"output_dir": str(folder)})


@contextmanager
def _saying_how_to_go_on(directory: Path) -> Iterator[None]:
    try:
        yield
    except RunStopped as stop:
        path = directory / RECIPE_FILE
        if path.is_file():
            stop.go_on_with(f"go on with: seekr-peft run {shlex.quote(str(path))} --resume")
        raise


@contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    """Show the package's warnings on the console (above the bar) for as long as the run lasts."""
    handler = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate

"""A task sequence as one resumable run directory: ``run_recipe``. May import everything but ``cli`` and ``demo.run``.

A task is *trained* once ``method.json`` lists it (adapter and memory are on disk by then) and *finished* once
``state.json`` counts it (evaluated as well). Both files are replaced atomically, so a kill at any moment loses at most
the task in progress.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.logging import RichHandler
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed

from .costs import COSTS_FILE, StepMeter, TaskCost, kept_bytes, read_costs, seconds_into
from .devices import check_one_device
from .errors import ConfigError, RunError, RunInUseError, SeekrError, cut, shown
from .evaluation import FORMULAS, AccuracyMatrix, evaluate_task, score_predictions
from .evaluation.generation import prompt_room, warn_of_unreachable
from .methods import ContinualMethod, get_method
from .methods.base import STATE_FILE as METHOD_STATE_FILE
from .methods.base import read_method_state, write_json
from .modeling import base_fingerprint, load_model
from .progress import RunProgress, StepReporter, describe_terms
from .recipe import DEMO, Recipe, general_tests, load_recipe, save_recipe, stored_recipe
from .report import read_run, write_report
from .stages import Stage, joined, plan_stages
from .tasks import Task, read_tasks
from .trainer import ContinualTrainer

logger = logging.getLogger("seekr_peft")

TASKS_FILE = "tasks.json"
GENERAL_FILE = "general.json"
RECIPE_FILE, STATE_FILE, METRICS_FILE, ENVIRONMENT_FILE = (
    "recipe.yaml",
    "state.json",
    "metrics.jsonl",
    "environment.json",
)
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_CHECKPOINTING_OPTIONS = {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}
_PACKAGES = ("seekr-peft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


_PARTIAL_RECIPE = f".{RECIPE_FILE}.partial"
_BEFORE_TRAINING = {_PARTIAL_RECIPE, RECIPE_FILE, ENVIRONMENT_FILE, TASKS_FILE, METRICS_FILE, GENERAL_FILE}
"""All that a run has written when its first task begins."""


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
        resume: Go on after the last finished task of the run directory; "auto": if there is one.
        console: Where to report; a plain ``Console()`` on stderr by default.
        report: Whether to write the page; ``seekr-peft report`` can do so later.

    Raises:
        ConfigError: The recipe has mistakes (all are listed); nothing was loaded. Or several processes were started, or
            several GPUs are visible.
        DivergenceError: A task's loss or gradient became no finite number; the tasks before it are kept.
        RunError: The run directory is in use, not empty, of another recipe, or there is nothing to resume; or the disk
            is full.
    """
    check_one_device()
    recipe = load_recipe(source, overrides)
    directory = Path(recipe.output_dir)
    if resume != "auto":
        _check_directory(directory, recipe, resume)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output_dir {directory} cannot be made ({error.strerror}); choose another folder.") from error
    with (
        _telling_a_full_disk(directory),
        _locked(directory),
        RunProgress(console or Console(stderr=True)) as progress,
        _logging_to(progress.console),
    ):
        if resume == "auto":
            path = directory / RECIPE_FILE
            trained = (directory / METHOD_STATE_FILE).is_file()
            resume = trained or (path.is_file() and not recipe_difference(path, recipe))
        _check_directory(directory, recipe, resume)
        if not resume:
            save_recipe(recipe, directory / RECIPE_FILE)
            # Of a run that ended before its first task, perhaps with another model.
            (directory / GENERAL_FILE).unlink(missing_ok=True)
        matrix = _Run(recipe, directory, progress).execute()
        page = write_report(directory) if report else None
        _summarise(directory, matrix, page, progress)
    return RunResult(directory, matrix, page)


class _Run:
    """The state of one call of ``run_recipe``."""

    def __init__(self, recipe: Recipe, directory: Path, progress: RunProgress) -> None:
        self.recipe = recipe
        self.directory = directory
        self.progress = progress
        self.started = time.monotonic()
        environment = _read_json(directory / ENVIRONMENT_FILE)
        self.seconds_before: float | None = environment.get("seconds")
        self.base: str | None = environment.get("base")
        self.costs: list[TaskCost] = []

    def execute(self) -> AccuracyMatrix:
        if is_finished(self.directory):
            self.progress.say(f"all tasks of {self.directory} are finished")
            return AccuracyMatrix.load(self.directory)
        self._write_environment(self.seconds_before)
        tasks = load_tasks(self.recipe)
        names = [task.name for task in tasks]
        epochs = self.recipe.tasks.epochs
        if epochs is not None and len(epochs) != len(tasks):
            raise ConfigError(f"tasks.epochs has {len(epochs)} numbers for {len(tasks)} tasks; give one for each.")
        for place, task in enumerate(tasks):
            _check_length(task, self._training_arguments(place))
        if self.recipe.training.get("fp16") and not torch.cuda.is_available():
            logger.warning(
                "training.fp16 has no effect without a GPU: the model trains in float32; bf16 would have one."
            )
        set_seed(self.recipe.seed)
        model, tokenizer = load_model(self.recipe)
        for task in tasks:
            # Of all the tasks before the first is trained.
            task.check_texts(tokenizer)
            warn_of_unreachable(task, tokenizer, self.recipe.evaluation.max_new_tokens)
        trained = _trained_tasks(self.directory)
        self._check_base_and_data(base_fingerprint(model), tasks, trained)
        self._write_environment(self.seconds_before)
        method = get_method(self.recipe.method_name)(
            model,
            self.recipe.method_config(),
            directory=self.directory,
            adapter_mode=self.recipe.adapter.mode,
            rank_limit=self.recipe.adapter.rank_limit,
        )
        # Before hours of training, not after the first task.
        prompt_room(model, self.recipe.tasks.max_length, self.recipe.evaluation.max_new_tokens)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_length = min(self.recipe.tasks.max_length, positions or self.recipe.tasks.max_length)
        stages = plan_stages(tasks, method.joint)
        finished = _finished_tasks(self.directory)
        evaluated = sum(len(stage.seen) <= finished for stage in stages)
        if trained > evaluated + 1:
            raise RunError(
                f"{self.directory} has {trained} trained tasks of which {evaluated} are evaluated, so {STATE_FILE} is "
                f"missing or old; restore it, or start again in another output_dir."
            )
        if trained:
            method.restore([stage.name for stage in stages[:trained]])
            self.progress.say(f"resuming after task {stages[trained - 1].name} ({trained} of {len(stages)} trained)")
        _cut_metrics(self.directory / METRICS_FILE, trained)
        self._read_costs(stages[:trained], method)
        matrix = AccuracyMatrix.load(self.directory) if finished else AccuracyMatrix(names)
        self._write_task_facts(tasks)
        if not trained:
            self._measure_general(model, tokenizer, max_length, after="")
        for index, stage in enumerate(stages):
            if index >= trained:
                tokenized = [task.tokenized(tokenizer, max_length) for task in stage.trained]
                self._train(method, stage.name, tokenized, index, f"{index + 1}/{len(stages)} {stage.name}")
            if len(stage.seen) > finished:
                with seconds_into(self.costs[index], "evaluate_seconds"):
                    self._evaluate(model, tokenizer, stage.seen, max_length, matrix)
                    self._measure_general(model, tokenizer, max_length, after=stage.seen[-1].name)
                if index + 1 == len(stages):
                    # Before the state says "finished", which promises the adapter.
                    method.stack.export(self.directory / "adapter")
                self._write_costs()
                self._write_environment((self.seconds_before or 0) + time.monotonic() - self.started)
                self._write_state(names, len(stage.seen))
        return matrix

    def _write_environment(self, seconds: float | None) -> None:
        """Versions and machine; ``seconds`` are those of all sessions up to the last finished task."""
        rounded = None if seconds is None else round(seconds, 1)
        write_json(self.directory / ENVIRONMENT_FILE, {**_environment(), "base": self.base, "seconds": rounded})

    def _train(self, method: ContinualMethod, name: str, tasks: list[Task], index: int, label: str) -> None:
        # Each task has its own seed, so a resumed run draws the same numbers as one that was never stopped.
        set_seed(self.recipe.seed + index)
        reporter = StepReporter(self.progress, self.directory / METRICS_FILE, name, index, label)
        meter = StepMeter(method.replay_due, "cuda" if torch.cuda.is_available() else "cpu")
        dataset, arguments = self._training_data(tasks, index)
        cost = TaskCost(name)
        with seconds_into(cost, "other_seconds"), method.task(name, replay_from=dataset):
            trainer = _trainer(method, arguments, dataset, [reporter, meter])
            try:
                with seconds_into(cost, "train_seconds"):
                    trainer.train()
            except Exception as error:
                if not _is_of_a_setting(error):
                    raise
                raise ConfigError(f"training: {_in_one_line(error)}") from error
            finally:
                meter.close()
        cost.other_seconds -= cost.train_seconds
        cost.n_steps, cost.step_seconds, cost.step_peak_bytes = reporter.n_steps, meter.step_seconds, meter.peak
        cost.kept_bytes = kept_bytes(method.task_directory(index, name))
        self.costs.append(cost)
        self._write_costs()
        n_cut = sum(task.cut or 0 for task in tasks)
        cut = f", {n_cut} prompts shortened" if n_cut else ""
        self.progress.say(
            f"trained {label}: {reporter.n_steps} steps, {describe_terms(reporter.last)}{cut}{_teacher_text(method)}"
        )

    def _training_data(self, tasks: list[Task], index: int) -> tuple[Any, TrainingArguments]:
        """The samples of one training and its arguments."""
        if len(tasks) == 1:
            return tasks[0].train, self._training_arguments(index)
        return joined([task.train for task in tasks], [self._training_arguments(place) for place in range(len(tasks))])

    def _training_arguments(self, index: int) -> TrainingArguments:
        epochs = self.recipe.tasks.epochs
        settings: dict[str, Any] = {
            "save_strategy": "no",
            "logging_steps": 10,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            **self.recipe.training,
        }
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        for old, new in _RENAMED.items():
            # transformers warns about the old name where it has the new one.
            if new in known and old in settings:
                value = settings.pop(old)
                settings.setdefault(new, value)
        for name in _CHECKPOINTING_OPTIONS & settings.keys():
            settings[name] = _checkpointing_options(name, settings[name])
        if epochs is not None:
            settings["num_train_epochs"] = epochs[index]
        try:
            return TrainingArguments(
                output_dir=str(self.directory),
                seed=self.recipe.seed + index,
                use_cpu=not torch.cuda.is_available(),
                **settings,
            )
        except Exception as error:
            # Settings that exclude each other, values out of range, packages that are not installed.
            raise ConfigError(f"training: {_in_one_line(error)}") from error

    def _evaluate(self, model: Any, tokenizer: Any, seen: list[Task], max_length: int, matrix: AccuracyMatrix) -> None:
        after = seen[-1].name
        folder = self.directory / "predictions" / f"{len(seen):02d}-{after}"
        folder.mkdir(parents=True, exist_ok=True)
        bar = self.progress.start(f"evaluating after {after}", len(seen))
        for number, task in enumerate(seen, start=1):
            evaluation = evaluate_task(
                model,
                tokenizer,
                task,
                max_new_tokens=self.recipe.evaluation.max_new_tokens,
                batch_size=self.recipe.evaluation.batch_size,
                max_length=max_length,
                check_answers=False,
            )
            matrix.record(after=after, on=task.name, score=evaluation.score)
            lines = [json.dumps(prediction, ensure_ascii=False) for prediction in evaluation.predictions]
            (folder / f"{number:02d}-{task.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            self.progress.update(bar, number)
        self.progress.finish(bar)
        matrix.save(self.directory)
        scores = "  ".join(f"{task.name} {100 * (matrix.score(after=after, on=task.name) or 0):.1f}" for task in seen)
        self.progress.say(f"  after {after}: {scores}")

    def _measure_general(self, model: Any, tokenizer: Any, max_length: int, after: str) -> None:
        """Add the tests of general ability after task ``after`` ("": before the first) to general.json.

        A value that an earlier session measured stays; one that is not finite (a diverged model's loss) is null.
        """
        tests = general_tests(self.recipe)
        if not tests:
            return
        path, section = self.directory / GENERAL_FILE, self.recipe.evaluation
        record = _read_json(path) or {
            "tests": [test.to_dict() for test in tests],
            "after": [],
            "values": {test.name: [] for test in tests},
        }
        if after not in record["after"]:
            record["after"].append(after)
            for values in record["values"].values():
                values.append(None)
        place = record["after"].index(after)
        bar = self.progress.start("measuring general ability", len(tests))
        for number, test in enumerate(tests, start=1):
            if record["values"][test.name][place] is None:
                value = test.measure(
                    model,
                    tokenizer,
                    n_questions=section.general_samples,
                    max_tokens=section.general_tokens,
                    batch_size=section.batch_size,
                    max_length=max_length,
                )
                record["values"][test.name][place] = value if math.isfinite(value) else None
                write_json(path, record)
            self.progress.update(bar, number)
        self.progress.finish(bar)
        values = "  ".join(test.describe(record["values"][test.name][place]) for test in tests)
        self.progress.say(f"  general ability {f'after {after}' if after else 'before the first task'}: {values}")

    def _write_task_facts(self, tasks: list[Task]) -> None:
        facts = [
            {
                "name": task.name,
                "metric": task.metric,
                "n_train": len(task.train),
                "n_test": len(task.test),
                "majority_class": constant_answer_score(task),
                "fingerprint": task.fingerprint(),
            }
            for task in tasks
        ]
        write_json(self.directory / TASKS_FILE, facts)

    def _check_base_and_data(self, base: str, tasks: list[Task], trained: int) -> None:
        """RunError when a resumed run would go on with another base or other samples than it began with."""
        path = self.directory / TASKS_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8")) if trained else []
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is broken ({error}); start the run again in another output_dir.") from error
        before = {fact["name"]: fact.get("fingerprint") for fact in facts}
        changed = [f"the data of task {task.name}" for task in tasks if before.get(task.name, "") != task.fingerprint()]
        changed = changed if trained else []
        if trained and self.base != base:
            changed.insert(0, f"the base model {self.recipe.model.name_or_path}")
        if changed:
            raise RunError(
                f"{self.directory} cannot go on: {' and '.join(changed)} changed since it began; bring the old state "
                f"back, or start again in another output_dir."
            )
        self.base = base

    def _read_costs(self, stages: list[Stage], method: ContinualMethod) -> None:
        """Those of the trained stages; of one that a kill left unwritten the seconds and the peak are lost."""
        written = (self.directory / COSTS_FILE).is_file()
        advice = "delete that file, which loses the seconds and peaks of the finished tasks and nothing else"
        self.costs = read_costs(self.directory, advice)[: len(stages)] if written else []
        for index in range(len(self.costs), len(stages)):
            name = stages[index].name
            steps = _last_steps(self.directory / METRICS_FILE).get(index, 0)
            self.costs.append(TaskCost(name, steps, kept_bytes=kept_bytes(method.task_directory(index, name))))

    def _write_costs(self) -> None:
        write_json(self.directory / COSTS_FILE, {"tasks": [cost.to_json() for cost in self.costs]})

    def _write_state(self, names: list[str], finished: int) -> None:
        write_json(
            self.directory / STATE_FILE,
            {
                "finished_tasks": finished,
                "tasks": names,
                "last_finished": names[finished - 1],
                "status": "finished" if finished == len(names) else "running",
            },
        )


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a run that has trained and evaluated all its tasks."""
    return _read_json(directory / STATE_FILE).get("status") == "finished"


def recipe_difference(path: Path, recipe: Recipe) -> str:
    """The first key in which the recipe stored at ``path`` differs from ``recipe``, with both values; '' for none."""
    try:
        old, new = stored_recipe(path).to_dict(), recipe.to_dict()
    except ConfigError as error:
        raise RunError(f"{error}; delete the folder {path.parent} to run it again.") from error
    # Which other runs it is compared with is no part of a run.
    return _difference({**old, "compare": None}, {**new, "compare": None})


def _summarise(directory: Path, matrix: AccuracyMatrix, report: Path | None, progress: RunProgress) -> None:
    progress.console.print(matrix.to_rich_table())
    facts = json.loads((directory / TASKS_FILE).read_text(encoding="utf-8"))
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


def load_tasks(recipe: Recipe) -> list[Task]:
    """The recipe's tasks in order of training."""
    tasks = _demo_tasks(recipe) if recipe.tasks.format == DEMO else _read_tasks(recipe)
    return [task.as_chat() for task in tasks] if recipe.tasks.chat_template else tasks


def _demo_tasks(recipe: Recipe) -> list[Task]:
    from .demo.words import demo_tasks

    section = recipe.tasks
    sizes = {"n_train": section.max_train or 600, "n_test": section.max_test or 100}
    found = {record["name"]: record for record in demo_tasks(recipe.seed, **sizes)}
    return [Task.from_records(name, found[name]["train"], found[name]["test"]) for name in section.order or found]


def _read_tasks(recipe: Recipe) -> list[Task]:
    section = recipe.tasks
    return read_tasks(
        section.format, str(section.path), section.order, section.max_train, section.max_test, recipe.seed
    )


def _check_length(task: Task, arguments: TrainingArguments) -> None:
    """ConfigError for a training set that does not make one batch."""
    size = arguments.train_batch_size
    if arguments.dataloader_drop_last and len(task.train) < size:
        raise ConfigError(
            f"training.dataloader_drop_last leaves out every sample of task {task.name}: its {len(task.train)} samples "
            f"do not fill a batch of {size}; leave it out, or take a smaller per_device_train_batch_size."
        )


def constant_answer_score(task: Task) -> float:
    """What always giving the most frequent test answer would score under the task's own metric: the majority class."""
    answers = list(task.test["answer"])
    most_frequent = Counter(answers).most_common(1)[0][0]
    return score_predictions(task.metric, [most_frequent] * len(answers), answers)[0]


def _check_directory(directory: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a directory that holds another run, one that is finished, or that has nothing to resume."""
    path = directory / RECIPE_FILE
    entries = [entry for entry in directory.iterdir() if entry.name != ".lock"] if directory.is_dir() else []
    if directory.exists() and not directory.is_dir():
        raise RunError(f"output_dir {directory} is a file; choose another folder.")
    if not resume:
        names = {entry.name for entry in entries}
        if names <= {_PARTIAL_RECIPE} or {RECIPE_FILE, ENVIRONMENT_FILE} <= names <= _BEFORE_TRAINING:
            # A run that ended before its first task was trained; anything else may be somebody's own files.
            return
        if path.is_file():
            raise RunError(
                f"{directory} already holds a run; go on with --resume, choose another output_dir, or delete it."
            )
        if entries:
            raise RunError(
                f"{directory} is not empty and holds no run ({entries[0].name} is there); choose another output_dir."
            )
        return
    if not path.is_file():
        raise RunError(f"{directory} holds no run to resume (no {RECIPE_FILE}); start it without --resume.")
    changed = recipe_difference(path, recipe)
    if changed:
        raise RunError(
            f"{directory} was started with another recipe ({changed}); resume with the same recipe, or choose another "
            f"output_dir."
        )


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first key in which two recipes differ, with both values; empty when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    return "" if old == new or where == "output_dir" else f"{where} was {shown(old)}, now {shown(new)}"


@contextmanager
def _locked(directory: Path) -> Any:
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUseError(
            f"{directory} is in use by another process; wait for it, or choose another output_dir."
        ) from None
    try:
        # The operating system releases it when the process dies.
        yield
    finally:
        lock.release()


@contextmanager
def _telling_a_full_disk(directory: Path) -> Any:
    """A sentence in place of the traceback of whatever could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors says it in words alone.
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "(os error 28)" in str(error)
        if not full:
            raise
        raise RunError(
            f"{directory} cannot be written, the disk is full ({error}); make room and go on with --resume "
            f"(resume=True): the tasks that are trained are kept."
        ) from error


@contextmanager
def _logging_to(console: Console) -> Any:
    """Show the package's warnings on the console (above the bar) for as long as the run lasts."""
    handler = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _finished_tasks(directory: Path) -> int:
    path = directory / STATE_FILE
    finished = _read_json(path).get("finished_tasks", 0)
    if not isinstance(finished, int):
        raise RunError(f"{path} is broken (finished_tasks is {finished!r}); start the run again in another output_dir.")
    return finished


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run directory; empty when there is no such file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is broken ({error}); start the run again in another output_dir.") from error
    if not isinstance(document, dict):
        raise RunError(f"{path} is broken (no JSON object); start the run again in another output_dir.")
    return document


def _trained_tasks(directory: Path) -> int:
    path = directory / METHOD_STATE_FILE
    if not path.is_file():
        if finished := _finished_tasks(directory):
            raise RunError(
                f"{path} is missing, though {finished} tasks of this run are finished; restore it, or start again in "
                f"another output_dir."
            )
        shutil.rmtree(directory / "tasks", ignore_errors=True)
        return 0
    return len(read_method_state(directory)["tasks"])


def _last_steps(path: Path) -> dict[int, int]:
    """Optimiser steps of each stage by its index, from metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record["task_index"]: record["step"] for record in map(json.loads, lines)}


def _cut_metrics(path: Path, trained: int) -> None:
    """Drop the lines of tasks that will be trained again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A kill may have left half a last line.
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["task_index"] < trained:
                kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _trainer(method: ContinualMethod, arguments: TrainingArguments, dataset: Any, callbacks: list[Any]) -> Any:
    """A trainer with its optimizer, since some settings are only checked when that is made."""
    try:
        trainer = ContinualTrainer(
            model=method.model, method=method, args=arguments, train_dataset=dataset, callbacks=callbacks
        )
        trainer.create_optimizer()
    except (SeekrError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"training: {_in_one_line(error)}") from error
    _remove_printers(trainer)
    return trainer


def _checkpointing_options(name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """``given``, without reentrant checkpointing where it says nothing of it."""
    if given and given.get("offload") and not torch.cuda.is_available():
        raise ConfigError(f"training.{name}: offload needs a GPU, whose memory it makes room in; leave it out.")
    return {"use_reentrant": False, **(given or {})}


def _is_of_a_setting(error: Exception) -> bool:
    """Whether a training failed for a setting that needs a package, or a compiler, that only a training asks for."""
    return isinstance(error, ImportError) or type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _in_one_line(error: Exception) -> str:
    return cut(" ".join(str(error).split()) or type(error).__name__, 500)


def _remove_printers(trainer: Any) -> None:
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _teacher_text(method: ContinualMethod) -> str:
    memory = getattr(method, "memory", None)
    if memory is None or not memory.tasks:
        return ""
    task = memory.tasks[-1]
    text = f"; kept {len(task)} samples, {task.bytes / 1000:.1f} kB"
    if task.quality is not None:
        text += f"; teacher {task.quality.loss:.2f} nats a token, entropy {task.quality.answer_entropy:.2f}"
    return text


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

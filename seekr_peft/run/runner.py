"""A task sequence as one resumable run directory: ``run_recipe``.

A task is *trained* once ``method.json`` lists it (adapter and memory are on disk by then) and *finished* once
``state.json`` counts it (evaluated as well). Both files are replaced atomically, so a kill at any moment loses at most
what was done since the last checkpoint inside the task in progress (``training.save_strategy``), or that task.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import platform
import re
import shlex
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
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..errors import ConfigError, RunError, RunInUseError, SeekrError, cut, shown
from ..evaluation import FORMULAS, AccuracyMatrix, evaluate_task
from ..evaluation.generation import prompt_room, warn_of_unreachable
from ..files.atomic import partial_path, remove_folder, write_text
from ..files.manifest import MANIFEST_FILE, Ledger, StoredFiles, read_manifest
from ..files.manifest import METHOD_FILE as METHOD_STATE_FILE
from ..methods import ContinualMethod, get_method
from ..methods.base import delete_unfinished, read_method_state
from ..model.devices import check_one_device
from ..model.kind import base_fingerprint
from ..recipe.base_model import load_model
from ..recipe.schema import DEMO, Recipe, general_tests, load_recipe, recipe_text, stored_recipe
from ..report import read_run, write_report
from ..tasks import Task, read_tasks
from ..terminal import TerminalConsole
from ..training.checkpoint import checkpoints_in, latest_checkpoint
from ..training.stopping import RunStopped, StopRequest, listening
from ..training.trainer import ContinualTrainer, forget_preparation
from .progress import RunProgress, StepReporter, describe_terms
from .stages import Stage, joined, plan_stages
from .task_costs import COSTS_FILE, StepMeter, TaskCost, kept_bytes, read_costs, seconds_into

logger = logging.getLogger("seekr_peft")

TASKS_FILE = "tasks.json"
GENERAL_FILE = "general.json"
PREDICTIONS = "predictions"
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


CHECKPOINTS = "checkpoints"
"""Of the task in progress: ``checkpoints/NN-name/checkpoint-STEP``."""

_BEFORE_TRAINING = {RECIPE_FILE, ENVIRONMENT_FILE, TASKS_FILE, METRICS_FILE, GENERAL_FILE, MANIFEST_FILE, CHECKPOINTS}
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
        directory = Path(recipe.output_dir)
        if resume != "auto":
            _check_directory(directory, recipe, resume)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output_dir {directory} cannot be made ({error.strerror}); choose another folder."
            ) from error
        with (
            _saying_how_to_go_on(directory),
            _telling_what_failed(directory),
            _locked(directory),
            RunProgress(console or TerminalConsole(stderr=True)) as progress,
            _logging_to(progress.console),
        ):
            if resume == "auto":
                path = directory / RECIPE_FILE
                resume = _has_trained(directory) or (path.is_file() and not recipe_difference(path, recipe))
            _check_directory(directory, recipe, resume)
            ledger = Ledger(directory)
            if not resume:
                # Of a run that ended before its first task, perhaps with another model.
                for name in _BEFORE_TRAINING - {CHECKPOINTS}:
                    (directory / name).unlink(missing_ok=True)
                _drop_checkpoints(directory / CHECKPOINTS, None)
            else:
                StoredFiles(directory).check_all()
                ledger.settle()
            if not (directory / RECIPE_FILE).is_file():
                ledger.write_text(RECIPE_FILE, recipe_text(recipe))
            matrix = _Run(recipe, directory, progress, stop).execute()
            ledger.settle()
            page = write_report(directory) if report else None
            _summarise(directory, matrix, page, progress)
    return RunResult(directory, matrix, page)


class _Run:
    """The state of one call of ``run_recipe``."""

    def __init__(self, recipe: Recipe, directory: Path, progress: RunProgress, stop: StopRequest) -> None:
        self.recipe = recipe
        self.directory = directory
        self.ledger = Ledger(directory)
        self.progress = progress
        self.stop = stop
        self.started = time.monotonic()
        environment = _read_json(directory / ENVIRONMENT_FILE)
        self.seconds_before: float | None = environment.get("seconds")
        self.base: str | None = environment.get("base")
        self.costs: list[TaskCost] = []
        self.fingerprints: dict[str, str] = {}

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
        self.fingerprints = {task.name: task.fingerprint() for task in tasks}
        trained = _trained_tasks(self.directory)
        method = get_method(self.recipe.method_name)(
            model,
            self.recipe.method_config(),
            directory=self.directory,
            adapter_mode=self.recipe.adapter.mode,
            rank_limit=self.recipe.adapter.rank_limit,
        )
        self._check_base_and_data(model, method.base_fingerprint(), tasks, trained)
        self._write_environment(self.seconds_before)
        # Before hours of training, not after the first task.
        prompt_room(model, self.recipe.tasks.max_length, self.recipe.evaluation.max_new_tokens)
        positions = method.facts.positions
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
        _drop_checkpoints(self.directory / CHECKPOINTS, trained)
        going_on = None
        if trained < len(stages):
            stage = stages[trained]
            going_on = self._checkpoint(method, stage.name, [task.name for task in stage.trained])
        _cut_metrics(self.directory / METRICS_FILE, trained, 0 if going_on is None else _step_of(going_on))
        self._read_costs(stages[:trained], method)
        matrix = AccuracyMatrix.load(self.directory) if finished else AccuracyMatrix(names)
        self._write_task_facts(tasks)
        if not trained:
            self._measure_general(model, tokenizer, max_length, after="")
        for index, stage in enumerate(stages):
            if index >= trained:
                tokenized = [task.tokenized(tokenizer, max_length) for task in stage.trained]
                label = f"{index + 1}/{len(stages)} {stage.name}"
                with self.stop.at_the_next_step():
                    self._train(method, stage.name, tokenized, index, label, going_on)
                going_on = None
            if len(stage.seen) > finished:
                with seconds_into(self.costs[index], "evaluate_seconds"):
                    self._evaluate(model, tokenizer, stage.seen, max_length, matrix)
                    self._measure_general(model, tokenizer, max_length, after=stage.seen[-1].name)
                if index + 1 == len(stages):
                    # Before the state says "finished", which promises the adapter.
                    method.export("adapter")
                self._write_costs()
                self._write_environment((self.seconds_before or 0) + time.monotonic() - self.started)
                self._write_state(names, len(stage.seen))
        if not is_finished(self.directory):
            # Everything was trained and evaluated, but the adapter was lost.
            method.export("adapter")
            self._write_state(names, len(names))
        return matrix

    def _write_environment(self, seconds: float | None) -> None:
        """Versions and machine; ``seconds`` are those of all sessions up to the last finished task."""
        rounded = None if seconds is None else round(seconds, 1)
        self.ledger.write_json(ENVIRONMENT_FILE, {**_environment(), "base": self.base, "seconds": rounded})

    def _made_from(self, names: list[str]) -> dict[str, Any]:
        """What a training of the tasks ``names`` is made from beside the base and the earlier ones."""
        data = {name: self.fingerprints[name] for name in names}
        return {"recipe": recipe_fingerprint(self.recipe), "data": data}

    def _checkpoint(self, method: ContinualMethod, name: str, names: list[str]) -> Path | None:
        """Where the training ``name``, the next one, of the tasks ``names`` was stopped; None where it begins."""
        folder = self._checkpoints(len(method.task_names), name)
        made_from = {**method.task_made_from(), **self._made_from(names), "task": name}
        found = latest_checkpoint(folder, made_from)
        if found is not None:
            self.progress.say(f"going on with task {name} after step {_step_of(found)}")
        return found

    def _checkpoints(self, index: int, name: str) -> Path:
        return self.directory / CHECKPOINTS / f"{index + 1:02d}-{name}"

    def _train(
        self, method: ContinualMethod, name: str, tasks: list[Task], index: int, label: str, checkpoint: Path | None
    ) -> None:
        # Each task has its own seed, so a resumed run draws the same numbers as one that was never stopped.
        set_seed(self.recipe.seed + index)
        reporter = StepReporter(self.progress, self.directory / METRICS_FILE, name, index, label)
        meter = StepMeter(method.replay_due, "cuda" if torch.cuda.is_available() else "cpu")
        dataset, arguments = self._training_data(tasks, index)
        arguments.output_dir = str(self._checkpoints(index, name))
        cost = TaskCost(name)
        method.made_from = self._made_from([task.name for task in tasks])
        with seconds_into(cost, "other_seconds"), method.task(name, replay_from=dataset):
            trainer = _trainer(method, arguments, dataset, [reporter, meter, _StopCallback(self.stop)])
            try:
                with seconds_into(cost, "train_seconds"):
                    trainer.train(resume_from_checkpoint=checkpoint)
                    self.stop.check()
            except Exception as error:
                # A signal to the whole group of processes ends the workers that load samples, too.
                self.stop.check()
                if not _is_of_a_setting(error):
                    raise
                raise ConfigError(f"training: {_in_one_line(error)}") from error
            finally:
                meter.close()
        cost.other_seconds -= cost.train_seconds
        cost.n_steps, cost.step_seconds, cost.step_peak_bytes = reporter.n_steps, meter.step_seconds, meter.peak
        cost.kept_bytes = kept_bytes(method.task_directory(index, name))
        self.costs.append(cost)
        self.ledger.note_growing(METRICS_FILE)
        self._write_costs()
        remove_folder(self.directory / CHECKPOINTS)
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
            "save_total_limit": 2,
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
                output_dir=str(self.directory / CHECKPOINTS),
                seed=self.recipe.seed + index,
                use_cpu=not torch.cuda.is_available(),
                **settings,
            )
        except Exception as error:
            # Settings that exclude each other, values out of range, packages that are not installed.
            raise ConfigError(f"training: {_in_one_line(error)}") from error

    def _training_precision(self) -> Any:
        """The mixed precision of the training, in which a model is also measured, before the first training too."""
        arguments = self._training_arguments(0)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        return torch.autocast(kind, half, enabled=arguments.bf16 or (arguments.fp16 and kind == "cuda"))

    def _evaluate(self, model: Any, tokenizer: Any, seen: list[Task], max_length: int, matrix: AccuracyMatrix) -> None:
        after = seen[-1].name
        folder = self.directory / PREDICTIONS / f"{len(seen):02d}-{after}"
        folder.mkdir(parents=True, exist_ok=True)
        forget_preparation(model)
        bar = self.progress.start(f"evaluating after {after}", len(seen))
        for number, task in enumerate(seen, start=1):
            with self._training_precision():
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
            name = f"{number:02d}-{task.name}.jsonl"
            self.ledger.write_text(f"{PREDICTIONS}/{folder.name}/{name}", "\n".join(lines) + "\n")
            self.progress.update(bar, number)
        self.progress.finish(bar)
        for name, text in matrix.files().items():
            self.ledger.write_text(name, text)
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
                with self._training_precision():
                    value = test.measure(
                        model,
                        tokenizer,
                        n_questions=section.general_samples,
                        max_tokens=section.general_tokens,
                        batch_size=section.batch_size,
                        max_length=max_length,
                    )
                record["values"][test.name][place] = value if math.isfinite(value) else None
                self.ledger.write_json(GENERAL_FILE, record)
            self.progress.update(bar, number)
        self.progress.finish(bar)
        values = "  ".join(test.describe(record["values"][test.name][place]) for test in tests)
        self.progress.say(f"  general ability {f'after {after}' if after else 'before the first task'}: {values}")

    def _write_task_facts(self, tasks: list[Task]) -> None:
        facts = [
            {
                "name": task.name,
                "metric": task.metric_name,
                "n_train": len(task.train),
                "n_test": len(task.test_set()),
                "majority_class": constant_answer_score(task),
                "fingerprint": self.fingerprints[task.name],
            }
            for task in tasks
        ]
        self.ledger.write_json(TASKS_FILE, facts)

    def _check_base_and_data(self, model: Any, base: str, tasks: list[Task], trained: int) -> None:
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
                f"{self.directory} cannot go on: {' and '.join(changed)} changed since it began; bring the old state "
                f"back, or start again in another output_dir."
            )
        self.base = base

    def _fingerprints_before(self) -> dict[str, str]:
        """Those of the tasks' data when the run began: of all, or, where that file was lost, of the trained ones."""
        path = self.directory / TASKS_FILE
        if path.is_file():
            return {fact["name"]: fact["fingerprint"] for fact in _read_facts(path)}
        folders = [folder for folder, _ in StoredFiles(self.directory).task_folders()]
        found: dict[str, str] = {}
        for folder in folders:
            found |= read_manifest(folder)["made_from"].get("data", {})
        return found

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
        self.ledger.write_json(COSTS_FILE, {"tasks": [cost.to_json() for cost in self.costs]})

    def _write_state(self, names: list[str], finished: int) -> None:
        self.ledger.write_json(
            STATE_FILE,
            {
                "finished_tasks": finished,
                "tasks": names,
                "last_finished": names[finished - 1],
                "status": "finished" if finished == len(names) else "running",
            },
        )


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a run that has trained and evaluated all its tasks; RunError where its state is not
    what was written."""
    StoredFiles(directory).check(directory / STATE_FILE)
    return _read_json(directory / STATE_FILE).get("status") == "finished"


def recipe_difference(path: Path, recipe: Recipe) -> str:
    """The first key in which the recipe stored at ``path`` differs from ``recipe``, with both values; '' for none."""
    StoredFiles(path.parent).check(path)
    try:
        old, new = stored_recipe(path).to_dict(), recipe.to_dict()
    except ConfigError as error:
        raise RunError(f"{error}; delete the folder {path.parent} to run it again.") from error
    return _difference(_that_matter(old), _that_matter(new))


def _summarise(directory: Path, matrix: AccuracyMatrix, report: Path | None, progress: RunProgress) -> None:
    progress.console.print(matrix.to_rich_table())
    facts = _read_facts(directory / TASKS_FILE)
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


def _read_facts(path: Path) -> list[dict[str, Any]]:
    advice = "start the run again in another output_dir"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not all({"name", "fingerprint", "majority_class"} <= set(fact) for fact in facts):
            raise ValueError("a task lacks its name, fingerprint or majority_class")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is broken ({error}); {advice}.") from error
    return list(facts)


def recipe_fingerprint(recipe: Recipe) -> str:
    """SHA-256 of all that a recipe says about a run but for where it is written."""
    settings = _that_matter(recipe.to_dict())
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _in_its_own_folder(recipe: Recipe, source: Any, overrides: Sequence[str]) -> Recipe:
    """``recipe`` of the run that the file ``source`` lies in, which may have been moved since it was written."""
    if not isinstance(source, str | Path) or Path(source).name != RECIPE_FILE:
        return recipe
    folder = Path(source).parent
    said = any(override.partition("=")[0].strip() == "output_dir" for override in overrides)
    return recipe if said or not Ledger(folder).is_own() else recipe.model_copy(update={"output_dir": str(folder)})


def _that_matter(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what changes nothing in a run: where it is written, which other runs it is compared with, and
    how often a checkpoint is kept."""
    training = {key: value for key, value in recipe["training"].items() if not key.startswith("save_")}
    return {**recipe, "training": training, "compare": None, "output_dir": None}


class _StopCallback(TrainerCallback):
    """Ends a training at its next step, with a checkpoint, once a signal has come."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.number is not None:
            control.should_save = control.should_training_stop = True


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _drop_checkpoints(folder: Path, trained: int | None) -> None:
    """Delete what is left of tasks that are trained by now, all but those of the ``trained``-th task (from 0)."""
    # Of a kill while it was being removed.
    shutil.rmtree(partial_path(folder), ignore_errors=True)
    for path in folder.iterdir() if folder.is_dir() else []:
        if trained is None or not path.name.startswith(f"{trained + 1:02d}-"):
            remove_folder(path)
    with suppress(OSError):
        for path in folder.glob(".*.partial"):
            shutil.rmtree(path)
        folder.rmdir()


def _is_passing(entry: Path) -> bool:
    """Whether ``entry`` is the lock, what a kill may have left of a file that was being written, or what ``repair`` has
    put aside."""
    partial = entry.name.startswith(".") and entry.name.endswith(".partial")
    return partial or entry.name == ".lock" or entry.name.startswith("damaged-")


@contextmanager
def _saying_how_to_go_on(directory: Path) -> Any:
    try:
        yield
    except RunStopped as stop:
        path = directory / RECIPE_FILE
        if path.is_file():
            stop.go_on_with(f"go on with: seekr-peft run {shlex.quote(str(path))} --resume")
        raise


def load_tasks(recipe: Recipe) -> list[Task]:
    """The recipe's tasks in order of training."""
    tasks = _demo_tasks(recipe) if recipe.tasks.format == DEMO else _read_tasks(recipe)
    return [task.as_chat() for task in tasks] if recipe.tasks.chat_template else tasks


def _demo_tasks(recipe: Recipe) -> list[Task]:
    from ..tasks.demo_words import demo_tasks

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
    answers = list(task.test_set()["answer"])
    most_frequent = Counter(answers).most_common(1)[0][0]
    return task.score([most_frequent] * len(answers))[0]


def _check_directory(directory: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a directory that holds another run, one that is finished, or that has nothing to resume."""
    path = directory / RECIPE_FILE
    entries = [entry for entry in directory.iterdir() if not _is_passing(entry)] if directory.is_dir() else []
    if directory.exists() and not directory.is_dir():
        raise RunError(f"output_dir {directory} is a file; choose another folder.")
    if not resume:
        names = {entry.name for entry in entries}
        begun = any(checkpoints_in(folder) for folder in (directory / CHECKPOINTS).glob("*"))
        own = not names or Ledger(directory).is_own() or {RECIPE_FILE, ENVIRONMENT_FILE} <= names
        if not begun and own and names <= _BEFORE_TRAINING:
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
    if not path.is_file() and not _has_trained(directory) and not Ledger(directory).is_own():
        raise RunError(f"{directory} holds no run to resume (no {RECIPE_FILE}); start it without --resume.")
    changed = recipe_difference(path, recipe) if path.is_file() else _recipe_of_tasks_differs(directory, recipe)
    if changed:
        raise RunError(
            f"{directory} was started with another recipe ({changed}); resume with the same recipe, or choose another "
            f"output_dir."
        )


def _has_trained(directory: Path) -> bool:
    return (directory / METHOD_STATE_FILE).is_file()


def _recipe_of_tasks_differs(directory: Path, recipe: Recipe) -> str:
    """Where a run's recipe was lost: whether its tasks were trained with another one than ``recipe``."""
    for folder, _ in StoredFiles(directory).task_folders():
        if read_manifest(folder)["made_from"].get("recipe") != recipe_fingerprint(recipe):
            return f"task {folder.name}, by its manifest; {RECIPE_FILE} is missing"
    return ""


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
    except OSError as error:
        raise RunError(f"{directory / '.lock'} cannot be locked ({error.strerror or error}); mend that.") from error
    try:
        # The operating system releases it when the process dies.
        yield
    finally:
        lock.release()


@contextmanager
def _telling_what_failed(directory: Path) -> Any:
    """A sentence in place of the traceback of whatever could not be read or written in ``directory``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors says it in words alone.
        number = getattr(error, "errno", None)
        if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or re.search(r"\(os error (28|27|122)\)", str(error)):
            raise RunError(
                f"{directory} cannot be written, the disk is full ({error}); make room and go on with --resume "
                f"(resume=True): the tasks that are trained are kept."
            ) from error
        place = getattr(error, "filename", None)
        if place is None or not Path(place).absolute().is_relative_to(directory.absolute()):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{place} cannot be read or written ({reason}); mend that, and go on with --resume (resume=True)."
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
        delete_unfinished(directory, 0)
        return 0
    return len(read_method_state(directory)["tasks"])


def _last_steps(path: Path) -> dict[int, int]:
    """Optimiser steps of each stage by its index, from metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record["task_index"]: record["step"] for record in map(json.loads, lines)}


def _cut_metrics(path: Path, trained: int, step: int) -> None:
    """Drop the lines of steps that will be trained again: after ``step`` of the ``trained``-th task (from 0)."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A kill may have left half a last line.
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if (record["task_index"], record["step"]) <= (trained, step):
                kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


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

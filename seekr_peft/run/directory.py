"""The directory of a run: the names of its files, who may use it, and whether a recipe may begin or go on there."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import ConfigError, RunError, RunInUseError, shown
from ..files.atomic import partial_path, remove_folder, write_text
from ..files.manifest import MANIFEST_FILE, METHOD_FILE, Ledger, StoredFiles, read_manifest
from ..methods.directory import delete_unfinished, read_method_state
from ..recipe import Recipe, recipe_text, stored_recipe
from ..training.checkpoint import checkpoints_in

RECIPE_FILE, STATE_FILE, METRICS_FILE, ENVIRONMENT_FILE = (
    "recipe.yaml",
    "state.json",
    "metrics.jsonl",
    "environment.json",
)
TASKS_FILE = "tasks.json"
GENERAL_FILE = "general.json"
PREDICTIONS = "predictions"
CHECKPOINTS = "checkpoints"
"""Of the task in progress: ``checkpoints/NN-name/checkpoint-STEP``."""

_BEFORE_TRAINING = {RECIPE_FILE, ENVIRONMENT_FILE, TASKS_FILE, METRICS_FILE, GENERAL_FILE, MANIFEST_FILE, CHECKPOINTS}
"""All that a run has written when its first task begins."""


class RunDirectory:
    """The folder ``path`` of a run; ``ledger`` is the list of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path)

    def make(self) -> None:
        """Make the folder where there is none; RunError where that cannot be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output_dir {self.path} cannot be made ({error.strerror}); choose another folder."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For this process alone; RunInUseError where another one has it."""
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"{self.path} is in use by another process; wait for it, or choose another output_dir."
            ) from None
        except OSError as error:
            raise RunError(f"{self.path / '.lock'} cannot be locked ({error.strerror or error}); mend that.") from error
        try:
            # The operating system releases it when the process dies.
            yield
        finally:
            lock.release()

    # Whether a recipe may begin or go on here -------------------------------------------------------------------

    def check(self, recipe: Recipe, resume: bool) -> None:
        """RunError for a directory that holds another run, one that is finished, or that has nothing to resume."""
        entries = [entry for entry in self.path.iterdir() if not _is_passing(entry)] if self.path.is_dir() else []
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output_dir {self.path} is a file; choose another folder.")
        if resume:
            self._check_to_go_on(recipe)
        else:
            self._check_to_begin([entry.name for entry in entries])

    def has_begun(self, recipe: Recipe) -> bool:
        """Whether there is something of ``recipe``'s run to go on with, or of another run that has trained a task."""
        path = self.path / RECIPE_FILE
        return self._has_trained() or (path.is_file() and not recipe_difference(path, recipe))

    def _check_to_begin(self, names: list[str]) -> None:
        begun = any(checkpoints_in(folder) for folder in (self.path / CHECKPOINTS).glob("*"))
        own = not names or self.ledger.is_own() or {RECIPE_FILE, ENVIRONMENT_FILE} <= set(names)
        if not begun and own and set(names) <= _BEFORE_TRAINING:
            # A run that ended before its first task was trained; anything else may be somebody's own files.
            return
        if (self.path / RECIPE_FILE).is_file():
            raise RunError(
                f"{self.path} already holds a run; go on with --resume, choose another output_dir, or delete it."
            )
        if names:
            raise RunError(
                f"{self.path} is not empty and holds no run ({names[0]} is there); choose another output_dir."
            )

    def _check_to_go_on(self, recipe: Recipe) -> None:
        path = self.path / RECIPE_FILE
        if not path.is_file() and not self._has_trained() and not self.ledger.is_own():
            raise RunError(f"{self.path} holds no run to resume (no {RECIPE_FILE}); start it without --resume.")
        changed = recipe_difference(path, recipe) if path.is_file() else self._recipe_of_tasks_differs(recipe)
        if changed:
            raise RunError(
                f"{self.path} was started with another recipe ({changed}); resume with the same recipe, or choose "
                f"another output_dir."
            )

    def _has_trained(self) -> bool:
        return (self.path / METHOD_FILE).is_file()

    def _recipe_of_tasks_differs(self, recipe: Recipe) -> str:
        """Where a run's recipe was lost: whether its tasks were trained with another one than ``recipe``."""
        for folder, _ in StoredFiles(self.path).task_folders():
            if read_manifest(folder)["made_from"].get("recipe") != recipe_fingerprint(recipe):
                return f"task {folder.name}, by its manifest; {RECIPE_FILE} is missing"
        return ""

    # Begun, or gone on with -------------------------------------------------------------------------------------

    def open(self, recipe: Recipe, resume: bool) -> None:
        """Make it ready for the run: check every stored file, or remove what a run without a trained task has left."""
        if resume:
            StoredFiles(self.path).check_all()
            self.ledger.settle()
        else:
            # Of a run that ended before its first task, perhaps with another model.
            for name in _BEFORE_TRAINING - {CHECKPOINTS}:
                (self.path / name).unlink(missing_ok=True)
            self.drop_checkpoints(None)
        if not (self.path / RECIPE_FILE).is_file():
            self.ledger.write_text(RECIPE_FILE, recipe_text(recipe))

    def checkpoints(self, index: int, name: str) -> Path:
        """Where the ``index``-th training (from 0) keeps its checkpoints."""
        return self.path / CHECKPOINTS / f"{index + 1:02d}-{name}"

    def drop_checkpoints(self, trained: int | None) -> None:
        """Delete what is left of tasks that are trained by now, all but those of the ``trained``-th task (from 0)."""
        folder = self.path / CHECKPOINTS
        # Of a kill while it was being removed.
        shutil.rmtree(partial_path(folder), ignore_errors=True)
        for path in folder.iterdir() if folder.is_dir() else []:
            if trained is None or not path.name.startswith(f"{trained + 1:02d}-"):
                remove_folder(path)
        with suppress(OSError):
            for path in folder.glob(".*.partial"):
                shutil.rmtree(path)
            folder.rmdir()

    def cut_metrics(self, trained: int, step: int) -> None:
        """Drop the lines of steps that will be trained again: after ``step`` of the ``trained``-th task (from 0)."""
        path = self.path / METRICS_FILE
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

    # How far the run has come -----------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        """Whether all tasks are trained and evaluated; RunError where the state is not what was written."""
        StoredFiles(self.path).check(self.path / STATE_FILE)
        return self.read_object(STATE_FILE).get("status") == "finished"

    def n_evaluated_tasks(self) -> int:
        """How many tasks were seen and evaluated, by ``state.json``."""
        path = self.path / STATE_FILE
        finished = self.read_object(STATE_FILE).get("finished_tasks", 0)
        if not isinstance(finished, int):
            raise RunError(
                f"{path} is broken (finished_tasks is {finished!r}); start the run again in another output_dir."
            )
        return finished

    def n_trainings(self) -> int:
        """How many trainings are complete on disk, by ``method.json``; what is left of a first one that is not is
        deleted."""
        path = self.path / METHOD_FILE
        if path.is_file():
            return len(read_method_state(self.path)["tasks"])
        if finished := self.n_evaluated_tasks():
            raise RunError(
                f"{path} is missing, though {finished} tasks of this run are finished; restore it, or start again in "
                f"another output_dir."
            )
        delete_unfinished(self.path, 0)
        return 0

    def read_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the directory; empty when there is no such file."""
        path = self.path / name
        try:
            document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is broken ({error}); start the run again in another output_dir.") from error
        if not isinstance(document, dict):
            raise RunError(f"{path} is broken (no JSON object); start the run again in another output_dir.")
        return document


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a run that has trained and evaluated all its tasks; RunError where its state is not
    what was written."""
    return RunDirectory(directory).is_finished()


def recipe_difference(path: Path, recipe: Recipe) -> str:
    """The first key in which the recipe stored at ``path`` differs from ``recipe``, with both values; '' for none."""
    StoredFiles(path.parent).check(path)
    try:
        old, new = stored_recipe(path).to_dict(), recipe.to_dict()
    except ConfigError as error:
        raise RunError(f"{error}; delete the folder {path.parent} to run it again.") from error
    return _difference(_that_matter(old), _that_matter(new))


def recipe_fingerprint(recipe: Recipe) -> str:
    """SHA-256 of all that a recipe says about a run but for where it is written."""
    settings = _that_matter(recipe.to_dict())
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def telling_what_failed(directory: Path) -> Iterator[None]:
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


def _that_matter(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what changes nothing in a run: where it is written, which other runs it is compared with, and
    how often a checkpoint is kept."""
    training = {key: value for key, value in recipe["training"].items() if not key.startswith("save_")}
    return {**recipe, "training": training, "compare": None, "output_dir": None}


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first key in which two recipes differ, with both values; empty when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    return "" if old == new or where == "output_dir" else f"{where} was {shown(old)}, now {shown(new)}"


def _is_passing(entry: Path) -> bool:
    """Whether ``entry`` is the lock, what a kill may have left of a file that was being written, or what ``repair`` has
    put aside."""
    partial = entry.name.startswith(".") and entry.name.endswith(".partial")
    return partial or entry.name == ".lock" or entry.name.startswith("damaged-")

"""Go on from the last undamaged task: put aside what is damaged and what was made from it. Deletes nothing."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import DataError, RunError, RunInUseError
from ..evaluation import AccuracyMatrix
from ..evaluation.matrix import CSV_NAME, JSON_NAME
from ..files.atomic import as_json, checksum, write_text
from ..files.manifest import (
    MANIFEST_FILE,
    METHOD_FILE,
    TASKS_DIRECTORY,
    Damage,
    Ledger,
    StoredFiles,
    advice,
    files_in,
    folder_damages,
    growing,
    read_manifest,
    task_folder,
    task_number,
)
from ..files.paths import given_path
from ..files.yaml_text import YamlTextError, read_yaml
from ..training.checkpoint import checkpoints_in

ALL_TASKS = "all_tasks"
"""Name of the one training of all tasks, where a method trains them so."""
_ASIDE = "damaged"
_METRICS = "metrics.jsonl"
_OF_ALL_TASKS = ("importance.safetensors", "costs.json", _METRICS, "general.json")
"""Files that hold something of each task."""
_STATE = (METHOD_FILE, JSON_NAME, CSV_NAME, "state.json")
"""Files that say how far a run has come."""


@dataclass
class Repair:
    """What ``repair`` did: the ``damages`` that it found, where everything that does not count any more was put
    (``aside``, None where nothing was damaged), and the names of the tasks that are ``kept``."""

    damages: list[Damage]
    aside: Path | None = None
    kept: list[str] = field(default_factory=list)

    def sentences(self, directory: Path) -> Iterator[str]:
        """What a person should know, and what to do next."""
        if self.aside is None:
            yield f"{directory} is whole; nothing was changed."
            return
        for damage in self.damages:
            yield f"damaged: {damage}"
        yield f"put aside, with all that was made from it: {self.aside}"
        after = f"after task {self.kept[-1]}" if self.kept else "from the beginning"
        recipe = directory / "recipe.yaml"
        if (directory / "environment.json").exists() or recipe.exists():
            path = recipe if recipe.exists() else "RECIPE"
            yield f"it goes on {after}: seekr-peft run {shlex.quote(str(path))} --resume"
        else:
            yield f"it goes on {after}: from_pretrained(model, {str(directory)!r})"


def repair(directory: str | Path) -> Repair:
    """Take a run, or what ``save_pretrained`` wrote, back to its last undamaged task.

    Everything that is damaged, and everything that was made after it, is moved into a new folder ``damaged-N`` of
    ``directory``; nothing is deleted. What can be worked out again from what is whole (the accuracy matrix from the
    predictions, the scores of the heads from the tasks' own) costs no task. Of a directory that an earlier version
    wrote, which has no manifests, nothing can be said, and nothing is changed.

    Raises:
        RunError: There is no such directory, or it is in use.
    """
    directory = given_path(directory, "the run directory")
    if not directory.is_dir():
        raise RunError(f"{directory} is no folder; give the output_dir of a run, or what save_pretrained wrote.")
    _check_has_manifests(directory)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        with lock:
            return _repair(directory)
    except Timeout:
        raise RunInUseError(f"{directory} is in use by another process; wait for it.") from None
    except OSError as error:
        raise RunError(f"{error.filename or directory} cannot be changed ({error.strerror}).") from error


def _check_has_manifests(directory: Path) -> None:
    paths = (directory / MANIFEST_FILE, *directory.glob(f"{TASKS_DIRECTORY}/*/{MANIFEST_FILE}"))
    known = directory / METHOD_FILE
    if not any(path.exists() or path.is_symlink() for path in paths) and not (
        known.is_file() and "manifests" in known.read_text(encoding="utf-8", errors="replace")
    ):
        raise RunError(f"{directory} has no {MANIFEST_FILE}, so nothing in it can be checked; give a run directory.")


def verify(directory: str | Path) -> str:
    """Check every stored file of a run, or of what ``save_pretrained`` wrote; a sentence when all are whole.

    Raises:
        RunError: With a line for each damaged file; or nothing there has a manifest.
    """
    directory = given_path(directory, "the run directory")
    damages = list(all_damages(directory)) if directory.is_dir() else []
    if damages:
        what = "1 file is" if len(damages) == 1 else f"{len(damages)} files are"
        lines = [f"{directory}: {what} damaged; {advice(directory)}.", *map(str, damages)]
        raise RunError("\n".join(lines))
    _check_has_manifests(directory)
    return f"{directory}: all {StoredFiles(directory).n_files()} files are what was written."


def _repair(directory: Path) -> Repair:
    damages = list(all_damages(directory))
    if not damages:
        return Repair([])
    bad = {damage.path for damage in damages}
    folders, state = _whole_tasks(directory, bad)
    run = _Run(directory, bad)
    evaluated = min(run.evaluated(), len(folders))
    # What a task's evaluation lacks can only be had from the model right after it, which is the last one.
    folders = folders[: evaluated + 1]
    all_folders = {path.name for path in _numbered(directory / TASKS_DIRECTORY)}
    shortened = len(all_folders) > len(folders)
    keeps_adapter = not shortened and not any(directory / "adapter" in path.parents for path in bad)
    new = {**_new_state(run, state, folders, evaluated), **_shortened(directory, bad, run, folders)}
    stale = {*_STATE, *(_OF_ALL_TASKS if shortened else ())} - new.keys()
    leaving = [
        *(directory / TASKS_DIRECTORY / name for name in sorted(all_folders - {folder.name for folder in folders})),
        *(path for path in _numbered(directory / "predictions") if task_number(path.name) > run.n_seen(evaluated)),
        *_stale_checkpoints(directory, bad, len(folders), shortened),
        *(directory / name for name in _run_files(directory) if name in stale or directory / name in bad),
        *([] if keeps_adapter else [directory / "adapter"]),
        # Of tasks that are gone, what is in their place.
        *(path for path in bad if directory / TASKS_DIRECTORY in path.parents and not path.exists()),
    ]
    aside = _Aside(directory)
    if directory / MANIFEST_FILE in bad:
        aside.move(directory / MANIFEST_FILE)
    # Listed first: broken off at any moment, what is not done yet counts as damaged, and is repaired again.
    Ledger(directory).replace_all(_listed(directory, new, leaving))
    for path in leaving:
        aside.move(path)
    for name, text in new.items():
        # Never missing: a repair that is broken off would take it for lost.
        if _differs(directory / name, text):
            aside.copy(directory / name)
            write_text(directory / name, text)
    return Repair(damages, aside.folder, [folder.name.partition("-")[2] for folder in folders])


def _listed(directory: Path, new: dict[str, str], leaving: list[Path]) -> dict[str, Any]:
    """The new list: what is written anew, and what stays."""
    names = [name for name in _run_files(directory) if name not in new]
    names += [f"adapter/{name}" for name in files_in(directory / "adapter")]
    there = [name for name in names if (directory / name).is_file()]
    stays = [name for name in there if not {directory / name, *(directory / name).parents} & set(leaving)]
    sums: dict[str, Any] = {name: checksum(directory / name) for name in stays}
    for name, text in new.items():
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
        if name == _METRICS:
            sums[name] = growing(sums[name], len(text.encode()))
    return sums


def all_damages(directory: Path) -> Iterator[Damage]:
    """Every damaged file of a directory, those of its checkpoints too."""
    found = list(StoredFiles(directory).damages())
    yield from found
    # Where the list itself was lost, what cannot be read at all is damaged.
    yield from (damage for damage in _unreadable(directory) if damage.path not in {each.path for each in found})
    for folder in sorted((directory / "checkpoints").glob("*")):
        for checkpoint in checkpoints_in(folder):
            yield from folder_damages(checkpoint)


def _unreadable(directory: Path) -> Iterator[Damage]:
    for name in ("tasks.json", "state.json", "costs.json", "general.json", "environment.json", JSON_NAME, METHOD_FILE):
        path = directory / name
        try:
            if path.exists():
                json.loads(_text(path))
        except (DataError, ValueError, RecursionError) as error:
            yield Damage(path, f"cannot be read ({' '.join(str(error).split())[:100]})")
    path = directory / "recipe.yaml"
    try:
        if path.exists():
            read_yaml(path, controls=True)
    except (YamlTextError, OSError) as error:
        yield Damage(path, f"cannot be read ({' '.join(str(error).split())[:100]})")


class _Run:
    """What the whole ones of a run's files say about its evaluations; nothing in what is no run."""

    def __init__(self, directory: Path, bad: set[Path]) -> None:
        self.directory = directory
        self._bad = bad
        self.facts = self._object("tasks.json")
        self.state = self._object("state.json")
        self.matrix = self._matrix()

    def names(self) -> list[str]:
        """All tasks of the sequence, as far as they are known."""
        if isinstance(self.state, dict):
            return list(self.state["tasks"])
        if isinstance(self.facts, list):
            return [fact["name"] for fact in self.facts]
        return list(self.matrix.task_names) if self.matrix else []

    def evaluated(self) -> int:
        """After how many trainings all tasks seen so far have a score."""
        if self.matrix is None:
            # No run: nothing was to be evaluated.
            return len(_numbered(self.directory / TASKS_DIRECTORY)) if not self._is_run() else 0
        names = self.matrix.task_names
        if self.is_joint():
            return int(self._is_complete(len(names)))
        return next((count for count in range(len(names)) if not self._is_complete(count + 1)), len(names))

    def n_seen(self, evaluated: int) -> int:
        """How many tasks were seen by the end of the first ``evaluated`` trainings."""
        return len(self.names()) if self.is_joint() and evaluated else evaluated

    def _is_complete(self, n_tasks: int) -> bool:
        """Whether there is a score of each of the first ``n_tasks`` tasks after the last of them."""
        assert self.matrix is not None
        names = self.matrix.task_names[:n_tasks]
        return all(self.matrix.score(after=names[-1], on=name) is not None for name in names)

    def is_joint(self) -> bool:
        """Whether the tasks are trained all at once."""
        return (self.directory / TASKS_DIRECTORY / f"01-{ALL_TASKS}").is_dir()

    def _is_run(self) -> bool:
        return any((self.directory / name).exists() for name in ("environment.json", "recipe.yaml", "state.json"))

    def _object(self, name: str) -> Any:
        path = self.directory / name
        return json.loads(_text(path)) if path.is_file() and path not in self._bad else None

    def _matrix(self) -> AccuracyMatrix | None:
        """As it is stored, or worked out again from the predictions, as far as they go."""
        if (self.directory / JSON_NAME).is_file() and self.directory / JSON_NAME not in self._bad:
            return AccuracyMatrix.load(self.directory)
        names = self.names() if self.state or self.facts else []
        if not names:
            return None
        matrix = AccuracyMatrix(names)
        for folder in _numbered(self.directory / "predictions"):
            for path in _numbered(folder):
                if path not in self._bad:
                    scores = [json.loads(line)["score"] for line in _text(path).splitlines()]
                    matrix.record(
                        after=names[task_number(folder.name) - 1],
                        on=names[task_number(path.name) - 1],
                        score=sum(scores) / len(scores),
                    )
        return matrix


def _whole_tasks(directory: Path, bad: set[Path]) -> tuple[list[Path], dict[str, Any]]:
    """The folders of the first tasks, as far as each is whole and made from those before it; and what ``method.json``
    says, or the last manifest."""
    folders: list[Path] = []
    sums: list[str] = []
    state: dict[str, Any] = {}
    for number, folder in enumerate(_numbered(directory / TASKS_DIRECTORY), start=1):
        if task_number(folder.name) != number or any(folder in path.parents for path in bad):
            break
        if next(folder_damages(folder), None) is not None:
            break
        manifest = read_manifest(folder)
        made_from = manifest["made_from"]
        if made_from["earlier"] != sums or folder.name != task_folder(directory, number - 1, manifest["task"]).name:
            break
        state = made_from["method"]
        folders.append(folder)
        sums.append(checksum(folder / MANIFEST_FILE))
    return folders, state


def _new_state(run: _Run, state: dict[str, Any], folders: list[Path], evaluated: int) -> dict[str, str]:
    """Which tasks are trained and how they were scored: method.json, the matrix and state.json, by name."""
    new: dict[str, str] = {}
    if folders:
        names = [folder.name.partition("-")[2] for folder in folders]
        sums = [checksum(folder / MANIFEST_FILE) for folder in folders]
        new[METHOD_FILE] = as_json({**state, "tasks": names, "manifests": sums})
    if run.matrix is None or not evaluated:
        return new
    everything = run.matrix.task_names
    finished = run.n_seen(evaluated)
    kept = AccuracyMatrix(everything)
    for after in everything[-1:] if run.is_joint() else everything[:evaluated]:
        for on in everything:
            score = run.matrix.score(after=after, on=on)
            if score is not None:
                kept.record(after=after, on=on, score=score)
    # A run that is finished is not looked at again; this one writes anew what it lacks.
    facts = {"finished_tasks": finished, "tasks": everything, "last_finished": everything[finished - 1]}
    return {**new, **kept.files(), "state.json": as_json({**facts, "status": "running"})}


def _shortened(directory: Path, bad: set[Path], run: _Run, folders: list[Path]) -> dict[str, str]:
    """The files that hold something of each task, cut to the tasks that are kept."""
    new: dict[str, str] = {}
    costs = directory / "costs.json"
    if costs.is_file() and costs not in bad and folders:
        new["costs.json"] = as_json({"tasks": json.loads(_text(costs))["tasks"][: len(folders)]})
    general = directory / "general.json"
    if general.is_file() and general not in bad:
        record = json.loads(_text(general))
        seen = ["", *(run.matrix.task_names if run.matrix else [])][: min(run.evaluated(), len(folders)) + 1]
        keep = [after for after in record["after"] if after in seen]
        values = {name: measured[: len(keep)] for name, measured in record["values"].items()}
        new["general.json"] = as_json({**record, "after": keep, "values": values})
    metrics = directory / _METRICS
    if metrics.is_file() and metrics not in bad:
        lines = _text(metrics).splitlines(keepends=True)
        # The task after them may go on from a checkpoint; the run itself cuts what it will train again.
        new[_METRICS] = "".join(line for line in lines if _task_index(line) <= len(folders))
    return new


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or _text(path) != text


def _task_index(line: str) -> float:
    try:
        return float(json.loads(line)["task_index"])
    except (ValueError, TypeError, KeyError):
        # Half a line, which a kill left.
        return float("inf")


def _stale_checkpoints(directory: Path, bad: set[Path], n_tasks: int, shortened: bool) -> Iterator[Path]:
    for folder in sorted((directory / "checkpoints").glob("*")):
        if shortened and task_number(folder.name) != n_tasks + 1:
            yield folder
        else:
            yield from (path for path in checkpoints_in(folder) if any(path in file.parents for file in bad))


def _run_files(directory: Path) -> list[str]:
    """Names of all files directly in ``directory`` that a run or a method writes, and of those that it lists."""
    listed: set[str] = set()
    try:
        files, announced = Ledger(directory).read()
        listed = {*files, *announced}
    except RunError:
        pass
    listed |= {*_STATE, *_OF_ALL_TASKS, "tasks.json", "recipe.yaml", "environment.json"}
    return sorted(name for name in listed if name.partition("/")[0] not in (TASKS_DIRECTORY, "adapter", MANIFEST_FILE))


class _Aside:
    """Moves and copies files and folders into ``damaged-N``, under the names that they had."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        taken = {path.name for path in directory.glob(f"{_ASIDE}-*")}
        self.folder = directory / next(name for n in range(1, 10**6) if (name := f"{_ASIDE}-{n}") not in taken)
        self.folder.mkdir()

    def copy(self, path: Path) -> None:
        if path.is_file():
            target = self.folder / path.relative_to(self._directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def move(self, path: Path) -> None:
        if not path.exists() and not path.is_symlink():
            # What it should lie in may be a link to nowhere, or a file.
            inside = [parent for parent in path.parents if self._directory in parent.parents]
            path = next((parent for parent in inside if parent.is_symlink() or parent.is_file()), path)
        if path.exists() or path.is_symlink():
            target = self.folder / path.relative_to(self._directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def _numbered(folder: Path) -> list[Path]:
    """Entries of ``folder`` that begin with a task's number, in its order."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else []) if task_number(path.name)]
    return sorted(found, key=lambda path: (task_number(path.name), path.name))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error

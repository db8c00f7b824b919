"""Reads one run directory into a ``RunRecord``, without torch.

Only state.json and (once a task is finished) accuracy_matrix.json must be there. Whatever else is
missing is ``None`` or empty in the record, so that a run of any method, stopped at any point, can be
shown; but a file that the run's manifests list must be what was written.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError, printable
from ..evaluation.matrix import backward_transfer, overall_performance
from ..files.manifest import StoredFiles
from ..files.paths import given_path
from ..files.yaml_text import YamlTextError, read_yaml
from ..loss_names import logged_terms

_READ = (
    "state.json",
    "environment.json",
    "accuracy_matrix.json",
    "recipe.yaml",
    "importance.safetensors",
    "metrics.jsonl",
    "general.json",
)


@dataclass(frozen=True)
class TaskMemory:
    """What memory.json says about one task's replay memory; losses and entropies in nats."""

    n_samples: int
    bytes: int
    estimated_bytes: int | None = None
    teacher_loss: float | None = None
    answer_entropy: float | None = None
    worth_imitating: bool | None = None
    selection: dict[int, list[int]] | None = None
    queries_per_sample: int | None = None
    row_top_k: int | None = None
    logit_top_k: int | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether anything is known about this task's teacher."""
        known = (self.teacher_loss, self.answer_entropy, self.worth_imitating)
        return any(value is not None for value in known)


@dataclass(frozen=True)
class HeadImportance:
    """Importance accumulated to the last task, (n_layers, n_heads) float32, and the heads chosen
    per task index.
    """

    importance: np.ndarray
    selected: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def last_selected(self) -> tuple[int, np.ndarray] | None:
        """(task index, (n_layers, n_heads) bool) of the last task that has a selection."""
        if not self.selected:
            return None
        last = max(self.selected)
        return last, self.selected[last]


@dataclass(frozen=True)
class GeneralCurve:
    """One test of general ability. ``values`` is (n,) float64, before the first task and after each of the tasks up to
    the last measurement, NaN where there is none: a fraction right of multiple choice ('choice'), or nats per token of
    a 'text'.
    """

    name: str
    kind: str
    values: np.ndarray

    @property
    def shown(self) -> np.ndarray:
        """``values`` as they are shown: fractions in percent."""
        return self.values if self.kind == "text" else 100 * self.values

    def words(self) -> str:
        """The values before the first task and at the last measurement, and how far they are apart."""
        if not self.values.size:
            return f"{self.name} not measured"
        base, last = self.shown[0], self.shown[-1]
        if self.kind == "text":
            start, end, change = f"{base:.3f} nats per token", f"{last:.3f}", f"{last - base:+.3f}"
        else:
            start, end, change = f"{base:.1f} % right", f"{last:.1f} %", f"{last - base:+.1f} points"
        start = f"{self.name} {start} at first"
        return start if self.values.size == 1 else f"{start}, {end} after task {self.values.size - 1} ({change})"


@dataclass(frozen=True)
class RunRecord:
    """One run directory. ``scores`` is (K, K) float64: task i after training task j, NaN where not
    measured.
    """

    directory: Path
    tasks: list[str]
    n_finished: int
    status: str
    scores: np.ndarray
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    seconds: float | None = None
    memories: dict[int, TaskMemory] = field(default_factory=dict)
    heads: HeadImportance | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    general: list[GeneralCurve] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's name in the recipe, or 'unknown method'."""
        method = self.recipe.get("method")
        name = method.get("name") if isinstance(method, dict) else method
        return str(name) if name else "unknown method"

    @property
    def n_scored(self) -> int:
        """How many tasks OP and BWT cover: up to the last column that holds a score."""
        columns = np.flatnonzero(np.isfinite(self.scores).any(axis=0))
        return int(columns[-1]) + 1 if columns.size else 0

    @property
    def op(self) -> float | None:
        """Mean of the last scored column over the tasks up to it; None while one of them is
        missing.
        """
        last = self.scores[: self.n_scored, self.n_scored - 1] if self.n_scored else np.array([])
        return overall_performance(last.tolist()) if last.size and np.isfinite(last).all() else None

    @property
    def bwt(self) -> float | None:
        """Mean change of the earlier tasks since each was learnt; None for one task or without a
        diagonal.
        """
        count = self.n_scored
        if count < 2:
            return None
        last, own = self.scores[: count - 1, count - 1], np.diag(self.scores)[: count - 1]
        known = bool(np.isfinite(last).all() and np.isfinite(own).all())
        return backward_transfer(last.tolist(), own.tolist()) if known else None

    def loss_terms(self) -> list[str]:
        """The logged terms of the loss that have a number, the new task's first."""
        return logged_terms(
            key for line in self.metrics for key, value in line.items() if isinstance(value, int | float)
        )

    def loss_series(self, term: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Task index -> (optimizer steps over the whole sequence, values) of one loss term."""
        starts = self.task_starts()
        series: dict[int, tuple[list[float], list[float]]] = {}
        for line in self.metrics:
            value = line.get(term)
            if isinstance(value, int | float):
                steps, values = series.setdefault(line["task_index"], ([], []))
                steps.append(starts[line["task_index"]] + line["step"])
                values.append(float(value))
        return {index: (np.array(x), np.array(y)) for index, (x, y) in series.items()}

    def stages(self) -> list[str]:
        """What was trained one after another: the tasks, or the one training of all of them."""
        trained = {line["task_index"]: str(line.get("task", "")) for line in self.metrics}
        if set(trained) == {0} and trained[0] not in ("", *self.tasks):
            return [trained[0]]
        return self.tasks

    def task_starts(self) -> list[int]:
        """Optimizer steps done before each stage, then the total: one more than there are stages."""
        lengths = [0] * len(self.stages())
        for line in self.metrics:
            lengths[line["task_index"]] = max(lengths[line["task_index"]], line["step"])
        return [0, *np.cumsum(lengths).tolist()]


def read_run(run_directory: str | Path) -> RunRecord:
    """Read a run directory; raises RunError naming the file when it is not one or a file in it is
    broken.
    """
    directory = given_path(run_directory, "the run directory")
    if not directory.is_dir():
        raise RunError(f"there is no run directory at {directory}: give the output_dir of a `seekr-peft run`")
    if not (directory / "state.json").is_file():
        raise RunError(
            f"{directory} is not a run directory, it has no state.json: give the output_dir of a `seekr-peft run`"
        )
    stored = StoredFiles(directory)
    stored.check(*(directory / name for name in _READ), directory / "method.json")
    stored.check(*(path for path in stored.listed() if path.name == "memory.json"))
    tasks, n_finished, status = _read_state(directory / "state.json")
    environment = _read_object(directory / "environment.json", required=False)
    seconds = environment.get("seconds")
    return RunRecord(
        directory=directory,
        tasks=tasks,
        n_finished=n_finished,
        status=status,
        scores=_read_scores(directory / "accuracy_matrix.json", tasks, n_finished),
        recipe=_read_recipe(directory / "recipe.yaml"),
        versions=_as_mapping(environment.get("versions")),
        machine=_as_mapping(environment.get("machine")),
        command=environment.get("command"),
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        memories=_read_memories(directory / "tasks", len(tasks)),
        heads=_read_heads(directory / "importance.safetensors", len(tasks)),
        metrics=_read_metrics(directory / "metrics.jsonl", len(tasks)),
        general=_read_general(directory / "general.json", tasks),
    )


def read_predictions(run: RunRecord, after: int, on: int) -> list[dict[str, Any]]:
    """The prediction lines of task ``on`` after training task ``after`` (0-based); empty when not
    stored.
    """
    stored, folder = StoredFiles(run.directory), run.directory / "predictions"
    wanted = [path for path in stored.listed() if path.parent.parent == folder]
    stored.check(*(path for path in wanted if (_number(path.parent.name), _number(path.name)) == (after, on)))
    for folder in _numbered(run.directory / "predictions", len(run.tasks)).get(after, []):
        for path in _numbered(folder, len(run.tasks)).get(on, []):
            return _read_lines(path)
    return []


def shorten(text: str, limit: int) -> str:
    """The text on one line, cut to ``limit`` characters with an ellipsis."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: max(limit - 1, 1)].rstrip() + "…"


def numbered_names(tasks: list[str], limit: int) -> list[str]:
    """'1 name', '2 other', ...: labels that stay different when long names are cut alike."""
    return [shorten(f"{number} {name}", limit) for number, name in enumerate(tasks, 1)]


def _read_state(path: Path) -> tuple[list[str], int, str]:
    state = _read_object(path)
    tasks, finished = state.get("tasks"), state.get("finished_tasks")
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks) or not tasks:
        raise RunError(f"{path} must list the task names under 'tasks', found {tasks!r}: run again")
    if not isinstance(finished, int) or not 0 <= finished <= len(tasks):
        raise RunError(f"{path} must give 'finished_tasks' between 0 and {len(tasks)}, found {finished!r}: run again")
    return tasks, finished, str(state.get("status", "unknown"))


def _read_scores(path: Path, tasks: list[str], n_finished: int) -> np.ndarray:
    scores = np.full((len(tasks), len(tasks)), np.nan)
    if n_finished == 0 and not path.is_file():
        return scores
    content = _read_object(path)
    names, rows = content.get("tasks"), content.get("scores")
    if not isinstance(names, list) or names != tasks[: len(names)]:
        raise RunError(
            f"{path} has the tasks {names!r} where state.json has {tasks!r}: "
            "the two files come from different runs, restore the one that was changed"
        )
    if not isinstance(rows, list) or len(rows) != len(names):
        raise RunError(f"{path} must have one row of 'scores' per task ({len(names)}): run again")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise RunError(f"{path} must have {len(names)} entries in row {i} of 'scores': run again")
        scores[i, : len(names)] = [_score(value, path, i, j) for j, value in enumerate(row)]
    return scores


def _score(value: Any, path: Path, i: int, j: int) -> float:
    if value is None:
        return math.nan
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isnan(value) or 0 <= value <= 1):
        raise RunError(
            f"{path} has the score {value!r} in row {i}, column {j}: a score is a fraction between 0 and 1, or null"
        )
    return float(value)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _as_mapping(read_yaml(path, controls=True))
    except YamlTextError as error:
        raise RunError(f"{path} {str(error).rstrip('.')}; correct it or remove it.") from error


def _read_general(path: Path, tasks: list[str]) -> list[GeneralCurve]:
    content = _read_object(path, required=False)
    try:
        # "" stands for the model before the first task.
        places = [["", *tasks].index(name) for name in content.get("after", [])]
        curves = []
        for test in content.get("tests", []):
            values = np.full(max(places, default=-1) + 1, np.nan)
            values[places] = [math.nan if value is None else value for value in content["values"][test["name"]]]
            curves.append(GeneralCurve(test["name"], test["kind"], values))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} does not hold tests of general ability after these tasks ({type(error).__name__}: {error}): "
            "remove it, or run again"
        ) from error
    return curves


def _read_memories(tasks_folder: Path, n_tasks: int) -> dict[int, TaskMemory]:
    memories = {}
    for index, folders in _numbered(tasks_folder, n_tasks).items():
        path = folders[0] / "memory.json"
        if path.is_file():
            memories[index] = _task_memory(_read_object(path), path)
    return memories


def _task_memory(content: dict[str, Any], path: Path) -> TaskMemory:
    teacher = _as_mapping(content.get("teacher"))
    selection = content.get("selection")
    try:
        return TaskMemory(
            n_samples=int(content["n_samples"]),
            bytes=int(content["bytes"]),
            estimated_bytes=content.get("estimated_bytes"),
            teacher_loss=teacher.get("loss"),
            answer_entropy=teacher.get("answer_entropy"),
            worth_imitating=teacher.get("worth_imitating"),
            selection=None if selection is None else {int(layer): list(heads) for layer, heads in selection.items()},
            queries_per_sample=content.get("queries_per_sample"),
            row_top_k=content.get("row_top_k"),
            logit_top_k=content.get("logit_top_k"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} is not a memory description ({type(error).__name__}: {error}): "
            "remove the task's folder and run again"
        ) from error


def _read_heads(path: Path, n_tasks: int) -> HeadImportance | None:
    if not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise RunError(f"{path} is not a safetensors file ({error}): remove it, run again") from error
    importance = tensors.get("importance")
    if importance is None or importance.ndim != 2:
        return None
    selected = {}
    for name, tensor in tensors.items():
        index = _number(name.removeprefix("selected."))
        if name.startswith("selected.") and index is not None and index < n_tasks:
            selected[index] = tensor.astype(bool)
    return HeadImportance(importance.astype(np.float32), selected)


def _read_metrics(path: Path, n_tasks: int) -> list[dict[str, Any]]:
    """One dict a logging step; a task begun again after a stop keeps only its last pass."""
    kept: list[dict[str, Any]] = []
    for line in _read_lines(path) if path.is_file() else []:
        index, step = line.get("task_index"), line.get("step")
        if not isinstance(index, int) or not isinstance(step, int) or not 0 <= index < n_tasks:
            raise RunError(
                f"{path} has a line with task_index {index!r} and step {step!r}: "
                f"both must be whole numbers and task_index below {n_tasks}; remove the line"
            )
        while kept and kept[-1]["task_index"] == index and kept[-1]["step"] > step:
            kept.pop()
        if kept and (kept[-1]["task_index"], kept[-1]["step"]) == (index, step):
            # Terms of one step may come in several lines, for instance the loss and then the replay
            # terms.
            line = {**kept.pop(), **line}
        kept.append(line)
    return kept


def _read_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    # The piece after the last newline is a line that is still being written, or was cut off by a
    # stop.
    parsed = [parse(line, f"{path}, line {n}") for n, line in enumerate(lines[:-1], 1) if line.strip()]
    with suppress(json.JSONDecodeError):
        parsed += [json.loads(lines[-1])] if lines[-1].strip() else []
    return [line for line in parsed if isinstance(line, dict)]


def _read_object(path: Path, required: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise RunError(f"{path} is missing though a task is finished: restore it or run again")
        return {}
    content = parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(content, dict):
        raise RunError(f"{path} must hold a JSON object, found {type(content).__name__}: run again")
    return content


def parse(text: str, place: str) -> Any:
    """The JSON in a text; raises RunError naming its place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{place} is not valid JSON ({error}): restore the file or run again") from error


def _as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(name: str) -> int | None:
    """'03-name' -> 2; None for a name without a number in front."""
    head = name.split("-", 1)[0]
    return int(head) - 1 if head.isdecimal() and int(head) > 0 else None


def _numbered(folder: Path, n_tasks: int) -> dict[int, list[Path]]:
    """0-based task index -> the entries of a folder that begin with its number."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        index = _number(path.name)
        if index is not None and index < n_tasks:
            found.setdefault(index, []).append(path)
    return found

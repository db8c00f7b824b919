"""The accuracy matrix of a task sequence, and what is read off it: OP, BWT, forgetting.

a[i, j] is the score of task i after training task j.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, listed, shown, suggestion
from ..files.atomic import write_text
from ..tasks.table_files import read_text

if TYPE_CHECKING:
    from rich.table import Table

FORMULAS = {
    "a[i,j]": "score of task i after training task j, from 0 to 1; K = the last trained task",
    "op": "OP = 1/K * sum over i<=K of a[i,K]",
    "bwt": "BWT = 1/(K-1) * sum over i<K of (a[i,K] - a[i,i]); 0 for K = 1",
    "bwt_divided_by_all_tasks": "1/K * sum over i<K of (a[i,K] - a[i,i])",
    "forgetting": (
        "1/(K-1) * sum over i<K of (max over i<=j<K of a[i,j] - a[i,K]); 0 for K = 1 (Chaudhry et al. 2018)"
    ),
}
"""How each figure is computed; print it with the figure."""

JSON_NAME = "accuracy_matrix.json"
CSV_NAME = "accuracy_matrix.csv"


class AccuracyMatrix:
    """Scores a[i, j] of task i after training task j; tasks keep the order they are trained in.

    A score of a task that was not trained yet (i > j) is stored apart; no figure uses it.

    Args:
        task_names: different names, in the order of training.

    Raises:
        DataError: no names, a repeated name, or a name that is no non-empty string.
    """

    def __init__(self, task_names: Iterable[str]) -> None:
        names = [] if isinstance(task_names, str) else list(task_names)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"The task names are {shown(task_names)}; give a list of non-empty strings.")
        if len(set(names)) < len(names):
            raise DataError(f"The task names {shown(names)} repeat one; each task has its own name.")
        self.task_names: tuple[str, ...] = tuple(names)
        self._scores: dict[tuple[int, int], float] = {}
        self._before_training: dict[tuple[int, int], float] = {}

    def __repr__(self) -> str:
        return f"AccuracyMatrix({list(self.task_names)!r}, {len(self._scores)} scores)"

    @property
    def scores(self) -> list[list[float | None]]:
        """Rows = tasks, columns = after training task j; None = not recorded or not trained yet."""
        return self._square(self._scores)

    def record(self, *, after: str, on: str, score: float) -> None:
        """Store the score of task ``on`` after training task ``after``; a later record replaces it.

        Raises:
            DataError: an unknown task, or a score that is no finite number from 0 to 1.
        """
        cell = self._index(on), self._index(after)
        value = _checked_score(score, f"of task '{on}' after '{after}'")
        scores = self._scores if cell[0] <= cell[1] else self._before_training
        scores[cell] = value

    def score(self, *, after: str, on: str) -> float | None:
        """The recorded score of ``on`` after training ``after``; None = not recorded."""
        cell = self._index(on), self._index(after)
        return (self._scores if cell[0] <= cell[1] else self._before_training).get(cell)

    def retention(self, task: str) -> list[tuple[str, float]]:
        """Pairs (task trained last, score of ``task``), from its own training on."""
        row = self.scores[self._index(task)]
        pairs = zip(self.task_names, row, strict=True)
        return [(after, score) for after, score in pairs if score is not None]

    def op(self, after: str | None = None) -> float:
        """Overall performance: the mean score of all trained tasks, after training ``after``.

        Args:
            after: None = the last task after which all tasks up to it are recorded.

        Raises:
            DataError: that column is not complete, or none is.
        """
        last = self._last(after)
        return overall_performance([self._scores[i, last] for i in range(last + 1)])

    def bwt(self, after: str | None = None) -> float:
        """Backward transfer: mean change of the earlier tasks since their training.

        Forgetting makes it negative; with one trained task it is 0.0. Arguments and errors as ``op``,
        and a DataError when the score of a task right after its own training is missing.
        """
        last = self._last(after)
        return backward_transfer([self._scores[i, last] for i in range(last)], [self._own(i) for i in range(last)])

    def bwt_divided_by_all_tasks(self, after: str | None = None) -> float:
        """The sum of ``bwt`` divided by K, not K - 1: the figure of SEEKR's released script."""
        last = self._last(after)
        return self.bwt(after) * last / (last + 1)

    def forgetting(self, after: str | None = None) -> float:
        """Mean fall of the earlier tasks from their best score before (Chaudhry et al. 2018).

        With one trained task 0.0. Arguments and errors as ``bwt``.
        """
        last = self._last(after)
        falls = []
        for i in range(last):
            self._own(i)
            earlier = [self._scores[i, j] for j in range(i, last) if (i, j) in self._scores]
            falls.append(max(earlier) - self._scores[i, last])
        return _mean(falls)

    def to_dict(self) -> dict[str, Any]:
        """Tasks, scores, figures (None: not known yet) and their formulas, ready for JSON."""
        data: dict[str, Any] = {"tasks": list(self.task_names), "scores": self.scores}
        if self._before_training:
            data["scores_before_training"] = self._square(self._before_training)
        for name in ("op", "bwt", "bwt_divided_by_all_tasks", "forgetting"):
            data[name] = self._figure(name)
        data["formulas"] = dict(FORMULAS)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix that ``to_dict`` made; figures are computed anew, not read.

        Raises:
            DataError: missing keys, another shape than tasks x tasks, or a bad score.
        """
        if not isinstance(data, Mapping) or "tasks" not in data or "scores" not in data:
            raise DataError("An accuracy matrix has the keys 'tasks' and 'scores'; one is missing.")
        matrix = cls(data["tasks"])
        for key in ("scores", "scores_before_training"):
            if data.get(key) is not None:
                matrix._record_square(key, data[key])
        return matrix

    def save(self, directory: str | Path) -> None:
        """Write accuracy_matrix.json and accuracy_matrix.csv; each is replaced as a whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            write_text(directory / name, text)

    def files(self) -> dict[str, str]:
        """The texts of accuracy_matrix.json and accuracy_matrix.csv, by name."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return {JSON_NAME: text + "\n", CSV_NAME: self._csv()}

    @classmethod
    def load(cls, directory: str | Path) -> AccuracyMatrix:
        """Read accuracy_matrix.json of a directory.

        Raises:
            DataError: the file is missing or is no accuracy matrix; names the file.
        """
        path = Path(directory) / JSON_NAME
        text = read_text(path)
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, DataError) as error:
            raise DataError(f"{path} is not an accuracy matrix: {error}") from error

    def to_rich_table(self) -> Table:
        """A table for the terminal, in percent: the scores, then each figure after each task."""
        from rich.table import Table
        from rich.text import Text

        def cells(values: Iterable[float | None]) -> list[str]:
            return ["" if value is None else f"{100 * value:.1f}" for value in values]

        table = Table(title="Score in % after training each task")
        table.add_column("task")
        for name in self.task_names:
            # Text, because a name in square brackets would be read as markup.
            table.add_column(Text(name), justify="right")
        for name, row in zip(self.task_names, self.scores, strict=True):
            table.add_row(Text(name), *cells(row))
        table.add_section()
        for figure in ("op", "bwt", "forgetting"):
            values = cells(self._figure(figure, name) for name in self.task_names)
            table.add_row(figure.upper() if len(figure) < 4 else figure, *values)
        return table

    def _index(self, name: str) -> int:
        if name not in self.task_names:
            raise DataError(
                f"The task {shown(name)} is not in the accuracy matrix; its tasks are "
                f"{listed(self.task_names)}{suggestion(name, self.task_names)}."
            )
        return self.task_names.index(name)

    def _missing(self, column: int) -> list[str]:
        """Tasks up to ``column`` without a score after it."""
        return [self.task_names[i] for i in range(column + 1) if (i, column) not in self._scores]

    def _last(self, after: str | None) -> int:
        """The column to read the figures from."""
        if after is not None:
            missing = self._missing(self._index(after))
            if missing:
                raise DataError(f"After '{after}' no score is recorded of {', '.join(missing)}.")
            return self._index(after)
        complete = [j for j in range(len(self.task_names)) if not self._missing(j)]
        if not complete:
            raise DataError(
                "The accuracy matrix has no complete column: after no task are all tasks up to it recorded."
            )
        return complete[-1]

    def _own(self, i: int) -> float:
        name = self.task_names[i]
        if (i, i) not in self._scores:
            raise DataError(f"The score of task '{name}' right after its training is not recorded.")
        return self._scores[i, i]

    def _figure(self, name: str, after: str | None = None) -> float | None:
        """A figure, or None where it is not known yet."""
        try:
            return getattr(self, name)(after)
        except DataError:
            return None

    def _square(self, scores: Mapping[tuple[int, int], float]) -> list[list[float | None]]:
        size = range(len(self.task_names))
        return [[scores.get((i, j)) for j in size] for i in size]

    def _record_square(self, key: str, rows: Any) -> None:
        size = len(self.task_names)
        lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        if not lists or [len(row) for row in rows] != [size] * size:
            raise DataError(f"'{key}' is not a list of {size} rows of {size} scores.")
        for on, row in zip(self.task_names, rows, strict=True):
            for after, score in zip(self.task_names, row, strict=True):
                if score is not None:
                    self.record(after=after, on=on, score=score)

    def _csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["task", *(f"after {name}" for name in self.task_names)])
        for name, row in zip(self.task_names, self.scores, strict=True):
            writer.writerow([name, *("" if score is None else repr(score) for score in row)])
        return buffer.getvalue()


def overall_performance(last: Sequence[float]) -> float:
    """OP: the mean of the trained tasks' scores after the last of them."""
    return _mean(last)


def backward_transfer(last: Sequence[float], own: Sequence[float]) -> float:
    """BWT: the mean change of the earlier tasks' scores, from ``own`` right after each was trained to ``last``; 0.0
    where there is no earlier task."""
    return _mean([after - before for after, before in zip(last, own, strict=True)])


def _checked_score(score: Any, what: str) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise DataError(f"The score {what} is {shown(score)}, not a number from 0 to 1.") from error
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise DataError(f"The score {what} is {shown(value)}; it must be a finite number from 0 to 1.")
    return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0

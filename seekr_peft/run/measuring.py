"""What a model can do between two trainings of a run: its score on each task seen so far, and its general ability."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import AccuracyMatrix, evaluate_task
from ..evaluation.general import GeneralTest
from ..recipe import Recipe, general_tests
from ..tasks import Task
from ..training.trainer import forget_preparation
from .directory import GENERAL_FILE, PREDICTIONS, RunDirectory
from .progress import RunProgress


@dataclass(frozen=True)
class LoadedModel:
    """The ``model`` of a run with its adapter, its ``tokenizer``, and how many tokens a sample may have."""

    model: Any
    tokenizer: Any
    max_length: int


class Measuring:
    """Measures the model that is ``loaded``, and writes what it finds into ``directory``.

    ``precision`` makes the context in which the model computes, as in a training.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaded: LoadedModel,
        precision: Callable[[], Any],
        directory: RunDirectory,
        progress: RunProgress,
    ) -> None:
        self._recipe = recipe
        self._loaded = loaded
        self._precision = precision
        self._directory = directory
        self._progress = progress

    def evaluate(self, seen: Sequence[Task], matrix: AccuracyMatrix) -> None:
        """Score all tasks ``seen`` after the last of them: predictions first, then the ``matrix``."""
        after = seen[-1].name
        folder = self._directory.path / PREDICTIONS / f"{len(seen):02d}-{after}"
        folder.mkdir(parents=True, exist_ok=True)
        forget_preparation(self._loaded.model)
        bar = self._progress.start(f"evaluating after {after}", len(seen))
        for number, task in enumerate(seen, start=1):
            score, predictions = self._answers(task)
            matrix.record(after=after, on=task.name, score=score)
            lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
            name = f"{number:02d}-{task.name}.jsonl"
            self._directory.ledger.write_text(f"{PREDICTIONS}/{folder.name}/{name}", "\n".join(lines) + "\n")
            self._progress.update(bar, number)
        self._progress.finish(bar)
        for name, text in matrix.files().items():
            self._directory.ledger.write_text(name, text)
        scores = "  ".join(f"{task.name} {100 * (matrix.score(after=after, on=task.name) or 0):.1f}" for task in seen)
        self._progress.say(f"  after {after}: {scores}")

    def _answers(self, task: Task) -> tuple[float, list[dict[str, Any]]]:
        section = self._recipe.evaluation
        with self._precision():
            evaluation = evaluate_task(
                self._loaded.model,
                self._loaded.tokenizer,
                task,
                max_new_tokens=section.max_new_tokens,
                batch_size=section.batch_size,
                max_length=self._loaded.max_length,
                check_answers=False,
            )
        return evaluation.score, evaluation.predictions

    def general_ability(self, after: str) -> None:
        """Add the tests of general ability after task ``after`` ("": before the first) to general.json.

        A value that an earlier session measured stays; one that is not finite (a diverged model's loss) is null.
        """
        tests = general_tests(self._recipe)
        if not tests:
            return
        record = self._directory.read_object(GENERAL_FILE) or {
            "tests": [test.to_dict() for test in tests],
            "after": [],
            "values": {test.name: [] for test in tests},
        }
        if after not in record["after"]:
            record["after"].append(after)
            for values in record["values"].values():
                values.append(None)
        place = record["after"].index(after)
        bar = self._progress.start("measuring general ability", len(tests))
        for number, test in enumerate(tests, start=1):
            if record["values"][test.name][place] is None:
                value = self._value(test)
                record["values"][test.name][place] = value if math.isfinite(value) else None
                self._directory.ledger.write_json(GENERAL_FILE, record)
            self._progress.update(bar, number)
        self._progress.finish(bar)
        values = "  ".join(test.describe(record["values"][test.name][place]) for test in tests)
        self._progress.say(f"  general ability {f'after {after}' if after else 'before the first task'}: {values}")

    def _value(self, test: GeneralTest) -> float:
        section = self._recipe.evaluation
        with self._precision():
            return test.measure(
                self._loaded.model,
                self._loaded.tokenizer,
                n_questions=section.general_samples,
                max_tokens=section.general_tokens,
                batch_size=section.batch_size,
                max_length=self._loaded.max_length,
            )

"""One task of a sequence: its name, its training and test samples, and how answers are scored.

`Task` is made from records, JSON-lines files or Hugging Face datasets. Imports `seekr_peft.errors`,
`tasks.samples` and `tasks.tokenize`; `datasets` only inside functions, so that reading a recipe
stays cheap.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seekr_peft.errors import DataError
from seekr_peft.tasks.samples import (
    Field,
    check_name,
    checked_row,
    dataset_of,
    read_json_lines,
    suggestion,
)
from seekr_peft.tasks.tokenize import encode, prepare_tokenizer, prompt_room_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

METRICS = ("accuracy", "option_letter", "rougeL")
"""The metrics a task may name; `seekr_peft.evaluation.metrics` defines them."""


@dataclass(frozen=True)
class Task:
    """A task: `train` and `test` are `datasets.Dataset`s of samples.

    Args:
        name: also the name of the task's folder in a run; letters, digits, '.', '_' and '-'.
        train: columns 'prompt' and 'answer' (strings) and, optionally, 'instruction': the leading
            part of the prompt, which truncation keeps ('' where a sample has none).
        test: the same columns; it stays text, since generation tokenises it.
        metric: one of `METRICS`.
        choices: the possible answers of a classification task, or None.
        cut: training samples that tokenisation shortened; None before `tokenized`.

    Raises:
        DataError: a name that is no folder name, an unknown metric, a missing or non-text column,
            or a split without samples.
    """

    name: str
    train: Dataset
    test: Dataset
    metric: str = "accuracy"
    choices: Sequence[str] | None = None
    cut: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.metric not in METRICS:
            raise DataError(
                f"Task '{self.name}' has the metric {self.metric!r}, which is unknown; "
                f"choose one of {', '.join(METRICS)}{suggestion(self.metric, METRICS)}."
            )
        if self.choices is not None:
            object.__setattr__(self, "choices", _checked_choices(self.name, self.choices))
        _check_columns(self.name, "train", self.train)
        _check_columns(self.name, "test", self.test)

    @classmethod
    def from_records(
        cls,
        name: str,
        train: Iterable[Mapping[str, Any]],
        test: Iterable[Mapping[str, Any]],
        prompt: Field = "prompt",
        answer: Field = "answer",
        instruction: Field | None = "instruction",
        metric: str = "accuracy",
        choices: Sequence[str] | None = None,
    ) -> Task:
        """Make a task from rows (dicts), each a sample.

        Args:
            prompt, answer: the key of the text in a row, or a function from the row to the text.
            instruction: likewise, for the leading part of the prompt; rows without it have none.
                None ignores such a column.

        Raises:
            DataError: a row without one of the keys, or whose text is empty or no string; the
                message names task, split, index and key.
        """
        check_name(name)
        fields = (prompt, answer, instruction)
        splits = [
            dataset_of(
                checked_row(row, f"Task '{name}', {split} row {index}", *fields) for index, row in enumerate(rows)
            )
            for split, rows in (("train", train), ("test", test))
        ]
        return cls(name, splits[0], splits[1], metric=metric, choices=choices)

    @classmethod
    def from_jsonl(
        cls,
        name: str,
        train_path: str | Path,
        test_path: str | Path,
        prompt: Field = "prompt",
        answer: Field = "answer",
        instruction: Field | None = "instruction",
        metric: str = "accuracy",
        choices: Sequence[str] | None = None,
    ) -> Task:
        """Make a task from two files of one JSON object a line; arguments as in `from_records`.

        Raises:
            DataError: a missing file, or a bad line; the message names file, line and key.
        """
        check_name(name)
        fields = (prompt, answer, instruction)
        splits = [
            dataset_of(checked_row(row, place, *fields) for place, row in read_json_lines(path))
            for path in (train_path, test_path)
        ]
        return cls(name, splits[0], splits[1], metric=metric, choices=choices)

    @classmethod
    def from_dataset(
        cls,
        name: str,
        train: Dataset,
        test: Dataset,
        prompt: Field = "prompt",
        answer: Field = "answer",
        instruction: Field | None = "instruction",
        metric: str = "accuracy",
        choices: Sequence[str] | None = None,
    ) -> Task:
        """Make a task from two Hugging Face datasets; arguments as in `from_records`.

        A label that is a number becomes text through a function, as in
        `answer=lambda row: names[row["label"]]`.

        Raises:
            DataError: as `from_records`.
        """
        return cls.from_records(name, train, test, prompt, answer, instruction, metric, choices)

    def tokenized(self, tokenizer: Any, max_length: int = 512) -> Task:
        """The same task with `train` tokenised: adds input_ids, attention_mask and labels.

        Labels are -100 on the prompt. Prompts that are too long are all cut to one length (`prompt_room`), so that
        the place of an answer says nothing about it. `cut` of the new task counts the samples that did not fit in
        `max_length` tokens and were shortened. `test` stays text.

        Raises:
            DataError: a tokenizer without an end-of-sequence token, or a `max_length` too small.
        """
        from datasets import Dataset, Features, List, Value

        prepare_tokenizer(tokenizer)
        kept = ("prompt", "answer", "instruction")
        columns = [name for name in kept if name in self.train.column_names]
        data: dict[str, list] = {name: list(self.train[name]) for name in columns}
        instructions = data.get("instruction", [""] * len(self.train))
        rows = zip(data["prompt"], data["answer"], instructions, strict=True)
        room = self.prompt_room(tokenizer, max_length)
        encoded = [encode(tokenizer, *row[:2], max_length, row[2], room) for row in rows]
        data["input_ids"] = [sample.input_ids for sample in encoded]
        data["attention_mask"] = [[1] * len(sample.input_ids) for sample in encoded]
        data["labels"] = [sample.labels for sample in encoded]
        features = {name: Value("string") for name in columns}
        types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int64"}
        features |= {name: List(Value(kind)) for name, kind in types.items()}
        cut = sum(sample.cut for sample in encoded)
        logger.log(
            logging.WARNING if cut else logging.INFO,
            f"Task '{self.name}': {cut} of {len(encoded)} training samples did not fit in "
            f"{max_length} tokens and were shortened.",
        )
        return replace(self, train=Dataset.from_dict(data, features=Features(features)), cut=cut)

    def prompt_room(self, tokenizer: Any, max_length: int) -> int:
        """Tokens that a prompt of this task may have, in training as in testing; see `prompt_room_of`."""
        return prompt_room_of(tokenizer, list(self.train["prompt"]), list(self.train["answer"]), max_length)

    def fingerprint(self) -> str:
        """SHA-256 over the texts of both splits, in order: the same data, the same fingerprint."""
        digest = hashlib.sha256(self.metric.encode())
        for split in (self.train, self.test):
            for column in ("prompt", "answer", "instruction"):
                texts = list(split[column]) if column in split.column_names else []
                digest.update(json.dumps(texts).encode())
        return digest.hexdigest()


def _checked_choices(name: str, choices: Sequence[str]) -> tuple[str, ...]:
    values = () if isinstance(choices, str) else tuple(choices)
    good = all(isinstance(choice, str) and choice.strip() for choice in values)
    if not values or not good or len(set(values)) < len(values):
        raise DataError(
            f"Task '{name}' has the choices {choices!r}; give a list of different, non-empty strings, or None."
        )
    return values


def _check_columns(name: str, split: str, dataset: Dataset) -> None:
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        raise DataError(
            f"Task '{name}': {split} is a {type(dataset).__name__}, not a datasets.Dataset; "
            "use Task.from_records, Task.from_jsonl or Task.from_dataset."
        )
    for column in ("prompt", "answer"):
        if column not in columns:
            raise DataError(
                f"Task '{name}': {split} has no column {column!r} but "
                f"{', '.join(columns) or 'none'}; "
                f"name it with Task.from_dataset(..., {column}=...)."
            )
        kind = str(getattr(dataset.features[column], "dtype", dataset.features[column]))
        if len(dataset) and kind not in ("string", "large_string"):
            raise DataError(
                f"Task '{name}': the column {column!r} of {split} holds {kind}, not text; convert it to strings."
            )
    if len(dataset) == 0:
        raise DataError(
            f"Task '{name}' has no {split} samples; each task needs at least one for training and one for testing."
        )

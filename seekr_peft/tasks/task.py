"""One task of a sequence: its name, its training and test samples, and how answers are scored.

``Task`` is made from records, files of rows or Hugging Face datasets.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, cut, listed, shown
from ..metrics import Metric, find_metric, metric_name, score_predictions
from ..types import Tokenizer
from .conversation import Conversation, Prompt
from .samples import Field, check_name, check_text, checked_rows, dataset_of, table_of
from .table_files import named, read_rows
from .text import TextCodec
from .tokenize import SampleTokens, prepare_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task: ``train`` and ``test`` are ``datasets.Dataset``s of samples.

    Args:
        name: also the name of the task's folder in a run; letters, digits, '.', '_' and '-'.
        train: columns 'prompt' and 'answer' (strings) and, optionally, 'instruction': the leading
            part of the prompt, which truncation keeps ('' where a sample has none), and
            'prompt_messages': the prompt as messages (JSON; '' where it is plain text), which the tokenizer's
            chat template writes; 'prompt' is then for people to read.
        test: the same columns; it stays text, since generation tokenises it. None: the task can be trained, and
            what needs test samples refuses it by name.
        metric: how an answer is scored: the name of a registered metric (see ``seekr_peft.metrics``), or a function
            ``metric(prediction, answer)`` of two texts that gives a number from 0 to 1; one with a parameter ``source``
            is also given the prompt without its instruction.
        choices: the possible answers of a classification task, or None.
        cut: training samples that tokenisation shortened; None before ``tokenized``.

    Raises:
        DataError: a name that is no folder name, an unknown metric, a missing or non-text column,
            or a split without samples.
    """

    name: str
    train: Dataset
    test: Dataset | None = None
    metric: str | Metric = "accuracy"
    choices: Sequence[str] | None = None
    cut: int | None = None
    _room: tuple[Any, int, int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        find_metric(self.metric, f"Task '{self.name}'")
        if self.choices is not None:
            object.__setattr__(self, "choices", _checked_choices(self.name, self.choices))
        _check_columns(self.name, "train", self.train)
        if self.test is not None:
            _check_columns(self.name, "test", self.test)

    @classmethod
    def from_records(
        cls,
        name: str,
        train: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
        test: Iterable[Mapping[str, Any]] | None = None,
        prompt: Field = "prompt",
        answer: Field = "answer",
        instruction: Field | None = "instruction",
        metric: str | Metric = "accuracy",
        choices: Sequence[str] | None = None,
    ) -> Task:
        """Make a task from rows (dicts), each a sample: a list of them, or a Hugging Face dataset.

        A prompt may be a list of messages ({role, content}), and its answer a list of the assistant's one message: such
        samples are written by the tokenizer's chat template. A row without an answer may have 'completion' for it, or
        'messages', the last of which, the assistant's, is the answer, and all that come before it the prompt: earlier
        turns of the assistant are not trained. 'tools' goes to the template as well.

        A column of labels (ClassLabel) gives their names. Any other number becomes text through a function, as in
        ``answer=lambda row: names[row["label"]]``.

        Args:
            train: the rows, or, without ``test``, both splits by name, as a DatasetDict has them: 'train', and 'test'
                or else 'validation'.
            test: the rows to evaluate on; None: there are none, and the task can only be trained.
            prompt, answer: the key of the text in a row, or a function from the row to the text.
            instruction: likewise, for the leading part of the prompt; rows without it have none.
                None ignores such a column.

        Raises:
            DataError: a row without one of the keys, or whose text is empty, no string, or cannot be
                written as UTF-8; messages that are none; a row without a label (-1); the message names task, split,
                index and key.
        """
        check_name(name)
        if test is None:
            train, test = _parted(train)
        fields = (prompt, answer, instruction)
        splits = [
            None if rows is None else dataset_of(checked_rows(table_of(rows, f"Task '{name}', {split}"), *fields))
            for split, rows in (("train", train), ("test", test))
        ]
        return cls(name, splits[0], splits[1], metric=metric, choices=choices)

    @classmethod
    def from_files(
        cls,
        name: str,
        train_path: str | Path,
        test_path: str | Path | None = None,
        prompt: Field = "prompt",
        answer: Field = "answer",
        instruction: Field | None = "instruction",
        metric: str | Metric = "accuracy",
        choices: Sequence[str] | None = None,
    ) -> Task:
        """Make a task from files of samples; other arguments as in ``from_records``.

        A file's name says what it is: .csv and .tsv (UTF-8; the first line names the columns; every value is text as it
        is written), .parquet, .json (a list of objects); any other has a JSON object a line.

        Raises:
            DataError: a missing file, or a bad line; the message names file, line and key.
        """
        check_name(name)
        fields = (prompt, answer, instruction)
        train, test = (None if path is None else _read_split(path, fields) for path in (train_path, test_path))
        return cls(name, train, test, metric=metric, choices=choices)

    from_jsonl = from_files
    """By the name of the files that most tasks have: a JSON object a line."""

    from_dataset = from_records
    """By the name of what is given: Hugging Face datasets, or a DatasetDict."""

    @property
    def metric_name(self) -> str:
        """The metric as it stands on disk: its registered name, or the name of the function."""
        return metric_name(self.metric)

    def test_set(self) -> Dataset:
        """The test samples.

        Raises:
            DataError: the task has none.
        """
        if self.test is None:
            raise DataError(
                f"Task '{self.name}' has no test samples, so it can be trained but not evaluated; make it with a test "
                f"set, as in Task.from_records(name, train, test)."
            )
        return self.test

    def score(self, predictions: Sequence[str], answers: Sequence[str] | None = None) -> tuple[float, list[float]]:
        """Mean score of predictions for the test samples, in their order, and the score of each, all from 0 to 1.

        Args:
            answers: what they are compared with; None: the samples' own answers.

        Raises:
            DataError: the task has no test samples, another number of predictions, or a metric that fails or gives
                no number from 0 to 1; the message names task, metric and test row.
        """
        test = self.test_set()
        own = list(test["answer"]) if answers is None else answers
        return score_predictions(self.metric, predictions, own, sources_of(test), f"Task '{self.name}', test row")

    def as_chat(self) -> Task:
        """The same task with each plain prompt as a user's message, which the tokenizer's chat template writes."""
        return replace(self, train=_as_chat(self.train), test=None if self.test is None else _as_chat(self.test))

    def check_texts(self, tokenizer: Tokenizer) -> None:
        """Find what ``tokenized`` would refuse in the training samples, which is quicker than tokenising them.

        Raises:
            DataError: as ``tokenized``.
        """
        codec, place = TextCodec(prepare_tokenizer(tokenizer)), f"Task '{self.name}', train row"
        codec.tails(codec.questions(prompts_of(self.train), place), list(self.train["answer"]), place)

    def tokenized(self, tokenizer: Tokenizer, max_length: int = 512) -> Task:
        """The same task with ``train`` tokenised: adds input_ids, attention_mask and labels.

        Labels are -100 on the prompt. Prompts that are too long are all cut to one length (``prompt_room``), so that
        the place of an answer says nothing about it. ``cut`` of the new task counts the samples that did not fit in
        ``max_length`` tokens and were shortened. ``test`` stays text. Conversations become what TRL's SFTTrainer trains
        on for the same prompt and completion, wherever the tokens are the whole text's own.

        Where a tokenizer joins characters across the end of a prompt, or puts spaces where the text has none, an
        answer's tokens are not those of the whole text; how many samples that are is logged.

        Raises:
            DataError: a tokenizer without an end-of-sequence token, or without a chat template for conversations; an
                answer with an end in it; a ``max_length`` too small.
        """
        from datasets import Dataset, Features, List, Value

        kept = ("prompt", "answer", "instruction", "prompt_messages")
        columns = [name for name in kept if name in self.train.column_names]
        data: dict[str, list] = {name: list(self.train[name]) for name in columns}
        tokens = self._train_tokens(tokenizer)
        encoded = tokens.encoded(
            max_length, self._remember_room(tokenizer, max_length, tokens), instructions_of(self.train)
        )
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
        self._tell_foreign(sum(not sample.own for sample in encoded), len(encoded))
        if tokens.codec.endless_template:
            logger.warning(
                f"Task '{self.name}': the tokenizer's chat template ends an answer with no token of its own, so the "
                f"model is not taught where to stop; add tokenizer.eos_token to the template."
            )
        return replace(self, train=Dataset.from_dict(data, features=Features(features)), cut=cut)

    def prompt_room(self, tokenizer: Tokenizer, max_length: int) -> int:
        """Tokens that a prompt of this task may have, in training as in testing; see ``prompt_room_of``."""
        known = self._room
        if known is not None and known[0] is tokenizer and known[1:3] == (len(tokenizer), max_length):
            return known[3]
        return self._remember_room(tokenizer, max_length, self._train_tokens(tokenizer))

    def _train_tokens(self, tokenizer: Tokenizer) -> SampleTokens:
        place = f"Task '{self.name}', train row"
        return SampleTokens(tokenizer, prompts_of(self.train), list(self.train["answer"]), place)

    def _remember_room(self, tokenizer: Tokenizer, max_length: int, tokens: SampleTokens) -> int:
        room = tokens.room(max_length)
        object.__setattr__(self, "_room", (tokenizer, len(tokenizer), max_length, room))
        return room

    def _tell_foreign(self, foreign: int, total: int) -> None:
        if foreign:
            logger.warning(
                f"Task '{self.name}': for {foreign} of {total} training samples the tokenizer's tokens of the whole "
                f"text do not part where the prompt ends, or do not read back as that text; others that do are trained."
            )

    def fingerprint(self) -> str:
        """SHA-256 over the texts of both splits, in order: the same data, the same fingerprint."""
        digest = hashlib.sha256(self.metric_name.encode())
        for split in (self.train, self.test):
            if split is None:
                digest.update(b"null")
                continue
            for column in ("prompt", "answer", "instruction"):
                texts = list(split[column]) if column in split.column_names else []
                digest.update(json.dumps(texts).encode())
            if "prompt_messages" in split.column_names:
                digest.update(json.dumps(list(split["prompt_messages"])).encode())
        return digest.hexdigest()


def prompts_of(dataset: Dataset) -> list[Prompt]:
    """The prompt of each sample: its text, or the conversation where it has one."""
    texts = list(dataset["prompt"])
    if "prompt_messages" not in dataset.column_names:
        return texts
    pairs = zip(texts, dataset["prompt_messages"], strict=True)
    return [Conversation.from_json(conversation) if conversation else text for text, conversation in pairs]


def instructions_of(dataset: Dataset) -> list[str]:
    """The leading part of each prompt that truncation keeps; '' = none."""
    return list(dataset["instruction"]) if "instruction" in dataset.column_names else [""] * len(dataset)


def sources_of(dataset: Dataset) -> list[str]:
    """What each sample's answer is about: its prompt without the instruction before it."""
    pairs = zip(dataset["prompt"], instructions_of(dataset), strict=True)
    return [prompt.removeprefix(instruction) for prompt, instruction in pairs]


def _as_chat(dataset: Dataset) -> Dataset:
    conversations = [
        prompt if isinstance(prompt, Conversation) else Conversation([{"role": "user", "content": prompt}])
        for prompt in prompts_of(dataset)
    ]
    columns = [name for name in ("prompt", "answer", "instruction") if name in dataset.column_names]
    rows = (
        {**row, "prompt_messages": conversation.to_json()}
        for row, conversation in zip(dataset.select_columns(columns), conversations, strict=True)
    )
    return dataset_of(rows)


def _read_split(path: str | Path, fields: tuple[Field, Field, Field | None]) -> Dataset:
    samples = checked_rows(read_rows(path), *fields)
    if not samples:
        raise DataError(f"{named(path)} has no samples; a split needs at least one.")
    return dataset_of(samples)


def _parted(rows: Any) -> tuple[Any, Any]:
    """The training and the test split of a mapping that has splits; anything else is the training split."""
    if not isinstance(rows, Mapping) or "train" not in rows:
        return rows, None
    return rows["train"], rows.get("test", rows.get("validation"))


def _checked_choices(name: str, choices: Sequence[str]) -> tuple[str, ...]:
    values = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else ()
    good = all(isinstance(choice, str) and choice.strip() for choice in values)
    if not values or not good or len(set(values)) < len(values):
        raise DataError(
            f"Task '{name}' has the choices {shown(choices)}; give a list of different, non-empty strings, or None."
        )
    for choice in values:
        check_text(choice, f"the choice {shown(choice, 60)}", f"Task '{name}'")
    return values


def _check_columns(name: str, split: str, dataset: Dataset) -> None:
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        raise DataError(
            f"Task '{name}': {split} is {'None' if dataset is None else f'a {type(dataset).__name__}'}, not a "
            "datasets.Dataset; use Task.from_records, Task.from_files or Task.from_dataset."
        )
    for column in ("prompt", "answer"):
        if column not in columns:
            raise DataError(
                f"Task '{name}': {split} has no column {column!r} but "
                f"{listed(columns)}; "
                f"name it with Task.from_dataset(..., {column}=...)."
            )
        kind = str(getattr(dataset.features[column], "dtype", dataset.features[column]))
        labels = type(dataset.features[column]).__name__ == "ClassLabel"
        advice = "use Task.from_dataset, which takes the labels' names" if labels else "convert it to strings"
        if len(dataset) and kind not in ("string", "large_string"):
            raise DataError(
                f"Task '{name}': the column {column!r} of {split} holds {cut(kind, 60)}, not text; {advice}."
            )
    if len(dataset) == 0:
        raise DataError(
            f"Task '{name}' has no {split} samples; each task needs at least one for training and one for testing."
        )

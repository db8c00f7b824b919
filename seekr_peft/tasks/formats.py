"""The file formats of tasks: each reader turns the two files of a task into prompts and answers.

A reader takes the task's name and {'train': file, 'test': file}, and returns the samples of each
split, the metric and the possible answers (None = free text).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, listed, shown
from ..files.json_text import first_repeated
from ..metrics import Metric
from .demo_words import TASK_NAMES, demo_tasks
from .samples import check_text, checked_rows
from .table_files import TABLE_SUFFIXES, Table, named, read_json, read_rows

logger = logging.getLogger(__name__)

Samples = dict[str, list[dict[str, str]]]
"""Per split ('train', 'test') its samples, each {'prompt', 'answer', 'instruction'}, from ``checked_row`` more."""

Reader = Callable[[str, Mapping[str, Path]], tuple[Samples, str | Metric, list[str] | None]]

_TRACE_METRICS = {
    "C-STANCE": "option_letter",
    "FOMC": "option_letter",
    "ScienceQA": "option_letter",
    "MeetingBank": "rougeL",
    "Py150": "edit_similarity",
    "20Minuten": "sari",
}


def _read_tables(name: str, files: Mapping[str, Path]) -> tuple[Samples, str, list[str] | None]:
    return {split: checked_rows(read_rows(file)) for split, file in files.items()}, "accuracy", None


def _read_trace(name: str, files: Mapping[str, Path]) -> tuple[Samples, str, list[str] | None]:
    samples = {}
    for split, file in files.items():
        rows, place = read_json(file), named(file)
        if not isinstance(rows, list):
            raise DataError(f"{place} holds a {type(rows).__name__}, not a list of {{prompt, answer}}.")
        samples[split] = checked_rows(Table((f"{place}, row {index}", row) for index, row in enumerate(rows)))
    return samples, _TRACE_METRICS.get(name, "accuracy"), None


def _read_superni(name: str, files: Mapping[str, Path]) -> tuple[Samples, str, list[str] | None]:
    samples = {}
    for split, file in files.items():
        definition, instances = _read_instances(file)
        start = definition + "\n" if definition else ""
        samples[split] = [_sample(start, text, "Output:", output) for text, output in instances]
    return samples, "rougeL", None


def _read_long_sequence(name: str, files: Mapping[str, Path]) -> tuple[Samples, str, list[str] | None]:
    found = {split: _read_instances(file) for split, file in files.items()}
    # A label has no indentation.
    read = {
        split: (start, [(text, output.strip()) for text, output in pairs]) for split, (start, pairs) in found.items()
    }
    outputs = [output for _, output in read["train"][1]]
    choices = _choices(files["train"].with_name("labels.json"), outputs)
    samples = {}
    for split, (definition, instances) in read.items():
        start = (definition + "\n" if definition else "") + f"Option: {', '.join(choices)}\n"
        kept = [(text, output) for text, output in instances if output in choices]
        if len(kept) < len(instances):
            logger.warning(
                f"{named(files[split])}: left out {len(instances) - len(kept)} of {len(instances)} "
                f"instances whose output is none of {listed(choices)}."
            )
        samples[split] = [_sample(start, text, "Answer:", output) for text, output in kept]
    return samples, "accuracy", choices


def _choices(path: Path, outputs: list[str]) -> list[str]:
    """The labels of a task; those its training outputs use when the file agrees with none of them.

    The published labels of 'qqp' are True and False, while its outputs are yes and no.
    """
    labels, place = read_json(path), named(path)
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not texts or not labels:
        raise DataError(f"{place} does not hold a list of labels (strings), but {_quoted(labels)}.")
    for label in labels:
        check_text(label, f"the label {shown(label, 60)}", place)
    twice = first_repeated(labels)
    wrong = twice if twice is not None else next((label for label in labels if not label.strip()), None)
    if wrong is not None:
        raise DataError(f"{place}: the label {shown(wrong, 60)} is empty or there twice; name each answer once.")
    if set(labels) & set(outputs) or not outputs:
        return labels
    used = sorted(set(outputs))
    logger.warning(f"{place} lists {listed(labels)}, but the outputs are {listed(used)}; these are used as options.")
    return used


def _read_instances(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """Definition and (input, output) pairs of a SuperNI file; empty outputs are left out."""
    data, place = read_json(path), named(path)
    for key in ("Definition", "Instances"):
        if not isinstance(data, dict) or key not in data:
            raise DataError(f"{place} has no key '{key}'; a SuperNI file has Definition and Instances.")
    lines = [data["Definition"]] if isinstance(data["Definition"], str) else data["Definition"]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{place}: 'Definition' is {_quoted(lines)}, not a string or a list of strings.")
    for line in lines:
        check_text(line, "'Definition'", place)
    if not isinstance(data["Instances"], list):
        raise DataError(f"{place}: 'Instances' is a {type(data['Instances']).__name__}, not a list.")
    instances = [_instance(row, f"{place}, instance {index}") for index, row in enumerate(data["Instances"])]
    kept = [(text, output) for text, output in instances if output]
    if len(kept) < len(instances):
        logger.warning(
            f"{place}: left out {len(instances) - len(kept)} of {len(instances)} instances whose output is empty."
        )
    return "\n".join(line.strip() for line in lines), kept


def _instance(row: Any, place: str) -> tuple[str, str]:
    """(input, first output) of one instance, stripped, though an output keeps its indentation; it may be empty."""
    for key in ("input", "output"):
        if not isinstance(row, Mapping) or key not in row:
            raise DataError(f"{place} has no key '{key}'; an instance has input and output.")
    text, output = row["input"], row["output"]
    if isinstance(output, list):
        output = output[0] if output else ""
    for key, value in (("input", text), ("output", output)):
        if not isinstance(value, str):
            raise DataError(f"{place}: '{key}' is {_quoted(value)}, a {type(value).__name__}, not a string.")
        check_text(value, f"'{key}'", place)
    if not text.strip():
        raise DataError(f"{place} has an empty 'input'; fill it or remove the instance.")
    # One space in front, as many files have it, is what separates an answer from its prompt.
    return text.strip(), re.sub(r"^ (?!\s)", "", output.rstrip())


def _quoted(value: Any) -> str:
    return shown(value if isinstance(value, str) else shown(value), 60)


def _sample(start: str, text: str, question: str, output: str) -> dict[str, str]:
    return {"prompt": f"{start}{text}\n{question}", "answer": output, "instruction": start}


FORMATS: dict[str, Reader] = {
    "jsonl": _read_tables,
    "csv": _read_tables,
    "parquet": _read_tables,
    "trace": _read_trace,
    "superni": _read_superni,
    "long_sequence": _read_long_sequence,
}
"""The formats by name."""


@dataclass(frozen=True)
class PackagedTasks:
    """Tasks that come with the package, in the order of ``names``: a format without files, so without a path.

    ``make`` takes a seed and how many samples a task has at most for training and for testing (None: its own number),
    and returns the prompts and answers of each split by the task's name.
    """

    names: tuple[str, ...]
    make: Callable[[int, int | None, int | None], dict[str, Samples]]


def _make_demo(seed: int, max_train: int | None, max_test: int | None) -> dict[str, Samples]:
    made = demo_tasks(seed, n_train=max_train or 600, n_test=max_test or 100)
    return {record["name"]: {split: record[split] for split in ("train", "test")} for record in made}


PACKAGED: dict[str, PackagedTasks] = {"demo": PackagedTasks(tuple(TASK_NAMES), _make_demo)}
"""The formats whose tasks come with the package."""

SUFFIXES: dict[str, tuple[str, ...]] = {"jsonl": TABLE_SUFFIXES, "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""How the files of a format end that has a row a sample; those of the others are .json."""

"""Readers of task sequences: one folder holds the tasks of a benchmark in a known format.

``read_tasks`` reads them; ``find_task_problems`` tells what is wrong without reading the samples, so a
recipe can be checked before anything is loaded.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError, listed, shown, suggestion
from .formats import FORMATS, PACKAGED, SUFFIXES
from .samples import check_name, dataset_of
from .table_files import named
from .task import Task

TRACE_ORDER = (
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
)
"""The benchmark's own order of its tasks, used when none is asked for."""

MIXED = "mixed"
"""Format of a folder with one subfolder per format; tasks are then named FORMAT/NAME in the order."""

_SPLITS = ("train", "test")


def read_tasks(
    format: str,
    path: str | Path | None = None,
    order: Sequence[str] | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> list[Task]:
    """Read the tasks below ``path``, in ``order``.

    | format | files of a task | metric |
    |---|---|---|
    | jsonl | NAME/train.jsonl, NAME/test.jsonl, or NAME.train.jsonl, NAME.test.jsonl; .csv, .tsv, .parquet | accuracy |
    | csv, parquet | the same, but only files of that kind are looked at | accuracy |
    | trace | NAME/{train,test}.json, lists of {prompt, answer} | see below |
    | superni | NAME/{train,test}.json with Definition and Instances | rougeL |
    | long_sequence | as superni, and labels.json, the possible answers | accuracy |
    | mixed | FORMAT/NAME/..., each FORMAT one of the above; needs an order of FORMAT/NAME | FORMAT's own |
    | demo | none: the tasks come with the package, and there is no ``path`` | accuracy |

    TRACE is scored as the benchmark itself is: by the option letter (C-STANCE, FOMC, ScienceQA), accuracy (both
    NumGLUE), ROUGE-L (MeetingBank), edit similarity (Py150) and SARI (20Minuten).

    A SuperNI instance with several right outputs is trained and scored on the first. Instances with
    an empty output, and in long_sequence with one that is no label, are left out, and counted in
    the log.

    Args:
        order: names of the tasks; None = all of them, alphabetically (TRACE: ``TRACE_ORDER``).
        max_train, max_test: at most so many samples a task, drawn at random but kept in the file's
            order. The draw depends on ``seed`` and the task's name alone, never on the other tasks,
            and a smaller draw is part of a larger one.

    Raises:
        DataError: everything ``find_task_problems`` tells, or a bad row.
    """
    problems = find_task_problems(format, path, order)
    if problems:
        raise DataError("\n".join(problems))
    for limit, value in (("max_train", max_train), ("max_test", max_test)):
        if value is not None and value < 1:
            raise DataError(f"{limit} is {value}; it must be 1 or more, or None for all samples.")
    if format in PACKAGED:
        made = PACKAGED[format].make(seed, max_train, max_test)
        return [Task.from_records(name, made[name]["train"], made[name]["test"]) for name in order or made]
    limits = {"train": max_train, "test": max_test}
    path = Path(path or "")
    if format == MIXED:
        parts = [name.split("/", 1) for name in order or ()]
        return [_read_task(own, path / own, name, limits, seed) for own, name in parts]
    names = _default_order(format, task_names(format, path)) if order is None else order
    return [_read_task(format, path, name, limits, seed) for name in names]


def find_task_problems(format: str, path: str | Path | None, order: Sequence[str] | None = None) -> list[str]:
    """What is wrong with the tasks, one sentence each, as far as file names tell; [] = nothing."""
    if format in PACKAGED:
        return _packaged_problems(format, path, order)
    if format == MIXED:
        return _mixed_problems(Path(path or ""), order)
    if format not in FORMATS:
        known_formats = (*FORMATS, MIXED, *PACKAGED)
        return [
            f"The task format {shown(format)} is unknown; choose one of {', '.join(known_formats)}"
            f"{suggestion(format, known_formats)}."
        ]
    path = Path(path or "")
    if not os.path.isdir(path):
        return [_path_problem(path)]
    try:
        known = task_names(format, path)
    except OSError as error:
        return [f"The folder '{named(path)}' cannot be read: {error.strerror or error}."]
    if not known:
        return [
            f"The folder '{named(path)}' holds no tasks of the format '{format}'; expected files such as "
            f"{_example(format)}."
        ]
    names = known if order is None else list(order)
    problems = _order_problems(names, known, f"not in '{named(path)}'; it holds")
    return problems + [
        problem for name in dict.fromkeys(names) if name in known for problem in _file_problems(format, path, name)
    ]


def _order_problems(names: Sequence[str], known: Sequence[str], absent: str) -> list[str]:
    """What is wrong with ``names``; an unknown one is ``absent`` the ``known`` ones."""
    if not names:
        return ["The order of tasks is empty; name a task, or leave the order out for all of them."]
    problems = []
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"The task {_quoted(name)} is {names.count(name)} times in the order.")
        if name not in known:
            problems.append(f"The task {_quoted(name)} is {absent} {listed(known)}{suggestion(name, known)}.")
    return problems


def _packaged_problems(format: str, path: str | Path | None, order: Sequence[str] | None) -> list[str]:
    known = PACKAGED[format].names
    problems = _order_problems(
        list(known if order is None else order), known, f"not among those of the format '{format}', which has"
    )
    if path:
        others = ", ".join((*FORMATS, MIXED))
        problems.append(
            f"The path '{named(path)}' would not be read, as the tasks of the format '{format}' come with the package; "
            f"leave it out, or give the format of your own tasks: {others}."
        )
    return problems


def _mixed_problems(path: Path, order: Sequence[str] | None) -> list[str]:
    if not order:
        return [f"The task format '{MIXED}' needs an order of FORMAT/NAME entries, such as long_sequence/agnews."]
    problems = []
    for entry in order:
        own, _, name = entry.partition("/")
        if own not in FORMATS or not name:
            problems.append(
                f"The task {_quoted(entry)} must be named FORMAT/NAME with a FORMAT of {', '.join(FORMATS)}."
            )
        else:
            problems += find_task_problems(own, path / own, [name])
    names = [entry.partition("/")[2] for entry in order]
    twice = sorted({name for name in names if names.count(name) > 1})
    return problems + [f"The task name {_quoted(name)} comes {names.count(name)} times in the order." for name in twice]


def _path_problem(path: Path) -> str:
    if os.path.exists(path):
        return f"The task path '{named(path)}' is a file; give the folder that holds the tasks."
    parent = next(folder for folder in Path(os.path.realpath(_writable(path))).parents if os.path.isdir(folder))
    return f"The task path '{named(path)}' is not there; the nearest folder that exists is '{named(parent)}'."


def _writable(path: Path) -> str:
    """The path without the character that no file name can have."""
    return str(path).partition("\0")[0]


def _quoted(name: object) -> str:
    """A task's name as a message has it; it may be no string in a recipe."""
    return f"'{named(name)}'" if isinstance(name, str) else shown(name)


def _file_problems(format: str, path: Path, name: str) -> list[str]:
    problems = []
    try:
        check_name(name)
    except DataError as error:
        problems.append(str(error))
    for split in _SPLITS:
        candidates = _candidates(format, path, name, split)
        found = [candidate for candidate in candidates if os.path.isfile(candidate)]
        if not found:
            problems.append(
                f"The task {_quoted(name)} has no {split} samples: {_absence(candidates)}; add it as a file."
            )
        if len(found) > 1:
            problems.append(
                f"The task {_quoted(name)} has its {split} samples more than once: '{named(found[0])}' and "
                f"'{named(found[1])}'; keep one of them."
            )
    labels = path / name / "labels.json"
    if format == "long_sequence" and not os.path.isfile(labels):
        problems.append(f"The task {_quoted(name)} has no list of its answers: {_absence([labels])}; add it as a file.")
    return problems


def _absence(candidates: Sequence[Path]) -> str:
    """That none of the files is there, or what is in the place of one."""
    other = next((candidate for candidate in candidates if os.path.lexists(candidate)), None)
    if other is None:
        return f"'{named(candidates[0])}' is not there"
    return f"'{named(other)}' is no file that can be read, but a {_kind_of(other)}"


def _kind_of(path: Path) -> str:
    return "folder" if os.path.isdir(path) else "link to nothing" if os.path.islink(path) else "pipe or a device"


def _candidates(format: str, path: Path, name: str, split: str) -> list[Path]:
    """Where the samples of a split may lie, best first."""
    if format not in SUFFIXES:
        return [path / name / f"{split}.json"]
    ends = [f"{split}{suffix}" for suffix in SUFFIXES[format]]
    return [place for end in ends for place in (path / name / end, path / f"{name}.{end}")]


def task_names(format: str, path: Path) -> list[str]:
    """Names of which at least one split is there, sorted; those of packaged tasks in their own order."""
    if format in PACKAGED:
        return list(PACKAGED[format].names)
    names: set[str] = set()
    ends = [f".{split}{suffix}" for split in _SPLITS for suffix in SUFFIXES.get(format, ())]
    for entry in os.listdir(path):
        names.update({entry, *(entry.removesuffix(end) for end in ends)})
    return sorted(name for name in names if _has_samples(format, path, name))


def _has_samples(format: str, path: Path, name: str) -> bool:
    files = [file for split in _SPLITS for file in _candidates(format, path, name, split)]
    return any(os.path.isfile(file) for file in files)


def _default_order(format: str, names: list[str]) -> list[str]:
    if format != "trace":
        return names
    others = [name for name in names if name not in TRACE_ORDER]
    return [name for name in TRACE_ORDER if name in names] + others


def _example(format: str) -> str:
    suffix = SUFFIXES.get(format, ("",))[0]
    return f"NAME/train{suffix} or NAME.train{suffix}" if suffix else "NAME/train.json"


def _read_task(format: str, path: Path, name: str, limits: Mapping[str, int | None], seed: int) -> Task:
    files = {
        split: next(file for file in _candidates(format, path, name, split) if os.path.isfile(file))
        for split in _SPLITS
    }
    samples, metric, choices = FORMATS[format](name, files)
    datasets = {}
    for split in _SPLITS:
        if not samples[split]:
            raise DataError(
                f"{named(files[split])} has no usable samples; task '{name}' needs at least one for {split}ing."
            )
        chosen = _subsample(len(samples[split]), limits[split], f"{seed}/{name}/{split}")
        datasets[split] = dataset_of([samples[split][index] for index in chosen])
    return Task(name, datasets["train"], datasets["test"], metric=metric, choices=choices)


def _subsample(size: int, limit: int | None, seed: str) -> list[int]:
    """Indices of at most ``limit`` of ``size`` samples, ascending."""
    indices = list(range(size))
    if limit is None or limit >= size:
        return indices
    # Random hashes a string seed with SHA-512, hence the same draw in every process.
    random.Random(seed).shuffle(indices)
    return sorted(indices[:limit])

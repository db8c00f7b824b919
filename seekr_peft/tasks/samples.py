"""One sample of a task: finding its texts in a row, and refusing what is no sample.

Every refusal names the place: file and line, or task, split and index. Imports only
`seekr_peft.errors`; `datasets` inside functions.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seekr_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Field = str | Callable[[Mapping[str, Any]], Any]
"""Where a sample's text comes from: a key (column) of the row, or a function of the row."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> None:
    """Refuse a task name that cannot be a folder name.

    Raises:
        DataError: `name` is no string, has another character than letters, digits, '.', '_', '-',
            or is '.' or '..'.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise DataError(
            f"The task name {name!r} cannot be a folder name; "
            "use letters, digits, '.', '_' and '-' only, and not '.' or '..'."
        )


def _rename(field: str, row: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(field, [str(key) for key in row], n=1)
    return f"rename {close[0]!r} to {field!r}, " if close else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'name'?)" for a misspelt name that resembles a known one, else ''."""
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), list(lowered), n=1)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""


def checked_row(
    row: Mapping[str, Any],
    place: str,
    prompt: Field = "prompt",
    answer: Field = "answer",
    instruction: Field | None = "instruction",
) -> dict[str, str]:
    """One sample {'prompt', 'answer', 'instruction'} ('' = none) out of a row, or a DataError.

    Args:
        place: begins the message: the file and line, or the task and index.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {_brief(row)}, not an object with the keys of a sample.")
    sample = {}
    for role, field in (("prompt", prompt), ("answer", answer)):
        sample[role] = _text(row, field, role, place)
        if not sample[role].strip():
            raise DataError(f"{place} has an empty {_label(field, role)}; fill it or remove the row.")
    sample["instruction"] = _instruction(row, instruction, place)
    if not sample["prompt"].startswith(sample["instruction"]):
        raise DataError(
            f"{place} has an instruction that the prompt does not begin with: "
            f"{_brief(sample['instruction'])}; put it at the start of the prompt, or pass "
            "instruction=None."
        )
    return sample


def dataset_of(samples: Iterable[Mapping[str, str]]) -> Dataset:
    """A Dataset with prompt, answer and, when any sample has one, instruction."""
    from datasets import Dataset, Features, Value

    samples = list(samples)
    columns = ["prompt", "answer"]
    if any(sample.get("instruction") for sample in samples):
        columns.append("instruction")
    data = {name: [sample.get(name, "") for sample in samples] for name in columns}
    return Dataset.from_dict(data, features=Features({name: Value("string") for name in columns}))


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line of a JSON-lines file; blank lines are skipped.

    Raises:
        DataError: the file is not there or not UTF-8, or a line is no JSON; names file and line.
    """
    path = Path(path)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): {_brief(line)}."
            ) from error


def read_text(path: Path) -> str:
    """A UTF-8 file's text (a byte-order mark is dropped), or a DataError that names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _text(row: Mapping[str, Any], field: Field, role: str, place: str) -> str:
    if callable(field):
        value = field(row)
    elif field in row:
        value = row[field]
    else:
        present = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{place} has no key {field!r}, the {role}, but {present}; "
            f"{_rename(field, row)}add it, or name the key that holds the {role}."
        )
    if not isinstance(value, str):
        raise DataError(f"{place}: {_label(field, role)} is {_brief(value)}, not a string; convert it to text.")
    return value


def _instruction(row: Mapping[str, Any], field: Field | None, place: str) -> str:
    if field is None:
        return ""
    if not callable(field) and row.get(field) is None:
        return ""
    return _text(row, field, "instruction", place)


def _label(field: Field, role: str) -> str:
    """How a message calls the text of a sample: its role, and its key where that differs."""
    return f"{role} (key {field!r})" if isinstance(field, str) and field != role else repr(role)


def _brief(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""One sample of a task: finding its texts in a row, and refusing what is no sample.

Every refusal names the place: file and line, or task, split and index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, closest, listed, shown
from ..files.json_text import parse_json
from ..files.paths import LONGEST_FOLDER_NAME, is_folder_name
from .conversation import Conversation
from .inputs import check_media, why_no_rows
from .table_files import Table, label_names

if TYPE_CHECKING:
    from datasets import Dataset

Field = str | Callable[[Mapping[str, Any]], Any]
"""Where a sample's text comes from: a key (column) of the row, or a function of the row."""

_LONGEST_PLACE = 400
_DEEPEST = 64
"""Levels of lists and objects within a row."""


def check_name(name: str) -> None:
    """Refuse a task name that cannot be a folder name.

    Raises:
        DataError: ``name`` is no string, has another character than letters, digits, '.', '_', '-',
            begins with one of the last three, or is longer than ``LONGEST_FOLDER_NAME``.
    """
    if not is_folder_name(name):
        raise DataError(
            f"The task name {shown(name)} cannot be a folder name; "
            f"use letters, digits, '.', '_' and '-' only, {LONGEST_FOLDER_NAME} at most, and not '.' or '..'."
        )


def check_text(text: str, what: str, place: str) -> str:
    """``text`` as it is, unless it cannot be written as UTF-8.

    Raises:
        DataError: it has a half of a surrogate pair, as JSON may have with "\\ud83d".
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {what} has at character {error.start} {shown(text[error.start])}, half of a surrogate pair, "
            f"which is no character and cannot be written as UTF-8; replace it, or mend what cut the text."
        ) from error
    return text


def table_of(rows: Any, place: str) -> Table:
    """The rows of a list or a data set; the index of each follows ``place``.

    Raises:
        DataError: they are no rows, but a set of splits, columns, a path, or nothing.
    """
    why = why_no_rows(rows)
    if why:
        raise DataError(f"{place} is {why}")
    numbered = ((f"{place} row {index}", row) for index, row in enumerate(rows))
    return Table(numbered, label_names(getattr(rows, "features", None)))


def checked_rows(
    table: Table, prompt: Field = "prompt", answer: Field = "answer", instruction: Field | None = "instruction"
) -> list[dict[str, str]]:
    """The sample of each row, see ``checked_row``; the number of a label is its name where the table has one."""
    asked = {field for field in (prompt, answer, instruction, "completion") if isinstance(field, str)}
    names = {column: own for column, own in table.label_names.items() if column in asked}
    return [
        checked_row(_with_label_names(row, names, place), place, prompt, answer, instruction)
        for place, row in table.rows
    ]


def _with_label_names(row: Any, names: Mapping[str, Sequence[str]], place: str) -> Any:
    if not names or not isinstance(row, Mapping):
        return row
    return {key: _label_name(value, names[key], key, place) if key in names else value for key, value in row.items()}


def _label_name(value: Any, names: Sequence[str], column: str, place: str) -> Any:
    if not hasattr(value, "__index__"):
        return value
    number = value.__index__()
    if not 0 <= number < len(names):
        why = "which stands for no label" if number == -1 else f"but there are {len(names)} labels"
        raise DataError(
            f"{place}: {_brief(column)} is {_brief(number)}, {why}; leave such rows out, or take a "
            f"split that has labels (a test split is often published without: test=dataset['validation'])."
        )
    return names[number]


def plain(value: Any) -> Any:
    """Python's own text, number or list in place of one of numpy, pandas, pyarrow or torch."""
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "as_py"):
        return plain(value.as_py())
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def checked_row(
    row: Mapping[str, Any],
    place: str,
    prompt: Field = "prompt",
    answer: Field = "answer",
    instruction: Field | None = "instruction",
) -> dict[str, str]:
    """One sample {'prompt', 'answer', 'instruction', 'prompt_messages'} ('' = none) out of a row, or a DataError.

    The prompt is a text or a list of messages (role and content each), the answer a text or a list of the assistant's
    one message. A row without an answer may have 'completion' for it, or 'messages', the last of which is the answer.

    Args:
        place: begins the message: the file and line, or the task and index.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {_brief(row)}, not an object with the keys of a sample.")
    _check_depth(row, place)
    check_media({key: value for key, value in row.items() if key not in (prompt, answer, instruction)}, place)
    if answer == "answer" and "answer" not in row and "completion" in row:
        answer = "completion"
    if (prompt, answer) == ("prompt", "answer") and "answer" not in row and "messages" in row:
        row = _split_messages(row, place)
    sample = {"answer": _answer(row, answer, place), "prompt_messages": ""}
    asked = _prompt(row, prompt, place)
    if isinstance(asked, Conversation):
        sample["prompt_messages"], sample["prompt"] = asked.to_json(), asked.readable()
    else:
        sample["prompt"] = asked
    for role, field in (("prompt", prompt), ("answer", answer)):
        if not sample[role].strip():
            raise DataError(f"{place} has an empty {_label(field, role)}; fill it or remove the row.")
    sample["instruction"] = _instruction(row, instruction, place)
    if not sample["prompt_messages"] and not sample["prompt"].startswith(sample["instruction"]):
        raise DataError(
            f"{place} has an instruction that the prompt does not begin with: "
            f"{_brief(sample['instruction'])}; put it at the start of the prompt, or pass "
            "instruction=None."
        )
    return sample


def dataset_of(samples: Iterable[Mapping[str, str]]) -> Dataset:
    """A Dataset with prompt, answer and, when any sample has one, instruction and prompt_messages."""
    from datasets import Dataset, Features, Value

    samples = list(samples)
    optional = [name for name in ("instruction", "prompt_messages") if any(sample.get(name) for sample in samples)]
    columns = ["prompt", "answer", *optional]
    data = {name: [sample.get(name, "") for sample in samples] for name in columns}
    return Dataset.from_dict(data, features=Features({name: Value("string") for name in columns}))


def _check_depth(row: Any, place: str) -> None:
    """Refuse what is nested so deeply, or holds itself, that looking through it would not end well."""
    ahead = [(row, 0)]
    while ahead:
        value, depth = ahead.pop()
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if inner and depth >= _DEEPEST:
            raise DataError(f"{place} is nested more than {_DEEPEST} levels deep; a sample is a flat object of texts.")
        ahead += [(each, depth + 1) for each in inner]


def _value(row: Mapping[str, Any], field: Field, role: str, place: str) -> Any:
    if callable(field):
        return plain(field(row))
    if field in row:
        return plain(row[field])
    close = closest(field, row)
    rename = f"rename {close!r} to {field!r}, " if close else ""
    raise DataError(
        f"{place} has no key {shown(field, 60)}, the {role}, but {listed(map(shown, row))}; "
        f"{rename}add it, or name the key that holds the {role}."
    )


def _checked_string(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {_brief(value)}, not a string; {_how_to_text(value)}.")
    return check_text(value, what, place)


def _how_to_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "fill it or remove the row"
    if isinstance(value, int):
        return "convert it to text (of a label, its name: answer=lambda row: names[row['label']])"
    return "decode it" if isinstance(value, bytes) else "convert it to text"


def _text(row: Mapping[str, Any], field: Field, role: str, place: str) -> str:
    return _checked_string(_value(row, field, role, place), _label(field, role), place)


def _prompt(row: Mapping[str, Any], field: Field, place: str) -> str | Conversation:
    if row.get("prompt_messages") and isinstance(row["prompt_messages"], str):
        # A sample of a task that is read once more.
        known = Conversation.from_json(row["prompt_messages"], place)
        asked = {"tools": known.tools, "chat_template_kwargs": known.settings}
        return _conversation(list(known.messages), asked, "'prompt_messages'", place)
    value, label = _listed_messages(_value(row, field, "prompt", place)), _label(field, "prompt")
    if not isinstance(value, list):
        return _checked_string(value, label, place)
    return _conversation(value, row, label, place)


def _conversation(messages: list[Any], row: Mapping[str, Any], label: str, place: str) -> Conversation:
    if not messages:
        raise DataError(f"{place}: {label} is a list without messages; give one at least.")
    checked = [_message(message, f"{place}: message {index} of {label}") for index, message in enumerate(messages)]
    return Conversation(checked, _tools(row, place), _template_settings(row, place))


def _listed_messages(value: Any) -> Any:
    """Messages one by one; a column of sequences has them as {'role': all roles, 'content': all contents}."""
    if not isinstance(value, Mapping) or not {"role", "content"} <= set(value):
        return value
    columns = {key: plain(own) for key, own in value.items()}
    if not all(isinstance(own, list) for own in columns.values()) or len({len(own) for own in columns.values()}) > 1:
        return value
    return [dict(zip(columns, own, strict=True)) for own in zip(*columns.values(), strict=True)]


def _answer(row: Mapping[str, Any], field: Field, place: str) -> str:
    value, label = _listed_messages(_value(row, field, "answer", place)), _label(field, "answer")
    if not isinstance(value, list):
        return _checked_string(value, label, place)
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in value]
    if roles != ["assistant"]:
        authors = listed(map(_brief, roles)) if roles else "nobody"
        raise DataError(
            f"{place}: {label} is a list of messages by {authors}; it must be the assistant's one message, or a string."
        )
    for key, beside in value[0].items():
        if key not in ("role", "content", "name", "weight") and beside:
            raise DataError(
                f"{place}: the assistant's message in {label} has {_brief(key)}, which would not be trained: an answer "
                f"is the text in its content; write it there as the model is to write it."
            )
    return _checked_string(plain(value[0].get("content")), f"'content' of {label}", place)


def _split_messages(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The row with prompt and answer instead of messages."""
    messages = _listed_messages(plain(row["messages"]))
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{place}: 'messages' is {_brief(messages)}; it must be a list of two messages or more, the last of which "
            f"is the assistant's answer."
        )
    last = messages[-1]
    role = last.get("role") if isinstance(last, Mapping) else None
    if role != "assistant":
        raise DataError(
            f"{place}: 'messages' ends with a message by {_brief(role)}; it must end with the assistant's answer."
        )
    return {**row, "prompt": messages[:-1], "answer": messages[-1:]}


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message as the chat template gets it; keys without a value, as columns of a Dataset have, are left out."""
    message = plain(message)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{place} is {_brief(message)}; it must be an object with role and content.")
    if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
        raise DataError(f"{place}: 'content' is {_brief(message.get('content'))}, not a string; convert it to text.")
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    return _checked_tree(kept, place)


def _tools(row: Mapping[str, Any], place: str) -> list[Any] | None:
    tools = plain(row.get("tools"))
    if isinstance(tools, str):
        try:
            tools = parse_json(tools, f"{place}: 'tools'")
        except DataError as error:
            raise DataError(
                f"{place}: 'tools' is {_brief(row['tools'])}, not a list, nor JSON of one ({error})."
            ) from None
        _check_depth(tools, f"{place}: 'tools'")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{place}: 'tools' is {_brief(tools)}, not a list, nor JSON of one.")
    return _checked_tree(tools, f"{place}: 'tools'") or None


def _template_settings(row: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    """What the row sets for the chat template; keys without a value, as columns of a Dataset have, are left out."""
    settings = row.get("chat_template_kwargs")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise DataError(f"{place}: 'chat_template_kwargs' is {_brief(settings)}, not an object of settings.")
    kept = {key: value for key, value in settings.items() if value is not None}
    return _checked_tree(kept, f"{place}: 'chat_template_kwargs'") or None


def _checked_tree(value: Any, place: str) -> Any:
    """Plain JSON values with every text in them checked."""
    value = plain(value)
    if isinstance(value, str):
        return check_text(value, "a text", place)
    if isinstance(value, Mapping):
        return {
            check_text(key if isinstance(key, str) else shown(key), "a key", place): _checked_tree(
                own, f"{place}, {_brief(key, 30)}"[:_LONGEST_PLACE]
            )
            for key, own in value.items()
        }
    if isinstance(value, list):
        return [_checked_tree(own, place) for own in value]
    if value is None or (isinstance(value, int | float) and _is_writable(value)):
        return value
    raise DataError(f"{place} holds {_brief(value)}, a {type(value).__name__}, which is no JSON; convert it to text.")


def _is_writable(number: int | float) -> bool:
    """Whether a number is one in JSON, too: finite, and of no more digits than Python writes out."""
    return abs(number) < 10**4000 if isinstance(number, int) else math.isfinite(number)


def _instruction(row: Mapping[str, Any], field: Field | None, place: str) -> str:
    if field is None:
        return ""
    if not callable(field) and row.get(field) is None:
        return ""
    return _text(row, field, "instruction", place)


def _label(field: Field, role: str) -> str:
    """How a message calls the text of a sample: its role, and its key where that differs."""
    return f"{role} (key {_brief(field)})" if isinstance(field, str) and field != role else repr(role)


def _brief(value: Any, limit: int = 60) -> str:
    return shown(value, limit)

"""One sample of a task: finding its texts in a row, and refusing what is no sample.

Every refusal names the place: file and line, or task, split and index. Imports
`seekr_peft.errors`, `seekr_peft.inputs` and `tasks.text`; `datasets` inside functions.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seekr_peft.errors import DataError
from seekr_peft.inputs import check_media
from seekr_peft.paths import special_kind
from seekr_peft.tasks.text import Conversation

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


def check_text(text: str, what: str, place: str) -> str:
    """``text`` as it is, unless it cannot be written as UTF-8.

    Raises:
        DataError: it has a half of a surrogate pair, as JSON may have with "\\ud83d".
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {what} has at character {error.start} {text[error.start]!r}, half of a surrogate pair, which is "
            f"no character and cannot be written as UTF-8; replace it, or mend what cut the text."
        ) from error
    return text


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
        if kind := special_kind(path):
            raise DataError(f"{path} {kind}; give a file.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _value(row: Mapping[str, Any], field: Field, role: str, place: str) -> Any:
    if callable(field):
        return field(row)
    if field in row:
        return row[field]
    present = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"{place} has no key {field!r}, the {role}, but {present}; "
        f"{_rename(field, row)}add it, or name the key that holds the {role}."
    )


def _checked_string(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {_brief(value)}, not a string; convert it to text.")
    return check_text(value, what, place)


def _text(row: Mapping[str, Any], field: Field, role: str, place: str) -> str:
    return _checked_string(_value(row, field, role, place), _label(field, role), place)


def _prompt(row: Mapping[str, Any], field: Field, place: str) -> str | Conversation:
    if row.get("prompt_messages") and isinstance(row["prompt_messages"], str):
        # A sample of a task that is read once more.
        return Conversation.from_json(row["prompt_messages"])
    value, label = _value(row, field, "prompt", place), _label(field, "prompt")
    if not isinstance(value, list):
        return _checked_string(value, label, place)
    if not value:
        raise DataError(f"{place}: {label} is a list without messages; give one at least.")
    messages = [_message(message, f"{place}: message {index} of {label}") for index, message in enumerate(value)]
    return Conversation(messages, _tools(row, place), _template_settings(row, place))


def _answer(row: Mapping[str, Any], field: Field, place: str) -> str:
    value, label = _value(row, field, "answer", place), _label(field, "answer")
    if not isinstance(value, list):
        return _checked_string(value, label, place)
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in value]
    if roles != ["assistant"]:
        raise DataError(
            f"{place}: {label} is a list of messages by {', '.join(map(repr, roles)) or 'nobody'}; it must be the "
            f"assistant's one message, or a string."
        )
    for key, beside in value[0].items():
        if key not in ("role", "content", "name", "weight") and beside:
            raise DataError(
                f"{place}: the assistant's message in {label} has {key!r}, which would not be trained: an answer is "
                f"the text in its content; write it there as the model is to write it."
            )
    return _checked_string(value[0].get("content"), f"'content' of {label}", place)


def _split_messages(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The row with prompt and answer instead of messages."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{place}: 'messages' is {_brief(messages)}; it must be a list of two messages or more, the last of which "
            f"is the assistant's answer."
        )
    last = messages[-1]
    role = last.get("role") if isinstance(last, Mapping) else None
    if role != "assistant":
        raise DataError(
            f"{place}: 'messages' ends with a message by {role!r}; it must end with the assistant's answer."
        )
    return {**row, "prompt": messages[:-1], "answer": messages[-1:]}


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message as the chat template gets it; keys without a value, as columns of a Dataset have, are left out."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{place} is {_brief(message)}; it must be an object with role and content.")
    if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
        raise DataError(f"{place}: 'content' is {_brief(message.get('content'))}, not a string; convert it to text.")
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    return _checked_tree(kept, place)


def _tools(row: Mapping[str, Any], place: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise DataError(f"{place}: 'tools' is {_brief(row['tools'])}, not a list, nor JSON of one.") from None
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
    if isinstance(value, str):
        return check_text(value, "a text", place)
    if isinstance(value, Mapping):
        return {
            check_text(str(key), "a key", place): _checked_tree(own, f"{place}, {key!r}") for key, own in value.items()
        }
    if isinstance(value, list):
        return [_checked_tree(own, place) for own in value]
    if value is None or isinstance(value, int | float):
        return value
    raise DataError(f"{place} holds {_brief(value)}, a {type(value).__name__}, which is no JSON; convert it to text.")


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

"""JSON that people write: read as they can have meant it, or refused by its place.

Python's own reader takes the last of two keys of one name without a word, and fails in ways of its own on a number of
thousands of digits and on deep nesting.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..errors import DataError, cut, shown


def parse_json(text: str, place: str, line: int | None = None) -> Any:
    """The value of a JSON text in which no object has a key twice.

    Args:
        place: begins the message.
        line: the text's own place in the file, where it is one line.

    Raises:
        DataError: no JSON, a key that comes twice, a number or a nesting beyond what can be read.
    """
    repeated: list[tuple[dict[str, Any], str]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.append((found, first_repeated(key for key, _ in pairs) or ""))
        return found

    own = place if line is None else f"{place}, line {line}"
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where = f"{place}, line {error.lineno if line is None else line}"
        beginning = "" if line is None else f": {shown(text, 60)}"
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno}){beginning}.") from error
    except RecursionError as error:
        raise DataError(f"{own} is nested too deeply to be read; write it with fewer levels.") from error
    except ValueError as error:
        # The one other that int() raises, for thousands of digits.
        raise DataError(f"{own} holds a number of too many digits to be read; write it as text.") from error
    if repeated:
        found, key = repeated[0]
        where = _way_to(found, value)
        raise DataError(
            f"{own}{f', at {cut(where, 80)}' if where else ''} has the key {shown(key, 60)} more than once in one "
            f"object; keep one of them."
        )
    return value


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before; None where all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _way_to(wanted: Any, value: Any) -> str:
    """The indices and keys that lead to an object inside ``value``, as in ``[3]['tools']``."""
    ahead = [(value, "")]
    while ahead:
        current, way = ahead.pop()
        if current is wanted:
            return way
        items = (
            current.items() if isinstance(current, dict) else enumerate(current if isinstance(current, list) else ())
        )
        ahead += [(inner, f"{way}[{shown(key, 40)}]") for key, inner in items if isinstance(inner, dict | list)]
    return ""

"""What a setting of a library may be, by its annotation and by the lists of its choices: in words, and as a test."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .library_fields import compile_backends, report_integrations, training_choices


@dataclass(frozen=True)
class Kind:
    """A type, in words (None needs none) and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether ``value`` is finite, and no truth value."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PLAIN = {
    "int": Kind("a whole number", _is_whole),
    "float": Kind("a number", is_number),
    "bool": Kind("true or false", lambda value: isinstance(value, bool)),
    "str": Kind("text", lambda value: isinstance(value, str)),
    "dict": Kind("a mapping", lambda value: isinstance(value, dict)),
    "list": Kind("a list", lambda value: isinstance(value, list)),
    "tuple": Kind("a list", lambda value: isinstance(value, list)),
    "Any": Kind("any value", lambda value: True),
}
_MANY = {"int": "whole numbers", "str": "text", "float": "numbers", "bool": "true or false"}


@cache
def kind_of(annotation: str) -> Kind:
    """What an annotation allows; of a class that no YAML can write, nothing."""
    return _of(ast.parse(annotation, mode="eval").body)


def _of(node: ast.expr) -> Kind:
    if isinstance(node, ast.BinOp):
        return _either([_of(node.left), _of(node.right)])
    if isinstance(node, ast.Constant):
        return Kind("", lambda value: value is None)
    if not isinstance(node, ast.Subscript):
        return _PLAIN.get(ast.unparse(node), Kind("", lambda value: False))
    name = ast.unparse(node.value)
    parts = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return _one_of([part.value for part in parts if isinstance(part, ast.Constant)])
    if name in ("Optional", "Union"):
        return _either([*map(_of, parts), *([_of(ast.Constant(None))] if name == "Optional" else [])])
    inner = _of(parts[-1])
    what = f"{_PLAIN[name].words} of {_MANY.get(ast.unparse(parts[-1]), inner.words)}"
    if inner is _PLAIN["Any"]:
        return _PLAIN[name]
    return Kind(what, lambda value: _PLAIN[name].holds(value) and each(inner.holds)(value))


def _either(kinds: list[Kind]) -> Kind:
    words = " or ".join(dict.fromkeys(kind.words for kind in kinds if kind.words))
    return Kind(words, lambda value: any(kind.holds(value) for kind in kinds))


def _one_of(values: list[Any]) -> Kind:
    words = "one of " + ", ".join(map(str, values))
    return Kind(words, lambda value: any(type(value) is type(one) and value == one for one in values))


LISTS = frozenset({"report_to", "torch_compile_backend"})
"""Settings of TrainingArguments whose choices are lists of other modules."""


def choice(key: str, value: Any) -> Kind | None:
    """Of a setting whose choices are not in its annotation."""
    if key in training_choices():
        choices = training_choices()[key]
        if key != "debug":
            return Kind(_one_of(choices).words, lambda value: isinstance(value, str) and value in choices)
        return Kind(f"one or more of {', '.join(choices)}", lambda value: _are_in(_parts(value), choices))
    if key == "torch_compile_backend" and value is not None:
        return _one_of(compile_backends())
    if key == "report_to" and value not in (None, "none", "all", [], ["none"], ["all"]):
        known = report_integrations()
        words = f"none, all, or one or more of {', '.join(known)}"
        return Kind(words, lambda value: _are_in([value] if isinstance(value, str) else value, known))
    return None


def _parts(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def _are_in(value: Any, choices: list[str]) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) and part in choices for part in value)


def each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether ``holds`` is true of every entry of a list, or every value of a mapping."""
    return lambda value: all(map(holds, value.values() if isinstance(value, Mapping) else value))

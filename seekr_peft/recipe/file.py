"""A recipe's plain mapping from a file or a caller: YAML, ``extends``, overrides and the environment's variables.

Written here, and not taken from OmegaConf, since that has another syntax, takes YAML without bounds, and stops at the
first mistake.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, cut, shown
from ..files.yaml_text import DEEPEST, MOST_NODES, UNSAFE, YamlTextError, parse_yaml, read_yaml

_LONGEST_CHAIN = 20
"""Recipes that extend each other."""
_LARGEST_NUMBER = 10**18
"""No setting is larger, and any library takes it."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_PLAIN_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def plain_mapping(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    """The recipe of a file or mapping, with what it extends, its overrides and its variables filled in: values of its
    own, which nothing has checked yet. What is wrong with an override or a variable is added to ``problems``.

    Raises:
        ConfigError: A file cannot be read or is no mapping, or the mapping holds more than any recipe needs.
    """
    # Copied, since an alias makes two places one.
    mapping = _Copy().of(_read_extended(source) if isinstance(source, (str, Path)) else source)
    for override in overrides:
        _override(mapping, override, problems)
    expanded: dict[str, Any] = _expanded(mapping, problems)
    return expanded


def read_mapping(path: Path) -> dict[str, Any]:
    """What the file ``path`` itself holds, without what it extends; ConfigError as of ``plain_mapping``."""
    mapping: dict[str, Any] = _Copy().of(_read_yaml(path))
    return mapping


def _read_extended(path: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's mapping, laid over that of the file it extends."""
    mapping = _read_yaml(path)
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    own = os.path.realpath(path)
    if not isinstance(parent, str) or not parent or own in seen or len(seen) == _LONGEST_CHAIN:
        raise ConfigError(
            f"recipe {cut(str(path))}: extends is {shown(parent)}; give another recipe's file name, of one that "
            f"does not extend this one in turn."
        )
    return _laid_over(_read_extended(Path(path).parent / parent, (*seen, own)), mapping)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` with what only ``below`` says; sections are merged key by key, everything else is replaced."""
    both = {key: below[key] for key in below.keys() & above.keys()}
    merged = {
        key: _laid_over(value, above[key]) if isinstance(value, dict) and isinstance(above[key], dict) else above[key]
        for key, value in both.items()
    }
    return {**below, **above, **merged}


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        document = read_yaml(Path(path))
    except YamlTextError as error:
        raise ConfigError(f"recipe {cut(str(path))} {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"recipe {cut(str(path))} must be a mapping with the keys model, tasks, ..., got {type(document).__name__}."
        )
    return document


def _override(mapping: dict[str, Any], override: str, problems: list[str]) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts) or len(parts) > DEEPEST or UNSAFE.search(key):
        problems.append(
            f"override {shown(override)} must have the form section.key=value, as in training.learning_rate=1e-4."
        )
        return
    try:
        value = parse_yaml(text)
    except YamlTextError as error:
        problems.append(f"override {shown(override)}: the value {shown(text)} {error}")
        return
    target = mapping
    for part in parts[:-1]:
        nested = target.setdefault(part, {})
        if not isinstance(nested, dict):
            problems.append(f"override {shown(override)}: {cut(part, 60)} is {shown(nested)}, not a section.")
            return
        target = nested
    target[parts[-1]] = value


def _expanded(value: Any, problems: list[str], where: str = "") -> Any:
    """Fill in ``${NAME:-default}`` from the environment, and read 1e-4 as a number (YAML 1.1 calls it text)."""
    if isinstance(value, dict):
        return {key: _expanded(item, problems, _dotted(where, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, problems, where) for item in value]
    if not isinstance(value, str):
        return value
    # Behind the last one nothing ends, and each "${" would be looked through to the end.
    end = value.rfind("}") + 1
    for match in _VARIABLE.finditer(value, 0, end):
        if match[2] is None and match[1] not in os.environ:
            problems.append(
                f"{cut(where)}: the environment variable {match[1]} is not set; set it, or write "
                f"${{{match[1]}:-default}}."
            )
    filled = _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2] or "", value[:end]) + value[end:]
    if filled != value:
        # "${STEPS:-100}" means the number, as it would without the variable.
        filled = _scalar(filled)
        if isinstance(filled, str) and UNSAFE.search(filled):
            problems.append(f"{cut(where)}: {shown(filled)} holds control characters; set its variables anew.")
    return float(filled) if isinstance(filled, str) and _PLAIN_FLOAT.fullmatch(filled) else filled


def _scalar(text: str) -> Any:
    """``text`` as YAML reads it where that is a number or a truth value, else itself."""
    try:
        value = parse_yaml(text)
    except YamlTextError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


class _Copy:
    """Plain values of its own, of a mapping that anybody made: in bounds as those of a file are."""

    def __init__(self) -> None:
        self._left = MOST_NODES

    def of(self, value: Any, where: str = "", depth: int = 0) -> Any:
        self._left -= 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if depth > DEEPEST or self._left < 0:
            raise ConfigError(
                f"recipe: {cut(where)} holds more than {DEEPEST} levels or {MOST_NODES} values; no recipe needs them."
            )
        if isinstance(value, Mapping):
            return {self._key(key, where): self.of(item, _dotted(where, key), depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.of(item, where, depth + 1) for item in value]
        why = _why_no_value(value)
        if why:
            raise ConfigError(f"{cut(where)}: {shown(value)} {why}.")
        return value

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str) or UNSAFE.search(key):
            raise ConfigError(f"{cut(where) or 'recipe'}: the key {shown(key)} is no plain text; write it in quotes.")
        return key


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{cut(str(key), 60)}".lstrip(".")


def _why_no_value(value: Any) -> str | None:
    if isinstance(value, str):
        return "holds control characters; leave them out" if UNSAFE.search(value) else None
    if value is None or isinstance(value, bool | float):
        return None
    if isinstance(value, int):
        return "is too large; give a smaller number" if abs(value) > _LARGEST_NUMBER else None
    return f"is of the type {type(value).__name__}; give text, numbers, truth values, lists and mappings of them"

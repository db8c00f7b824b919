"""YAML that nobody has looked at, read within bounds: plain values, or one sentence.

What YAML allows and a recipe never needs is refused before it is made: keys that are given twice, aliases that stand
for more than was written, depth, numbers that are too long, tags, and characters that no terminal should get.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ..errors import cut, shown

LARGEST_FILE = 256 * 1024
"""Bytes; PyYAML reads as much in about a second."""
DEEPEST = 20
"""Collections inside each other."""
MOST_NODES = 10_000
"""Values, with every alias counted as what it stands for, and every 100 characters of a text as one more."""
LONGEST_NUMBER = 100
"""Characters."""

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that no text of a recipe may hold: controls but tab and line ends, and halves of surrogate pairs, which
no file can be written with. YAML itself refuses them, unless they are written as ``"\\0"``."""

_CORE = "tag:yaml.org,2002:"
_INT, _FLOAT, _STR, _MERGE = (_CORE + kind for kind in ("int", "float", "str", "merge"))
_PLAIN_TAGS = {None, "!", *(_CORE + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq"))}
_TEXT_HERE = {_CORE + "timestamp", _CORE + "value"}
"""What YAML 1.1 makes of ``2024-01-31`` and ``=`` without being asked: no setting is a date."""


class YamlTextError(ValueError):
    """What is wrong, as the rest of a sentence that begins with the file's name; one line."""


def read_yaml(path: Path, controls: bool = False) -> Any:
    """The plain value in the file ``path``: dictionaries with text as keys, lists, text, numbers, truth values, None.

    Args:
        controls: Whether a text may hold control characters, as the name of a run's own folder may.

    Raises:
        YamlTextError: The file cannot be read (anything but a regular file is never waited for), or is no such YAML.
    """
    return parse_yaml(_read_text(path), controls)


def parse_yaml(text: str, controls: bool = False) -> Any:
    """The plain value that ``text`` stands for, as of ``read_yaml``.

    Raises:
        YamlTextError: It is no YAML, or more than a recipe needs.
    """
    if len(text) > LARGEST_FILE:
        raise YamlTextError(f"holds {len(text)} characters, more than the {LARGEST_FILE} of the longest recipe.")
    try:
        return _Loader(text, controls).get_single_data()
    except yaml.YAMLError as error:
        raise YamlTextError(f"is not YAML: {cut(_one_line(error))}") from error


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(LARGEST_FILE + 1) if regular else b""
    except (OSError, ValueError) as error:
        # A ValueError: a path with a NUL, or of characters that no file name has.
        why = getattr(error, "strerror", None) or error
        raise YamlTextError(f"cannot be read: {why}; give the path of a YAML file.") from error
    if not regular:
        raise YamlTextError("cannot be read: it is no regular file; give the path of a YAML file.")
    if len(content) > LARGEST_FILE:
        raise YamlTextError(f"is longer than {LARGEST_FILE} bytes; no recipe is: give the path of a YAML file.")
    try:
        # With the mark that some editors begin a file with.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlTextError(
            f"is not YAML: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from error


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes into would be waited for.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    words = " ".join(": ".join(filter(None, (getattr(error, "context", None), problem))).split())
    return f"{cut(words, 160)} (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses, where it composes a node, what it should not make."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] not in _TEXT_HERE]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, controls: bool) -> None:
        super().__init__(text)
        self._controls = controls
        self._depth = self._nodes = 0
        self._sizes: dict[str, int | None] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            size = self._sizes.get(name, 1)
            if size is None:
                raise _refused(event, f"the alias *{cut(name, 60)} stands for something that holds it")
            self._count(event, size)
            return super().compose_node(parent, index)
        if event.tag not in _PLAIN_TAGS:
            raise _refused(event, f"the tag {cut(event.tag, 60)} is not allowed; leave it out")
        before = self._nodes
        self._count(event, 1 + len(getattr(event, "value", "")) // 100)
        self._depth += 1
        if self._depth > DEEPEST:
            raise _refused(event, f"there are more than {DEEPEST} levels of lists and sections inside each other")
        if event.anchor is not None:
            self._sizes[event.anchor] = None
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        self._depth -= 1
        return node

    def _count(self, event: Any, size: int) -> None:
        self._nodes += size
        if self._nodes > MOST_NODES:
            raise _refused(event, f"there are more than {MOST_NODES} values, aliases counted as what they stand for")

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in (_INT, _FLOAT) and len(node.value) > LONGEST_NUMBER:
            raise _refused(node, f"a number has more than {LONGEST_NUMBER} characters")
        if not self._controls and UNSAFE.search(node.value):
            raise _refused(node, f"the text {shown(node.value, 60)} holds control characters; leave them out")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (_STR, _MERGE):
                named = cut(str(key.value), 60) if isinstance(key, yaml.ScalarNode) else "of several values"
                raise _refused(key, f"the key {named} is no text; write it in quotes")
            line = key.start_mark.line + 1
            if key.value in lines:
                twice = f"the key {cut(key.value, 60)} is given twice, in line {lines[key.value]} and in line {line}"
                raise _refused(key, f"{twice}; keep one of them")
            lines[key.value] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # Such as !!int x.
            raise _refused(node, f"{shown(node.value, 60)} is no {node.tag.removeprefix(_CORE)}") from error


def _refused(place: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)

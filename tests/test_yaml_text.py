"""YAML within bounds: what it refuses is one line, soon, and what people write is read as PyYAML reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from seekr_peft.files.yaml_text import LARGEST_FILE, MOST_NODES, YamlTextError, parse_yaml, read_yaml


def bomb(levels: int, of: str = "[{}]") -> str:
    """Each level is nine times the one before; ``of`` writes a level."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {of.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, levels)]
    return "\n".join(lines)


def refusal(text: str) -> str:
    with pytest.raises(YamlTextError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert len(message) < 400 and message.isprintable(), message
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nseed: 2",
            "the key seed is given twice, in line 1 and in line 2; keep one of them (line 2, column 1)",
        ),
        ("a: {b: [{c: 1, d: 2,\n c: 3}]}", "the key c is given twice, in line 1 and in line 2"),
        ('a: 1\n"a": 2', "the key a is given twice, in line 1 and in line 2"),
        ("&x a: 1\n\n*x : 2", "the key a is given twice, in line 1 and in line"),
        ("<<: {a: 1}\n<<: {b: 2}", "the key << is given twice"),
        ("x: {<<: {a: 1, a: 2}}", "the key a is given twice"),
        ("k" * 900 + ": 1\n" + "k" * 900 + ": 2", "kkk...kkk"),
        (bomb(10), f"more than {MOST_NODES} values"),
        (bomb(10, "{{<<: [{}]}}"), f"more than {MOST_NODES} values"),
        ("x: &x [" + "y, " * 500 + "]\nz: [" + "*x, " * 500 + "]", f"more than {MOST_NODES} values"),
        (f"x: &x {'y' * 50_000}\nz: [" + "*x, " * 500 + "]", f"more than {MOST_NODES} values"),
        ("a: &a [*a]", "the alias *a stands for something that holds it (line 1, column 8)"),
        ("&a {b: {c: [*a]}}", "the alias *a stands for something that holds it"),
        ("a: *b", "undefined alias"),
        ("[" * 100_000, "more than 20 levels"),
        ("{a: " * 50_000, "more than 20 levels"),
        ("- " * 100_000, "more than 20 levels"),
        ("? " * 100_000, "more than 20 levels"),
        ("a: " + "9" * 5000, "a number has more than 100 characters (line 1, column 4)"),
        ("a: -" + "9" * 5000, "a number has more than 100"),
        ("a: 1." + "9" * 5000, "a number has more than 100"),
        ("a: 1.0e+" + "9" * 5000, "a number has more than 100"),
        ("a: 0x" + "f" * 5000, "a number has more than 100"),
        ("a: 0b" + "1" * 5000, "a number has more than 100"),
        ("a: 0" + "7" * 5000, "a number has more than 100"),
        ("a: 1" + ":59" * 2000, "a number has more than 100"),
        ("a: 1" + "_000" * 2000, "a number has more than 100"),
        ("a: !!int " + '"' + "9" * 5000 + '"', "a number has more than 100"),
        ("a: !!float x", "'x' is no float"),
        ('a: !!int ""', "'' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: 0x_", "'0x_' is no int"),
        ("a: !!int {}", "expected a scalar node, but found mapping"),
        ("a: !!map [1]", "expected a mapping node, but found sequence"),
        ("a: \0", "special characters are not allowed"),
        ("a: \x1b[31m", "special characters are not allowed"),
        ('a: "\\0"', "the text '\\x00' holds control characters"),
        ('a: "\\e[31m"', "holds control characters"),
        ('a: "\\ud800"', "holds control characters"),
        ('"\\x07": 1', "holds control characters"),
        (
            "!!python/object/apply:os.getcwd []",
            "the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not allowed",
        ),
        ("a: !!python/name:os.system", "is not allowed; leave it out"),
        ("a: !!binary aGk=", "the tag tag:yaml.org,2002:binary is not allowed; leave it out (line 1, column 4)"),
        ("a: !!set {b}", "the tag tag:yaml.org,2002:set is not allowed"),
        ("a: !!omap [b: 1]", "the tag tag:yaml.org,2002:omap is not allowed"),
        ("a: !!timestamp x", "the tag tag:yaml.org,2002:timestamp is not allowed"),
        ("a: !own x", "the tag !own is not allowed"),
        ("a: !<" + "x" * 5000 + "> 1", "is not allowed"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("%YAML 2.0\n---\na: 1", "incompatible YAML document"),
        ("1: x", "the key 1 is no text; write it in quotes"),
        ("on: x", "the key on is no text; write it in quotes"),
        ("1.5: x", "the key 1.5 is no text"),
        ("? [a]\n: 1", "the key of several values is no text"),
        ("<<: 5", "expected a mapping or list of mappings for merging"),
        ("a: [", "expected the node content"),
        ("\ta: 1", "cannot start any token"),
        ("a: *" + "b" * 100_000, "undefined alias"),
        ("x" * (LARGEST_FILE + 1), f"more than the {LARGEST_FILE} of the longest recipe"),
        ("".join(f"k{n}: 1\n" for n in range(20_000)), f"more than {MOST_NODES} values"),
    ],
    ids=lambda value: value[:40].encode("ascii", "replace").decode().replace("\0", "0").replace("\x1b", "e"),
)
def test_what_no_recipe_needs_is_one_line(text: str, message: str) -> None:
    start, _, end = message.partition("...")
    found = refusal(text)
    assert start in found and end in found


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_reads_as_before(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# only words", None),
        ("a: [1, 2.5, true, no, null, ~, x, 'y', \"z\", 0x10, 1_000, .inf]", None),
        ("base: &b {r: 8, list: [1, 2]}\nown: {<<: *b, r: 16}\nlist: *b", None),
        ("one: &o {a: 1}\ntwo: &t {b: 2}\nboth: {<<: [*o, *t], a: 3}", None),
        ("a: |\n  several\n  lines\nb: >\n  folded\n  text\n", None),
        ("a: !!str 5\nb: ! x\nc: !!int '7'", None),
        ("ünïcödé: 日本 😀\n'<<': x", None),
        ("%YAML 1.2\n---\na: 1\n...\n", None),
        ('{"json": [1, 2.5e3, "x\\ty", null, true]}', None),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 2020-99-99", {"a": "2020-99-99"}),
        ("a: =", {"a": "="}),
    ],
)
def test_what_people_write_reads_as_pyyaml_reads_it_and_dates_are_text(text: str, value: Any) -> None:
    assert parse_yaml(text) == (yaml.safe_load(text) if value is None else value)


def test_an_alias_within_bounds_is_read() -> None:
    assert parse_yaml(bomb(4)) == yaml.safe_load(bomb(4))


# Files --------------------------------------------------------------------------------------------------------------


def file_refusal(path: Path) -> str:
    with pytest.raises(YamlTextError) as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff\xfe", "byte 3 is not UTF-8 (invalid start byte); save the file as UTF-8."),
        ("a: 1".encode("utf-16"), "byte 0 is not UTF-8"),
        ("a: 1".encode("utf-16-le"), "special characters are not allowed"),
        (b"a: 1\x00", "special characters are not allowed"),
        (b"#" * (LARGEST_FILE + 1), f"is longer than {LARGEST_FILE} bytes"),
    ],
)
def test_bytes_that_are_no_recipe_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert message in file_refusal(path)


def test_the_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("seed: 1".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "a.yaml") == {"seed": 1}


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "pipe", "cannot be read: it is no regular file; give the path of a YAML file."),
        (Path("/dev/zero"), "it is no regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "nowhere", "No such file or directory"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("a\0b"), "embedded null byte"),
        (Path("a\ud800"), "surrogates not allowed"),
    ):
        assert message in file_refusal(path), path


def test_a_link_to_a_recipe_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    assert read_yaml(tmp_path / "b.yaml") == {"seed": 1}

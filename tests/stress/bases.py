"""Damaged base models: every file of the demo's base flipped, cut, emptied, swapped, rewritten, removed or replaced.

A bit inside of a weight is another weight: that such a base is loaded is right. Everything else is refused by name.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import SeekrError
from seekr_peft.modeling import load_model
from seekr_peft.recipe import Recipe

LONGEST_MESSAGE = 1500
FILES = tuple(sorted(path.name for path in Path(BASE_PATH).iterdir() if path.is_file()))
_VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", 0, -1, 1.5, True, 10**9, 10**30, [1], {"a": 1}, "\x1b[31m", float("nan"), [[]],
)  # fmt: skip
_TEXTS = (
    "null", "[]", '"x"', "7", "", "{", "\ufeff{}", "[" * 5000, '{"a":' * 3000, '{"a": ' + "9" * 5000 + "}", "{}\x00",
    "{}",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One damage to ``file``: its ``kind``, and a ``seed`` for where and how."""

    file: str
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.file}, {self.kind}, seed {self.seed}"


KINDS = (
    "flipped",
    "cut",
    "emptied",
    "removed",
    "a folder",
    "a loop of links",
    "swapped",
    "another text",
    "another value",
)


def mutations(seed: int, count: int) -> Iterator[Case]:
    """``count`` damages, the same ones for the same ``seed``."""
    rng = random.Random(seed)
    for _ in range(count):
        yield Case(rng.choice(FILES), rng.choice(KINDS), rng.randrange(2**32))


def check_one(case: Case, folder: Path) -> str:
    """Load the base with that damage: "accepted", "refused", "unclear" (a message that is long, of several lines or
    names neither folder nor file) or "traceback"."""
    return look(case, folder)[0]


def look(case: Case, folder: Path) -> tuple[str, str]:
    """The verdict, and the message."""
    base = folder / "base"
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(BASE_PATH, base)
    _damage(base, case)
    recipe = Recipe.model_validate(
        {"model": {"name_or_path": str(base), "quantization": "none"}, "tasks": {"format": "demo"}}
    )
    try:
        load_model(recipe)
    except SeekrError as error:
        text = str(error)
        clear = len(text) <= LONGEST_MESSAGE and "\n" not in text and (case.file in text or str(base) in text)
        return ("refused" if clear and text.isprintable() else "unclear"), text
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "accepted", ""


def _damage(base: Path, case: Case) -> None:
    rng, path = random.Random(case.seed), base / case.file
    content = bytearray(path.read_bytes())
    if case.kind == "flipped":
        # The beginning of a file of tensors is its header.
        limit = len(content) if rng.random() < 0.5 else min(len(content), 200)
        content[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif case.kind == "cut":
        path.write_bytes(content[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content)), len(content) - 1])])
    elif case.kind == "emptied":
        path.write_bytes(b"")
    elif case.kind == "removed":
        path.unlink()
    elif case.kind == "a folder":
        path.unlink()
        path.mkdir()
    elif case.kind == "a loop of links":
        path.unlink()
        os.symlink(path, path)
    elif case.kind == "swapped":
        other = base / rng.choice([name for name in FILES if name != case.file])
        path.write_bytes(other.read_bytes())
    elif case.kind == "another text":
        path.write_text(rng.choice(_TEXTS), encoding="utf-8")
    elif path.suffix == ".json":
        _another_value(path, rng)


def _another_value(path: Path, rng: random.Random) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key]) or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(_VALUES)
    path.write_text(json.dumps(document), encoding="utf-8")

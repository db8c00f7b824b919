"""Damaged base models: ``python -m stress.bases SEED COUNT`` in ``tests`` prints one line of counts.

Every file of a copy of the demo's base is flipped, cut, emptied, swapped with another, removed, made null, a folder, a
link to itself or a pipe, and values in its JSON files are replaced by ones of other types and sizes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import SeekrError, printable
from seekr_peft.recipe import load_recipe
from seekr_peft.recipe.base_model import load_model

OUTCOMES = ("refused", "accepted", "traceback")
LONGEST = 1500
"""Characters of a sentence, at most."""

VALUES: tuple[Any, ...] = (
    *(None, [], {}, "", "x", "\x1b]0;t\x07", True, -1, 0, 1, 1.5, 7, 10**4, 10**9, 10**18, 10**30, -(10**18)),
    *([None], [[]], {"a": None}, ["x"] * 3, float("nan"), float("inf"), "../x", "a\0b", "é" * 300),
)
TEXTS = (b"null", b"[]", b'"x"', b"", b"{", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b"1" * 5000, b"[" * 100_000)


@dataclass(frozen=True)
class Case:
    """One damage: what is done, to which file, with which random numbers."""

    kind: str
    file: str
    seed: int


def mutations(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, the same for one ``seed``; every kind meets every file before one comes twice."""
    draw = random.Random(seed)
    files = sorted(path.name for path in BASE_PATH.iterdir() if path.is_file())
    pairs: list[tuple[str, str]] = []
    for _ in range(count):
        if not pairs:
            # Half of all are of the kinds that have the most ways to go.
            pairs = [(kind, file) for kind in (*KINDS, *["value", "flip"] * 4) for file in files]
            draw.shuffle(pairs)
        yield Case(*pairs.pop(), draw.getrandbits(32))


def damage(case: Case, folder: Path) -> None:
    """Make ``folder`` a copy of the base with the damage of ``case``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BASE_PATH, folder)
    KINDS[case.kind](folder / case.file, random.Random(case.seed))


def check_one(case: Case, folder: Path) -> str:
    """What ``load_model`` and a step of the model make of the damage: "refused" in one sentence that names the folder,
    "accepted", or "traceback", which also is a sentence that is none."""
    damage(case, folder)
    try:
        _use(folder)
    except SeekrError as error:
        said = str(error)
        fine = printable(str(folder)) in said and "\n" not in said and len(said) < LONGEST
        return "refused" if fine else _tell(case)
    except Exception:
        return _tell(case)
    return "accepted"


def _tell(case: Case) -> str:
    print(case, file=sys.stderr)
    traceback.print_exc()
    return "traceback"


def _use(folder: Path) -> None:
    recipe = load_recipe({"model": {"name_or_path": "demo", "quantization": "none"}, "tasks": {"format": "demo"}})
    # As if it had been damaged after the recipe's check.
    section = recipe.model.model_copy(update={"name_or_path": str(folder)})
    model, tokenizer = load_model(recipe.model_copy(update={"model": section}))
    tokens = torch.tensor([tokenizer("first: a b")["input_ids"]])
    with torch.no_grad():
        model(input_ids=tokens)


# Kinds of damage ------------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    # The first bytes are where a large file says what it holds.
    place = draw.randrange(min(len(content), draw.choice([8, 4096, len(content)])))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def swap(path: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(file for file in path.parent.iterdir() if file != path))
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def text(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.choice(TEXTS))


def value(path: Path, draw: random.Random) -> None:
    """Another value at a place of its JSON, or of the JSON in the header of its tensors."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = _with_another(json.loads(content[8 : 8 + length]), draw)
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        path.write_bytes(_with_another(json.loads(path.read_bytes()), draw))


def _with_another(document: Any, draw: random.Random) -> bytes:
    place = document
    while True:
        key = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8):
            break
        place = place[key]
    place[key] = draw.choice(VALUES)
    return json.dumps(document).encode()


def removed(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    each.__name__: each for each in (flip, cut, swap, text, value, removed, folder, loop, pipe)
}


def count(seed: int, n: int) -> Counter[str]:
    """How many of ``n`` cases had which outcome."""
    with tempfile.TemporaryDirectory() as directory:
        return Counter(check_one(case, Path(directory) / "base") for case in mutations(seed, n))


if __name__ == "__main__":
    found = count(int(sys.argv[1]), int(sys.argv[2]))
    print(f"bases: {sum(found.values())} tried, " + ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES))

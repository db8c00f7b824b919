"""Ways to damage one file of a run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def written(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: replace_file(path, change(path.read_bytes()))


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _flipped(place: float, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :] if content else b"\0"

    return change


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _swapped(path: Path) -> None:
    other = namesake(path)
    assert other is not None
    content = path.read_bytes()
    replace_file(path, other.read_bytes())
    replace_file(other, content)


def namesake(path: Path) -> Path | None:
    """The file of the same place in another task's folder, or of another evaluation, that has other bytes."""
    run = next(parent for parent in path.parents if parent.name == "run")
    parts = path.relative_to(run).parts
    if len(parts) < 3:
        return None
    found = [run.joinpath(parts[0], folder.name, *parts[2:]) for folder in sorted((run / parts[0]).iterdir())]
    others = [other for other in found if other != path and other.is_file()]
    return next((other for other in others if other.read_bytes() != path.read_bytes()), None)


def damages(draw: random.Random) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file, with random places."""
    flips = {
        f"bit {bit} flipped at {place:.3f}": written(_flipped(place, bit))
        for place, bit in [(0.0, draw.randrange(8)), (1.0, draw.randrange(8)), (draw.random(), draw.randrange(8))]
    }
    return {
        **flips,
        "emptied": written(lambda content: b""),
        "cut to one byte": written(lambda content: content[:1]),
        "cut to half": written(lambda content: content[: len(content) // 2]),
        "cut by one byte": written(lambda content: content[:-1]),
        "removed": Path.unlink,
        "swapped": _swapped,
        "a folder": _folder_instead,
        "a loop of links": _loop_instead,
    }

"""Ways to damage a file of a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def damaged_names() -> list[str]:
    names = [
        "recipe.yaml", "environment.json", "state.json", "method.json", "tasks.json", "costs.json", "metrics.jsonl",
        "accuracy_matrix.json", "accuracy_matrix.csv", "importance.safetensors", "manifest.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictions/02-last/01-first.jsonl",
    ]  # fmt: skip
    own = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "memory.safetensors", "memory.json",
           "importance.safetensors", "manifest.json")  # fmt: skip
    return [*names, *(f"tasks/02-last/{name}" for name in own)]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "a flipped bit at the end": lambda path: flip(path, 1.0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "another file": lambda path: path.write_bytes(b"{}\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path)),
}

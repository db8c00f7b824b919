"""Rows of a small task, as records, as a data set with labels and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

ROWS = [{"prompt": f"p{index}", "answer": f"a{index}"} for index in range(3)]
NEWS = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})


def news(*labels: int | None) -> Dataset:
    return Dataset.from_dict({"text": [f"t{n}" for n in range(len(labels))], "label": list(labels)}, features=NEWS)


def rows_of(split: Any) -> list[dict[str, str]]:
    return [dict(row) for row in split]


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

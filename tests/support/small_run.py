"""A task sequence that takes a few seconds: the demo's base model and tasks, and six optimiser steps a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASKS = ["first", "last", "third"]


def small_recipe(output_dir: Path, n_tasks: int = 3, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "demo", "quantization": "none"},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "method": {"name": "seekr", "replay_ratio": 0.1, "replay_every": 2, "replay_batch_size": 2},
        "training": {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 4},
        "tasks": {"format": "demo", "order": TASKS[:n_tasks], "max_train": 40, "max_test": 8},
        "evaluation": {"max_new_tokens": 3, "batch_size": 8},
        "output_dir": str(output_dir),
        **sections,
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

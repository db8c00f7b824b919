"""Builds an invented run directory in the documented formats, for the tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

FORMULAS = {
    "op": "mean of the last column",
    "bwt": "1/(K-1) * sum over i<K of (a[i,K] - a[i,i])",
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def accuracy(n_tasks: int, n_finished: int, loss_per_task: float, seed: int = 0) -> list[list[Any]]:
    """Scores that start near 0.93 and fall with every later task; null where not seen yet."""
    generator = np.random.default_rng(seed)
    start = 0.93 - 0.08 * generator.random(n_tasks)
    fall = loss_per_task * (0.6 + 0.8 * generator.random(n_tasks))
    return [
        [
            round(float(max(start[i] - fall[i] * (j - i), 0.02)), 4) if i <= j < n_finished else None
            for j in range(n_tasks)
        ]
        for i in range(n_tasks)
    ]


def operating_point(scores: list[list[Any]], n_finished: int) -> tuple[float, float | None]:
    """(OP, BWT) by plain loops, to check the library's arrays against."""
    last = n_finished - 1
    op = sum(scores[i][last] for i in range(n_finished)) / n_finished
    if n_finished == 1:
        return op, None
    return op, sum(scores[i][last] - scores[i][i] for i in range(last)) / last


def build_run(
    directory: Path,
    tasks: list[str] | None = None,
    n_finished: int | None = None,
    method: str = "seekr",
    shape: tuple[int, int] = (6, 8),
    loss_per_task: float = 0.05,
    steps: int = 60,
    prediction: str = "blue",
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write one run; ``method`` decides what is stored: sequential nothing, replay samples, seekr
    everything.
    """
    tasks = tasks or ["tickets", "contracts", "sql"]
    n_finished = len(tasks) if n_finished is None else n_finished
    _write_run_files(directory, tasks, n_finished, method, loss_per_task, recipe)
    folders = [f"{number:02d}-{name}" for number, name in enumerate(tasks, 1)]
    for index in range(n_finished):
        if method != "sequential":
            write_json(
                directory / "tasks" / folders[index] / "memory.json",
                memory_description(tasks[index], index, method == "seekr"),
            )
        for on in range(index + 1):
            path = directory / "predictions" / folders[index] / f"{folders[on]}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(prediction_lines(prediction, index, on)), encoding="utf-8")
    if method == "seekr":
        write_importance(directory / "importance.safetensors", folders[:n_finished], shape)
    lines = [
        json.dumps(line) + "\n"
        for index in range(n_finished)
        for line in metric_lines(tasks[index], index, steps, method)
    ]
    (directory / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


def _write_run_files(
    directory: Path,
    tasks: list[str],
    n_finished: int,
    method: str,
    loss_per_task: float,
    recipe: dict[str, Any] | None,
) -> None:
    scores = accuracy(len(tasks), n_finished, loss_per_task)
    op, bwt = operating_point(scores, n_finished) if n_finished else (None, None)
    write_json(
        directory / "accuracy_matrix.json",
        {"tasks": tasks, "scores": scores, "op": op, "bwt": bwt, "formulas": FORMULAS},
    )
    write_json(
        directory / "state.json",
        {
            "finished_tasks": n_finished,
            "tasks": tasks,
            "last_finished": tasks[n_finished - 1] if n_finished else None,
            "status": "finished" if n_finished == len(tasks) else "running",
        },
    )
    write_json(
        directory / "environment.json",
        {
            "versions": {"seekr_peft": "0.1.0", "torch": "2.13.0+cpu", "peft": "0.21.2"},
            "machine": {"device": "cpu", "cores": 2},
            "command": "seekr-peft run recipe.yaml",
            "seconds": 137.4 if n_finished == len(tasks) else None,
        },
    )
    content = recipe or {
        "model": {"name_or_path": "models/tiny-llama", "quantization": "none"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "mode": "stack"},
        "method": {"name": method, "replay_ratio": 0.01, "layer_budget": 0.75},
        "training": {"learning_rate": 0.002, "num_train_epochs": 6},
        "seed": 0,
        "output_dir": str(directory),
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def memory_description(task: str, index: int, with_rows: bool) -> dict[str, Any]:
    return {
        "format": 1,
        "task": task,
        "n_samples": 6 + index,
        "bytes": 41_000 + 9_000 * index if with_rows else 1_900,
        "estimated_bytes": 44_000 + 9_000 * index if with_rows else 1_850,
        "teacher": {
            "loss": 0.21 + 0.9 * (index == 1) if with_rows else None,
            "answer_entropy": 0.4 + 1.8 * (index == 1) if with_rows else None,
            "worth_imitating": index != 1 if with_rows else None,
        },
        "selection": {"1": [0, 5], "3": [2], "5": [1, 6, 7]} if with_rows else None,
        "queries_per_sample": 100,
        "row_top_k": 32,
        "logit_top_k": 64,
    }


def write_importance(path: Path, folders: list[str], shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    forgettability = generator.lognormal(0, 1, shape).astype(np.float32)
    sensitivity = generator.lognormal(-3, 1, shape).astype(np.float32)
    importance = forgettability * sensitivity
    tensors = {
        "forgettability": forgettability,
        "sensitivity": sensitivity,
        "importance": importance,
    }
    for folder in folders:
        tensors[f"forgettability.{folder}"] = forgettability / len(folders)
        tensors[f"sensitivity.{folder}"] = sensitivity / len(folders)
        tensors[f"selected.{folder}"] = importance >= np.quantile(importance, 0.875)
    save_file(tensors, path)


def metric_lines(task: str, index: int, steps: int, method: str) -> list[dict[str, Any]]:
    generator = np.random.default_rng(index)
    lines = []
    for step in range(1, steps + 1):
        decay = float(np.exp(-3 * step / steps))
        noise = 1 + 0.25 * generator.standard_normal(3)
        line: dict[str, Any] = {"task": task, "task_index": index, "step": step, "epoch": step / 10}
        line |= {"loss": (0.1 + 3 * decay) * abs(noise[0]), "learning_rate": 0.002 * decay}
        if index > 0 and method != "sequential" and step % 3 == 0:
            line["replay_loss"] = (0.3 + decay) * abs(noise[1])
            if method == "seekr":
                line["logits_loss"] = (0.05 + decay) * abs(noise[2])
                line["attention_loss"] = 0.002 * (0.1 + decay) * abs(noise[1])
        lines.append(line)
    return lines


def prediction_lines(prediction: str, after: int, on: int) -> list[str]:
    lines = []
    for number in range(5):
        right = after == on or number % 2 == 0
        content = {
            "prompt": f"Which colour has item {number} of task {on + 1}? Answer with one word.",
            "answer": "green" if number else "red",
            "prediction": ("green" if number else "red") if right else prediction,
            "score": 1.0 if right else 0.0,
        }
        lines.append(json.dumps(content) + "\n")
    return lines

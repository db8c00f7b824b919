"""Runs of ``small_recipe``: made quietly, stopped at a moment, and compared bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

import seekr_peft.run.measuring as measuring_module
from seekr_peft import run_recipe
from support.small_run import read_json, read_lines, small_recipe

# Word for word what safetensors 0.8 raises on a full tmpfs.
FULL_DISK = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(recipe: dict[str, Any], **options: Any) -> Any:
    return run_recipe(recipe, console=quiet(), **options)


def assert_same_result(one: Path, other: Path) -> None:
    """Bitwise: adapters, importance, memories and matrix; and the same metrics."""
    files = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert len(files) == 11
    assert files == [path.relative_to(other) for path in sorted(other.rglob("*.safetensors"))]
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], file
    for file in ("accuracy_matrix.json", "state.json", "method.json", "tasks.json"):
        assert read_json(one / file) == read_json(other / file), file
    assert read_lines(one / "metrics.jsonl") == read_lines(other / "metrics.jsonl")
    for path in one.glob("predictions/*/*.jsonl"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def stop_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, condition: Callable[..., bool]) -> None:
    original = getattr(target, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if condition(*args, **kwargs):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, stopping)


def before_evaluating_task_2(model: Any, tokenizer: Any, task: Any, **kwargs: Any) -> bool:
    return task.name == "last"


def stopped_after_one_task(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose second task was never begun; its recipe."""
    evaluate = measuring_module.evaluate_task
    recipe = small_recipe(directory, n_tasks=2)

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring_module, "evaluate_task", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.setattr(measuring_module, "evaluate_task", evaluate)
    return recipe

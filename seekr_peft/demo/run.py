"""The embedded demo: three methods on four contradicting tasks, measured here and now."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..compare import compare
from ..compare.results import PAGE_FILE
from ..errors import RunError
from ..evaluation import AccuracyMatrix
from ..files.paths import given_path
from ..terminal import TerminalConsole
from ..training.stopping import RunStopped, listening

METHODS = ("sequential", "replay", "seekr")
TITLE = "Four tasks that contradict each other: what is kept"
MARKER = ".seekr-peft-demo"


def demo_recipe() -> dict[str, Any]:
    """The recipe of the demo (``recipes/demo.yaml`` says the same)."""
    return {
        "model": {"name_or_path": "demo", "quantization": "nf4"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "mode": "stack"},
        # Rarer than the default (every 3 steps): where replay is cheap, plain replay no longer suffices.
        "method": {"name": "seekr", "replay_every": 4},
        "training": {
            "learning_rate": 2.0e-3,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 4,
            # Without it a task starts on a plateau in some seeds and is not learnt in its 100 steps.
            "warmup_steps": 10,
        },
        "tasks": {"format": "demo", "max_train": 200, "max_test": 100},
        "evaluation": {"max_new_tokens": 4, "batch_size": 100},
        "seed": 0,
        "output_dir": "runs/demo/seekr",
    }


def run_demo(out: str | Path = "runs/demo", console: Console | None = None) -> Path:
    """Run sequential training, replay and SEEKR with the same base, data, order, seed and optimiser steps.

    An earlier demo in ``out`` is replaced; any other folder that is not empty is refused.

    Returns:
        The path of the page that shows the three side by side.
    """
    directory = given_path(out, "the folder of the demo")
    with listening():
        try:
            return _run_demo(directory, console or TerminalConsole())
        except RunStopped as stop:
            stop.go_on_with("the same command starts it again")
            raise


def _run_demo(directory: Path, console: Console) -> Path:
    _prepare(directory)
    started = time.monotonic()
    # On so small a model a second thread gains little, and on a busy machine waiting for it costs four times as much.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = {**demo_recipe(), "output_dir": str(directory), "compare": {"title": TITLE}}
        comparison = compare(recipe, methods=METHODS, seeds=[0], orders=1, show="runs", console=console)
    finally:
        torch.set_num_threads(n_threads)
    page = directory / PAGE_FILE
    console.rule(align="left")
    console.print(_table({run.variant: AccuracyMatrix.load(directory / run.directory) for run in comparison.runs}))
    seconds = time.monotonic() - started
    console.print(f"measured in {seconds:.0f} s on this machine; the page: {page}", markup=False, soft_wrap=True)
    return page


def _prepare(directory: Path) -> None:
    if (
        directory.exists()
        and not (directory / MARKER).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise RunError(f"{directory} is not empty and holds no earlier demo; choose another folder with --out.")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARKER).touch()


def _table(matrices: dict[str, AccuracyMatrix]) -> Table:
    table = Table(title="after the last task, exact match in %", title_justify="left")
    table.add_column("method")
    names = next(iter(matrices.values())).task_names
    for heading in (*names, "OP", "BWT"):
        table.add_column(heading, justify="right")
    for method, matrix in matrices.items():
        scores = [matrix.score(after=names[-1], on=name) or 0.0 for name in names]
        figures = [f"{100 * score:.1f}" for score in (*scores, matrix.op())]
        table.add_row(method, *figures, f"{100 * matrix.bwt():+.1f}")
    return table

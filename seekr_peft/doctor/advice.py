"""What the doctor prints: the footprint as a table, whether it fits, and the first knob to turn."""

from __future__ import annotations

import math
import os

import torch
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..recipe import Recipe
from ..recipe.base_model import CHECKPOINTING
from .estimate import Footprint, estimate_footprint


def first_knob(footprint: Footprint, recipe: Recipe) -> str:
    """The setting to change first when ``footprint`` does not fit: it acts on the largest part."""
    phase = footprint.worst_phase
    if footprint.resident > footprint.phases[phase]:
        if recipe.model.quantization == "none":
            return "model.quantization: nf4 (the weights are the largest part)"
        if footprint.optimizer + footprint.adapters > footprint.base:
            return "adapter.r (the adapters and their optimizer are the largest part)"
    if phase == "training":
        if not any(recipe.training.get(name) for name in CHECKPOINTING):
            return "training.gradient_checkpointing: true"
        if recipe.training.get("per_device_train_batch_size", 8) > 1:
            return "training.per_device_train_batch_size, with training.gradient_accumulation_steps in its place"
        return "tasks.max_length"
    return {
        "replay": "method.replay_batch_size",
        "scoring": "method.query_budget",
        "evaluation": "evaluation.batch_size",
    }[phase]


def render_footprint(recipe: Recipe, console: Console, memory: float | None = None) -> bool:
    """Print the footprint of ``recipe`` and whether it fits into ``memory`` GB (None: this machine's); True if so."""
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--memory must be a number of GB above 0, got {memory}.")
    footprint = estimate_footprint(recipe)
    table = Table(title=f"{recipe.model.name_or_path}, {recipe.method_name}: GB at most", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    parts = {
        "base weights": footprint.base,
        f"adapters, {footprint.n_tasks} tasks": footprint.adapters,
        "optimizer": footprint.optimizer,
        **{f"+ {phase}": size for phase, size in footprint.phases.items()},
    }
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row(f"peak, in {footprint.worst_phase}", f"{footprint.peak / 1e9:.3f}")
    console.print(table)
    if footprint.replay_samples:
        console.print(
            f"replay memory on disk, at most: {footprint.memory_on_disk / 1e6:.1f} MB ({footprint.n_tasks} tasks of "
            f"{footprint.replay_samples} samples of {footprint.bytes_per_sample / 1e3:.1f} kB)",
            soft_wrap=True,
        )
    available = memory * 1e9 if memory is not None else _memory_here()
    fits = footprint.peak <= available
    text = "fits" if fits else f"does not fit; the first knob to turn: {first_knob(footprint, recipe)}"
    console.print(f"{available / 1e9:.1f} GB at hand: {text}", soft_wrap=True)
    return fits


def _memory_here() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

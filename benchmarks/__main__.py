"""Every figure of the library with its goal and the distance to it, measured in one process.

    python -m benchmarks [--device cuda] [--out FILE.json]

Times are ratios of steps that take turns; peaks count tensors (the allocator's own peak on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import large_model, replay_step, scoring, storage, task_count, whole_task


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``goal`` is the largest value that is good, None where there is none."""

    name: str
    value: float
    goal: float | None
    unit: str = ""

    def row(self) -> tuple[str, str, str, str]:
        """As text: name, value, goal, distance."""
        value = f"{self.value:.3g} {self.unit}".rstrip() if self.unit != "x" else f"x {self.value:.3f}"
        if self.goal is None:
            return self.name, value, "", ""
        distance = 100 * (self.value / self.goal - 1)
        verdict = "reached" if self.value <= self.goal else f"{distance:+.0f} %"
        return self.name, value, f"{self.goal:g}", verdict


def step_figures(device: str, repeats: int) -> tuple[list[Figure], list[replay_step.Row]]:
    """Time and peak of the replay step, and how the capture's own memory grows."""
    rows = [replay_step.measure(length, repeats, device) for length in (512, 1024, 2048)]
    base = rows[1].seconds["replay + logits"], rows[1].peak_bytes["replay + logits"]
    grown = replay_step.extra_peak(4096, device) / replay_step.extra_peak(512, device)
    mixed = replay_step.mixed_batch(1024, repeats // 2 + 1, device)
    work, launches = rows[1].device_seconds, rows[1].launches
    own = []
    if work:
        # Apart from the time in which the host starts the kernels.
        ratio = work["with attention"] / work["replay + logits"]
        own.append(Figure("the same, the GPU's own time", ratio, 1.05, "x"))
        own.append(Figure("the same, kernels started", launches["with attention"] - launches["replay + logits"], None))
    return [
        Figure("replay step with attention / without, time", rows[1].seconds["with attention"] / base[0], 1.05, "x"),
        *own,
        Figure("the same on one thread", replay_step.time_ratio(1024, repeats, device, threads=1), 1.05, "x"),
        Figure(
            "the same, hidden size 1024 x 4 layers",
            replay_step.time_ratio(1024, repeats // 2 + 1, device, replay_step.WIDE),
            1.05,
            "x",
        ),
        Figure("the same, peak memory", rows[1].peak_bytes["with attention"] / base[1], 1.02, "x"),
        Figure("replay step of 8 samples of 8 tasks, each with heads of its own, time", mixed["time"], 1.05, "x"),
        Figure("the same, peak memory", mixed["peak"], 1.02, "x"),
        Figure("eager way / without, time", rows[1].seconds["eager attention"] / base[0], None, "x"),
        Figure("eager way / without, peak memory", rows[1].peak_bytes["eager attention"] / base[1], None, "x"),
        Figure("capture's own memory, T = 4096 / T = 512", grown, 8.0, "x"),
    ], rows


def scoring_figures(device: str, repeats: int) -> list[Figure]:
    """Scoring one sample."""
    found = scoring.measure(1024, repeats, device)
    own = []
    if "device_ratio" in found:
        own.append(Figure("the same, the GPU's own time", found["device_ratio"], 1.10, "x"))
    return [
        Figure("scoring a sample / two forwards and one backward, time", found["scoring_ratio"], 1.10, "x"),
        Figure("the same, peak memory", found["scoring_peak_ratio"], None, "x"),
        Figure("the same, sensitivity over the drawn queries alone, time", found["drawn_ratio"], 1.10, "x"),
        Figure("the same, peak memory", found["drawn_peak_ratio"], None, "x"),
        *own,
    ]


def storage_figures(shared: Path) -> list[Figure]:
    """Bytes and exactness of the stored teacher."""
    found = storage.measure(shared)
    figures = [
        Figure(f"stored per sample at most, 7B shape, vocabulary {vocabulary}", size / 1e6, 1.0, "MB")
        for vocabulary, size in found["bytes_7b"].items()
    ]
    for name, kl in found.items():
        if name.startswith("kl "):
            model = name.removeprefix("kl ")
            figures.append(Figure(f"mean KL of stored rows, {model}, T = 512", kl["rows_kl"], 0.01, "nats"))
            figures.append(Figure(f"mean KL of stored logits, {model}", kl["logits_kl"], 0.01, "nats"))
    figures.append(Figure("resident growth on opening a memory / its size", found["resident"]["opened"], 0.05))
    figures.append(Figure("the same after reading one of 60 samples", found["resident"]["one_sample"], 0.05))
    return figures


def task_figures(device: str) -> list[Figure]:
    """A whole task, and the growth with the number of tasks."""
    whole = whole_task.measure(512, 4, device)
    counted = task_count.measure((2, 9, 29), 64, device)
    few, ten, many = counted.values()
    return [
        Figure("a whole task / the same with replay (replay_every 4, T = 512)", whole["to_replay"], 1.10, "x"),
        Figure("a whole task / plain fine-tuning (replay_every 4, T = 512)", whole["to_sequential"], None, "x"),
        Figure("training step, 30th task / 3rd (rank_limit 64)", many["step_seconds"] / few["step_seconds"], 1.05, "x"),
        Figure("training step, 30th task / 10th", many["step_seconds"] / ten["step_seconds"], 1.05, "x"),
        Figure("seconds of the 30th task / 3rd", many["task_seconds"] / few["task_seconds"], 1.05, "x"),
        Figure("seconds of the 30th task / 10th", many["task_seconds"] / ten["task_seconds"], 1.05, "x"),
        Figure("memory of a training step with all weights, 30th task / 3rd", many["ram"] / few["ram"], None, "x"),
        Figure("memory of a training step with all weights, 30th task / 10th", many["ram"] / ten["ram"], 1.05, "x"),
        Figure("disk per task, 29 tasks / 2 tasks", many["disk_per_task"] / few["disk_per_task"], 1.05, "x"),
    ]


def large_model_figures(device: str, repeats: int) -> list[Figure]:
    """A 7B shape in NF4 with checkpointing, batch 1, T = 1024."""
    found = large_model.measure("7b", 1024, repeats, device)
    resident, seconds, peak = found["resident"], found["seconds"], found["peak"]
    figures = []
    for step in seconds:
        figures.append(Figure(f"7B shape, {step}", 1024 / seconds[step], None, "tokens/s"))
        goal = 15.0 if step == "with attention" else None
        figures.append(Figure(f"7B shape, {step}, peak", (resident + peak[step]) / 1e9, goal, "GB"))
    for name, step, base, limit in (
        ("7B shape, replay step with attention / without", "with attention", "replay + logits", 1.05),
        ("7B shape, scoring a sample / two forwards and one backward", "scoring", large_model.BARE, 1.10),
    ):
        figures.append(Figure(f"{name}, time", seconds[step] / seconds[base], limit, "x"))
        if found["device_seconds"]:
            own = found["device_seconds"]
            figures.append(Figure("the same, the GPU's own time", own[step] / own[base], limit, "x"))
    for step, phase in large_model.PHASES.items():
        foretold = found["predicted"]["resident"] + found["predicted"][phase]
        error = abs(foretold / (resident + peak[step]) - 1)
        figures.append(Figure(f"7B shape, doctor's error in the peak, {step}", error, 0.1))
    return figures


def startup_figures() -> list[Figure]:
    """Seconds of the import, ``--help`` and the check of a recipe, least of three processes each."""
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text("model: {name_or_path: demo}\ntasks: {format: demo}\n", encoding="utf-8")
        command = [str(Path(sys.executable).with_name("seekr-peft"))]
        runs = {
            "import seekr_peft": ([sys.executable, "-c", "import seekr_peft"], 0.3),
            "seekr-peft --help": ([*command, "--help"], 1.0),
            "seekr-peft run --check": ([*command, "run", str(recipe), "--check"], 1.0),
        }
        return [Figure(name, _least_seconds(run), goal, "s") for name, (run, goal) in runs.items()]


def _least_seconds(command: list[str]) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Measure, print, and write ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    shared = Path(os.environ.get("SEEKR_SHARED", "../shared"))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console = Console(width=120)
    startup = startup_figures()
    steps, rows = step_figures(options.device, options.repeats)
    console.print(replay_step.table(rows, machine))
    figures = [*steps, *scoring_figures(options.device, options.repeats), *storage_figures(shared)]
    figures += [*task_figures(options.device), *startup]
    if options.device == "cuda":
        figures += large_model_figures(options.device, options.repeats)
    table = Table(title=f"Figures and goals, {machine}, torch {torch.__version__}", title_justify="left")
    for heading in ("figure", "measured", "goal", "distance"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(*figure.row())
    console.print(table)
    if options.out:
        document: dict[str, Any] = {
            "machine": machine,
            "torch": torch.__version__,
            "figures": [vars(figure) for figure in figures],
            "replay_step": [vars(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

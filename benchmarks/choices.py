"""The measurements behind the defaults: the demo's four tasks under other settings, several seeds each.

    python -m benchmarks.choices [--seeds 0 1 2 3] [--only replay seekr ...] [--out FILE.json]

Every row shares base, data, order, seeds and optimiser steps with the others; only the named setting differs.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seekr_peft.demo.run import demo_recipe
from seekr_peft.run import run_recipe

SETTINGS: dict[str, list[str]] = {
    "sequential": ["method.name=sequential"],
    "ewc": ["method.name=ewc", "adapter.mode=continue", "method.ewc_lambda=1.0e+7"],
    "olora": ["method.name=olora"],
    "replay": ["method.name=replay"],
    "replay, step of its own": ["method.name=replay", "method.replay_step=separate"],
    "replay, one adapter continued": ["method.name=replay", "adapter.mode=continue"],
    "seekr": [],
    "seekr, lambda2 = 1": ["method.lambda2=1.0"],
    "seekr, lambda2 = 10": ["method.lambda2=10.0"],
    "seekr, lambda2 = 1000": ["method.lambda2=1000.0"],
    "seekr, no attention": ["method.attention_distillation=false"],
    "seekr, no logits": ["method.logits_distillation=false"],
    "seekr, random heads": ["method.head_choice=random"],
    "seekr, all heads": ["method.head_choice=all"],
    "seekr, step of its own": ["method.replay_step=separate"],
    "seekr, one adapter continued": ["adapter.mode=continue"],
}


def measure(overrides: list[str], seed: int) -> dict[str, Any]:
    """One run of the demo's recipe: OP, BWT (percent) and the score of each task right after its training."""
    with tempfile.TemporaryDirectory() as folder:
        common = [f"seed={seed}", f"output_dir={folder}/run"]
        matrix = run_recipe(demo_recipe(), [*overrides, *common], console=Console(file=io.StringIO())).matrix
    learnt = [matrix.score(after=name, on=name) or 0.0 for name in matrix.task_names]
    return {"seed": seed, "op": 100 * matrix.op(), "bwt": 100 * matrix.bwt(), "learnt": min(learnt) * 100}


def table(figures: dict[str, list[dict[str, Any]]]) -> Table:
    """Means and single seeds of OP, mean BWT, and the worst score that a task had right after its training."""
    result = Table(title="The demo's four tasks, in %", title_justify="left")
    for heading in ("setting", "OP", "OP of each seed", "BWT", "worst task when learnt"):
        result.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, runs in figures.items():
        result.add_row(
            name,
            f"{statistics.mean(run['op'] for run in runs):.1f}",
            " ".join(f"{run['op']:.1f}" for run in runs),
            f"{statistics.mean(run['bwt'] for run in runs):+.1f}",
            f"{min(run['learnt'] for run in runs):.0f}",
        )
    return result


def main() -> None:
    """Run, print after each setting, and write ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    for name in options.only:
        figures[name] = [measure(SETTINGS[name], seed) for seed in options.seeds]
        print(json.dumps({name: figures[name]}), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    Console(width=110).print(table(figures))


if __name__ == "__main__":
    main()

"""Builds an invented comparison, comparison.json with its run directories, for the tests of its page."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from support.run_directory_fixture import build_run, write_json

ORDERS = [["tickets", "contracts", "sql"], ["sql", "tickets", "contracts"]]
COST = {
    "n_steps": 90, "step_seconds": 0.0125, "train_seconds": 1.2, "other_seconds": 0.5, "evaluate_seconds": 0.4,
    "step_peak_bytes": 52_000_000, "kept_bytes": 41_000,
}  # fmt: skip


def build_comparison(
    out: Path,
    variants: dict[str, dict[str, Any]],
    *,
    orders: list[list[str]] = ORDERS,
    seeds: tuple[int, ...] = (0, 1),
    baseline: str | None = "replay",
    curve: str | None = None,
    general: bool = False,
) -> Path:
    """Write the run directories and OUT/comparison.json.

    Of a variant, ``method``, ``settings``, ``fall`` (what a task loses with every later one), ``joint`` (no BWT) and
    ``runs`` (False: planned only) may be given.
    """
    rows, runs = [], []
    for number, (label, given) in enumerate(variants.items()):
        own = [
            _build_single(out, label, number, given, orders, order, seed, general)
            for order in range(1, len(orders) + 1)
            for seed in seeds
            if given.get("runs", True)
        ]
        rows.append({**_row(label, given, own), "planned": len(orders) * len(seeds)})
        runs += own
    base = {(run["order"], run["seed"]): run["op"] for run in runs if run["variant"] == baseline}
    for row in rows:
        own = [run for run in runs if run["variant"] == row["label"] and row["label"] != baseline]
        differences = [run["op"] - base[run["order"], run["seed"]] for run in own if base]
        if differences:
            wins = sum(difference > 0 for difference in differences)
            row["against_baseline"] = {**_spread(differences), "n": len(differences), "wins": wins, "p": 0.125}
    content = {
        "title": "Random heads", "command": "seekr-peft compare recipe.yaml",
        "answer": "Is random worth it? Not shown: <chance>.", "baseline": baseline, "orders": orders,
        "seeds": list(seeds), "curve": curve, "variants": rows, "runs": runs, "same": ["base model", "data"],
        "test": {"name": "exact paired sign-flip test", "assumption": "Differences are as likely up as down."},
    }  # fmt: skip
    write_json(out / "comparison.json", content)
    return out


def _build_single(
    out: Path,
    label: str,
    number: int,
    given: dict[str, Any],
    orders: list[list[str]],
    order: int,
    seed: int,
    general: bool,
) -> dict[str, Any]:
    tasks = orders[order - 1]
    directory = out / "runs" / f"variant{number}" / f"order{order}-seed{seed}"
    fall = given.get("fall", 0.05) + 0.011 * seed + 0.007 * order
    build_run(directory, tasks, method=given["method"], loss_per_task=fall, steps=2)
    path = directory / "accuracy_matrix.json"
    scores = json.loads(path.read_text())["scores"]
    last = len(tasks) - 1
    learnt, bwt = None, None
    if given.get("joint"):
        scores = [[None] * last + [0.95 - 0.01 * seed] for _ in tasks]
        write_json(path, {"tasks": tasks, "scores": scores})
    else:
        learnt = mean(scores[i][i] for i in range(last + 1))
        bwt = mean(scores[i][last] - scores[i][i] for i in range(last))
    if general:
        tests = [{"name": "mmlu", "kind": "choice"}, {"name": "story", "kind": "text"}]
        values = {"mmlu": [0.4, 0.38 - fall, None, 0.35 - fall + 0.02 * seed], "story": [3.0, 3.1, 3.2, 3.2 + fall]}
        write_json(directory / "general.json", {"tests": tests, "after": ["", *tasks[:3]], "values": values})
    return {
        "variant": label, "order": order, "seed": seed, "directory": str(directory.relative_to(out)),
        "op": mean(row[last] for row in scores), "bwt": bwt, "learnt": learnt, "cost": COST,
    }  # fmt: skip


def _row(label: str, given: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {key: _spread([run[key] for run in runs if run[key] is not None]) for key in ("op", "bwt", "learnt")}
    factor = 1 + len(label) / 20
    return {
        "label": label, "method": given["method"], "settings": given.get("settings", {}), "n": len(runs), **scores,
        "cost": {key: value * factor for key, value in COST.items()} if runs else None,
        "against_baseline": None, "gap_closed": given.get("gap"),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "sd": deviation, "min": min(values), "max": max(values)}

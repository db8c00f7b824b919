"""Reads a comparison's comparison.json, and the run directories it names, into a ``Comparison``.

Scores stay fractions, as in the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..files.paths import given_path
from ..report.reading import GeneralCurve, RunRecord, numbered_names, parse, read_run, shorten

FILE_NAME = "comparison.json"
NAME_LIMIT = 30
COSTS = ("step_seconds", "step_peak_bytes", "other_seconds", "kept_bytes")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; ``sd`` is None for one run."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """OP above the baseline's over the ``n`` pairs of one order and seed; ``wins`` of them are above zero."""

    spread: Spread
    n: int
    wins: int
    p: float | None


@dataclass(frozen=True)
class SingleRun:
    """One finished run; ``order`` counts from 1."""

    order: int
    seed: int
    directory: str
    op: float
    bwt: float | None
    learnt: float | None
    record: RunRecord


@dataclass(frozen=True)
class Variant:
    """One row of the table. ``name`` is the label cut for figures, still different from the others'; ``place`` counts
    from 0 and decides the look. ``costs`` has the keys of COSTS, None where not measured.
    """

    place: int
    name: str
    label: str
    method: str
    settings: dict[str, Any]
    n: int
    planned: int
    op: Spread | None
    bwt: Spread | None
    learnt: Spread | None
    costs: dict[str, float | None] | None
    difference: Difference | None
    gap_closed: float | None
    runs: list[SingleRun] = field(default_factory=list)

    def records(self, order: int | None = None) -> list[RunRecord]:
        """The run directories of one order, counted from 1, or of all."""
        return [run.record for run in self.runs if order in (None, run.order)]


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows."""

    path: Path
    title: str
    command: str
    answer: str
    baseline: str | None
    orders: list[list[str]]
    seeds: list[int]
    curve: str | None
    same: list[str]
    test_name: str
    test_assumption: str
    variants: list[Variant]

    @property
    def finished(self) -> list[Variant]:
        """The variants that have a finished run."""
        return [variant for variant in self.variants if variant.op is not None]

    def pairs(self, variant: Variant) -> dict[tuple[int, int], float]:
        """(order, seed) -> how far the variant's OP is above the baseline's, where both have a run."""
        of_baseline = [run for other in self.variants if other.label == self.baseline for run in other.runs]
        base = {(run.order, run.seed): run.op for run in of_baseline}
        ops = {(run.order, run.seed): run.op for run in variant.runs}
        return {key: op - base[key] for key, op in sorted(ops.items()) if key in base}


def load_comparison(out_directory: str | Path) -> Comparison:
    """Read OUT/comparison.json and its runs; raises RunError naming the file when it is missing or broken."""
    path = given_path(out_directory, "the comparison") / FILE_NAME
    if not path.is_file():
        raise RunError(f"there is no {path}: give the output_dir of a `seekr-peft compare`")
    content = parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    try:
        comparison = _comparison(path, content)
        variants = {variant.label: variant for variant in comparison.variants}
        for row in content["runs"]:
            variants[_text(row["variant"])].runs.append(_single_run(path, row, comparison.orders))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"{path} is not a comparison ({type(error).__name__}: {error}): run `seekr-peft compare` again"
        ) from error
    return comparison


def distinct_names(labels: list[str], limit: int) -> list[str]:
    """The labels cut to ``limit`` characters, numbered where two would become the same."""
    names = [shorten(label, limit) for label in labels]
    return names if len(set(names)) == len(names) else numbered_names(labels, limit)


def mean_record(records: list[RunRecord]) -> RunRecord:
    """The first record with the mean of all scores and of all general ability in place of its own."""
    names = list(dict.fromkeys(curve.name for record in records for curve in record.general))
    curves = [[curve for record in records for curve in record.general if curve.name == name] for name in names]
    return replace(
        records[0],
        scores=_mean([record.scores for record in records]),
        general=[_mean_curve(same) for same in curves],
    )


def _mean_curve(curves: list[GeneralCurve]) -> GeneralCurve:
    length = max(curve.values.size for curve in curves)
    padded = [np.append(curve.values, np.full(length - curve.values.size, np.nan)) for curve in curves]
    return replace(curves[0], values=_mean(padded))


def _mean(arrays: list[np.ndarray]) -> np.ndarray:
    return np.ma.masked_invalid(np.stack(arrays)).mean(axis=0).filled(np.nan)


def layer_shares(records: list[RunRecord]) -> np.ndarray | None:
    """(n_layers,) shares of the heads selected after the last task, mean over the runs; None where no run has any."""
    shares = []
    for record in records:
        last = record.heads.last_selected if record.heads is not None else None
        if last is not None and last[1].any():
            shares.append(last[1].sum(axis=1) / last[1].sum())
    return np.mean(shares, axis=0) if shares else None


def _comparison(path: Path, content: dict[str, Any]) -> Comparison:
    rows, test = content["variants"], content["test"]
    labels = [_text(row["label"]) for row in rows]
    if len(set(labels)) < len(labels):
        raise ValueError("two variants have the same label")
    names = distinct_names(labels, NAME_LIMIT)
    return Comparison(
        path=path,
        title=_text(content["title"]),
        command=_text(content["command"]),
        answer=_text(content["answer"]),
        baseline=None if content["baseline"] is None else _text(content["baseline"]),
        orders=[[str(name) for name in order] for order in content["orders"]],
        seeds=[int(seed) for seed in content["seeds"]],
        curve=content["curve"],
        same=[_text(entry) for entry in content["same"]],
        test_name=_text(test["name"]),
        test_assumption=_text(test["assumption"]),
        variants=[_variant(place, name, row) for place, (name, row) in enumerate(zip(names, rows, strict=True))],
    )


def _variant(place: int, name: str, row: dict[str, Any]) -> Variant:
    against, costs = row["against_baseline"], row["cost"]
    return Variant(
        place=place,
        name=name,
        label=_text(row["label"]),
        method=_text(row["method"]),
        settings=dict(row["settings"]),
        n=int(row["n"]),
        planned=int(row["planned"]),
        op=_spread(row["op"]),
        bwt=_spread(row["bwt"]),
        learnt=_spread(row["learnt"]),
        costs=None if costs is None else {key: _number(costs[key]) for key in COSTS},
        difference=None if against is None else _difference(against),
        gap_closed=_number(row["gap_closed"]),
    )


def _difference(row: dict[str, Any]) -> Difference | None:
    spread = _spread(row)
    return None if spread is None else Difference(spread, int(row["n"]), int(row["wins"]), _number(row["p"]))


def _spread(row: dict[str, Any] | None) -> Spread | None:
    mean = None if row is None else _number(row["mean"])
    return None if row is None or mean is None else Spread(mean, _number(row["sd"]))


def _single_run(path: Path, row: dict[str, Any], orders: list[list[str]]) -> SingleRun:
    order, op = int(row["order"]), _number(row["op"])
    if op is None or not 1 <= order <= len(orders):
        raise ValueError(f"the run {row['directory']!r} has OP {op} and order {order} of {len(orders)}")
    record = read_run(path.parent / row["directory"])
    if record.tasks != orders[order - 1]:
        raise RunError(
            f"{record.directory} has the tasks {record.tasks} where order {order} in {path} is "
            f"{orders[order - 1]}: run `seekr-peft compare` again"
        )
    return SingleRun(
        order=order,
        seed=int(row["seed"]),
        directory=_text(row["directory"]),
        op=op,
        bwt=_number(row["bwt"]),
        learnt=_number(row["learnt"]),
        record=record,
    )


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _text(value: Any) -> str:
    """The text without what no font shows: control characters, turned directions, lone surrogates."""
    return "".join(character for character in str(value) if character.isprintable() or character.isspace())
